"""``tdfx latency`` and ``tdfx latency-kit``, and plans made with what they measure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import BOTH_INPUTS, tdfx_command

from tdfx.records.latency import LatencyTable
from tdfx.records.plan import Plan


@pytest.fixture
def profile(folder: Path) -> Path:
    tdfx_command("profile", "net.py:make", *BOTH_INPUTS, "--methods", "spatial_svd", "-o", "profile.json")
    return folder


def test_plans_are_made_with_measured_times(profile: Path) -> None:
    stdout, stderr = tdfx_command("latency", "net.py:make", "profile.json", *BOTH_INPUTS, "-o", "latency.json")
    assert "latency.json: times; tdfx plan reads it as --latency" in stdout and stderr == ""
    table = LatencyTable.from_json(Path("latency.json").read_text())
    assert str(table) in stdout
    assert str(table) in tdfx_command("inspect", "latency.json")[0]
    tdfx_command("plan", "profile.json", "--latency", "latency.json", "--budget", "latency=99%", "-o", "plan.json")
    plan = Plan.from_json(Path("plan.json").read_text())
    assert plan.latency_source == "measured" and plan.before.latency_s == table.network_s
    tdfx_command("apply", "net.py:make", "plan.json", *BOTH_INPUTS, "--out", "out")
    assert Plan.from_json(Path("out/plan.json").read_text()).after == plan.after


def test_a_frontier_goes_by_measured_times(profile: Path) -> None:
    tdfx_command("latency", "net.py:make", "profile.json", *BOTH_INPUTS, "-o", "latency.json")
    given = ("frontier", "net.py:make", *BOTH_INPUTS, "--methods", "spatial_svd", "-o", "curve.csv")
    given = (*given, "--resource", "latency", "--points", "2")
    assert "latency is estimated" in tdfx_command(*given)[0]
    assert "latency is measured" in tdfx_command(*given, "--latency", "latency.json")[0]


def test_a_plan_by_a_table_says_that_the_network_was_not_timed(profile: Path) -> None:
    tdfx_command("latency", "net.py:make", "profile.json", *BOTH_INPUTS, "-o", "latency.json")
    given = ("plan", "profile.json", "--latency", "latency.json")
    assert "was not timed" in tdfx_command(*given, "--budget", "latency=99%")[0]
    assert "was not timed" in tdfx_command(*given, "--budget", "flops=100%", "--guard", "measured")[0]
    assert "was not timed" not in tdfx_command(*given, "--budget", "flops=99%")[0]


def test_a_rank_rule_leaves_nothing_to_guard(profile: Path) -> None:
    ruled = ("--ranks", "energy=0.9", "--methods", "svd", "-o", "ruled.json")
    tdfx_command("profile", "net.py:make", *BOTH_INPUTS, *ruled)
    tdfx_command("latency", "net.py:make", "ruled.json", *BOTH_INPUTS, "-o", "latency.json")
    _, stderr = tdfx_command("plan", "ruled.json", "--latency", "latency.json", "--guard", "measured", code=2)
    assert "ranks by energy=0.9, which leaves nothing to guard" in " ".join(stderr.replace("│", " ").split())


def test_named_sizes_reach_every_command_that_captures(profile: Path) -> None:
    for command in (
        ["latency", "net.py:make", "profile.json", "-o", "latency.json"],
        ["latency-kit", "net.py:make", "profile.json", "kit"],
        ["frontier", "net.py:make", "-o", "curve.csv"],
        ["graph", "net.py:make", "-o", "graph.dot"],
    ):
        _, stderr = tdfx_command(*command, *BOTH_INPUTS, "--dynamic", "x:9=width", code=1)
        assert "dynamic names dimension 9 of x, which has shape (2, 4, 8, 8)" in stderr, command


def test_threads_are_as_asked_for(profile: Path) -> None:
    tdfx_command("latency", "net.py:make", "profile.json", *BOTH_INPUTS, "--threads", "2", "-o", "latency.json")
    assert LatencyTable.from_json(Path("latency.json").read_text()).runtime.threads == 2


def test_the_session_is_configured_as_asked_for(profile: Path) -> None:
    entry = ("--session-config", "session.intra_op.allow_spinning=0")
    tdfx_command("latency", "net.py:make", "profile.json", *BOTH_INPUTS, *entry, "-o", "latency.json")
    runtime = LatencyTable.from_json(Path("latency.json").read_text()).runtime
    assert runtime.config == {"session.intra_op.allow_spinning": "0"}
    to_compress = ("compress", "net.py:make", *BOTH_INPUTS, "--budget", "latency=95%", "--out", "out")
    _, stderr = tdfx_command(*to_compress, "--session-config", "spinning", code=2)
    assert "KEY=VALUE" in stderr
    _, stderr = tdfx_command(*to_compress, "--provider", "Fast", code=1)
    assert "provider 'Fast' is not in this ONNX Runtime" in stderr


def test_a_kit_is_run_elsewhere(profile: Path) -> None:
    stdout, _ = tdfx_command("latency-kit", "net.py:make", "profile.json", "kit", *BOTH_INPUTS)
    assert "run python run.py there" in stdout
    python = os.environ.get("TDFX_DEVICE_PYTHON", sys.executable)
    subprocess.run([python, "kit/run.py", "--seconds", "0"], check=True, capture_output=True)
    stdout, _ = tdfx_command("plan", "profile.json", "--latency", "kit/latency.json", "--budget", "params=80%")
    assert "latency is measured" in stdout


def test_a_table_of_another_network_is_refused(profile: Path) -> None:
    tdfx_command("latency", "net.py:make", "profile.json", *BOTH_INPUTS, "-o", "latency.json")
    table = LatencyTable.from_json(Path("latency.json").read_text())
    Path("latency.json").write_text(table.to_json().replace(table.structure, "0" * len(table.structure)))
    _, stderr = tdfx_command("plan", "profile.json", "--latency", "latency.json", "--budget", "params=80%", code=1)
    assert "of another network" in stderr


def test_the_guard_reaches_compress(folder: Path) -> None:
    budget = ("--budget", "latency=95%", "--methods", "spatial_svd")
    stdout, _ = tdfx_command("compress", "net.py:make", *BOTH_INPUTS, *budget, "--out", "out")
    assert "latency is measured" in stdout
    assert "\nmeasured" in stdout


def test_the_estimate_is_fitted(profile: Path) -> None:
    """The model has too few layers; a clear message says so. See tests/latency/test_fit.py for the fit."""
    tdfx_command("latency", "net.py:make", "profile.json", *BOTH_INPUTS, "-o", "latency.json")
    _, stderr = tdfx_command("latency-fit", "profile.json", "latency.json", "-o", "mine.json", code=1)
    assert "layers of different shapes; a fit takes 4 or more" in stderr
    tdfx_command("latency-fit", "profile.json", "latency.json", "-o", "mine.txt", code=2)
