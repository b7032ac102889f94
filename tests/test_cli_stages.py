"""The commands for one stage each, and the files between them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import BOTH_INPUTS, BUDGET, FILES, INPUTS, METHODS, tdfx_command
from safetensors.torch import load_file

import tdfx
from tdfx.decompositions.spatial_svd import SpatialSVD
from tdfx.loading import example_inputs, load_model
from tdfx.passes.base import GraphPass

MODEL = "net.py:make"


def profile(*arguments: str, code: int = 0) -> tuple[str, str]:
    return tdfx_command("profile", MODEL, *BOTH_INPUTS, *METHODS, "-o", "profile.json", *arguments, code=code)


def staged(*options: str) -> None:
    """Profile, plan, apply and export into the folder "staged"."""
    profile()
    tdfx_command("plan", "profile.json", *BUDGET, "-o", "plan.json", *options)
    tdfx_command("apply", MODEL, "plan.json", *BOTH_INPUTS, "--out", "staged")


def test_the_stages_do_what_compress_does(folder: Path) -> None:
    staged()
    assert sorted(path.name for path in Path("staged").iterdir()) == sorted(set(FILES) - {"model.onnx"})
    stdout, _ = tdfx_command("export", "staged")
    assert "ONNX Runtime differs by" in stdout
    tdfx_command("compress", MODEL, *BOTH_INPUTS, *METHODS, *BUDGET, "--out", "whole")
    assert sorted(path.name for path in Path("staged").iterdir()) == FILES
    one, other = (load_file(f"{name}/model.safetensors") for name in ("staged", "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    plans = [Path(name).read_text() for name in ("plan.json", "staged/plan.json", "whole/plan.json")]
    assert tdfx.Plan.from_json(plans[1]) == tdfx.Plan.from_json(plans[2])
    planned, carried_out = (
        [(choice.site, choice.method, choice.rank, choice.cost) for choice in tdfx.Plan.from_json(text).candidates]
        for text in (plans[0], plans[2])
    )
    assert planned == carried_out


def test_the_way_of_capture_goes_from_stage_to_stage(folder: Path) -> None:
    profile("--capture", "inplace")
    tdfx_command("plan", "profile.json", *BUDGET, "-o", "plan.json")
    tdfx_command("apply", MODEL, "plan.json", *BOTH_INPUTS, "--out", "staged")
    report = json.loads(Path("staged/report.json").read_text())
    assert (report["tier"], report["plan"]["capture"]) == ("inplace", "inplace")
    args, kwargs = example_inputs(INPUTS)
    network = tdfx.load("staged", load_model(MODEL)).module
    assert type(network).__name__ == "Net"
    assert network(*args, **kwargs) is not None
    profile("--capture", "python", code=2)


def test_a_profile_comes_back_from_its_file(folder: Path) -> None:
    stdout, _ = profile()
    assert "second" in stdout
    args, kwargs = example_inputs(INPUTS)
    wanted = tdfx.profile(tdfx.capture(load_model(MODEL), args, kwargs), methods=["spatial_svd", "svd"])
    found = tdfx.Profile.from_json(Path("profile.json").read_text())
    assert found == wanted
    assert tdfx.plan(found, "params=60%") == tdfx.plan(wanted, "params=60%")
    lines = Path("profile.json").read_text().splitlines()
    assert sum('"method": "spatial_svd"' in line for line in lines) == sum(
        candidate.method == "spatial_svd" for candidate in wanted.candidates
    )


def test_a_second_profile_decomposes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile("--cache-dir", "cache")
    first = Path("profile.json").read_bytes()
    calls: list[Any] = []
    errors = SpatialSVD.errors

    def counted(*arguments: Any, **options: Any) -> list[float]:
        calls.append(arguments)
        return errors(*arguments, **options)

    monkeypatch.setattr(SpatialSVD, "errors", counted)
    profile("--cache-dir", "cache")
    assert calls == []
    assert Path("profile.json").read_bytes() == first
    profile("--cache-dir", "none")
    assert calls != []


def test_the_cache_is_the_users_own_by_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "users"))
    profile()
    assert any((folder / "users" / "tdfx").iterdir())


def test_a_plan_without_a_file_is_only_printed(folder: Path) -> None:
    profile()
    before = sorted(folder.iterdir())
    stdout, _ = tdfx_command("plan", "profile.json", *BUDGET, "--planner", "greedy")
    assert "whole model after" in stdout
    assert sorted(folder.iterdir()) == before


def test_a_rank_rule_plans_without_a_budget(folder: Path) -> None:
    tdfx_command("profile", MODEL, *BOTH_INPUTS, "--methods", "svd", "--ranks", "ratio=0.25", "-o", "profile.json")
    tdfx_command("plan", "profile.json", "-o", "plan.json")
    assert json.loads(Path("plan.json").read_text())["budget"] == "ranks=ratio=0.25"
    _, stderr = tdfx_command("plan", "profile.json", *BUDGET, code=1)
    assert stderr.startswith("error: found budget")


def test_compress_takes_a_rule_or_a_budget(folder: Path) -> None:
    command = ("compress", MODEL, *BOTH_INPUTS, "--methods", "svd", "--out", "out")
    tdfx_command(*command, "--ranks", "ratio=0.25")
    for options in ((), ("--ranks", "vbmf", *BUDGET)):
        _, stderr = tdfx_command(*command, *options, code=2)
        assert "give exactly one of --budget and --ranks" in " ".join(stderr.split())


def test_an_exported_program_brings_its_inputs(folder: Path) -> None:
    args, kwargs = example_inputs(INPUTS)
    torch.export.save(torch.export.export(load_model(MODEL).eval(), args, kwargs), "net.pt2")
    tdfx_command("compress", "net.pt2", *METHODS, *BUDGET, "--fixed-batch", "--out", "out")
    result = tdfx.load("out")
    assert [(entry.name, entry.shape) for entry in result.report.inputs] == [(None, (2, 4, 8, 8)), ("ids", (2, 3))]
    Path("w.safetensors").touch()
    _, stderr = tdfx_command("profile", "net.pt2", "--weights", "w.safetensors", "-o", "p.json", code=1)
    assert "a .pt2 file holds its own weights; leave weights w.safetensors out" in stderr


def test_a_module_without_inputs_is_a_usage_error(folder: Path) -> None:
    _, stderr = tdfx_command("profile", MODEL, "-o", "profile.json", code=2)
    assert "give the shapes that net.py:make takes" in " ".join(stderr.replace("│", " ").split())


def test_inspect_shows_what_a_file_is(folder: Path) -> None:
    staged()
    plan = tdfx.Plan.from_json(Path("plan.json").read_text())
    assert tdfx_command("inspect", "plan.json")[0] == f"{plan}\n"
    assert tdfx_command("inspect", "profile.json")[0] == f"{tdfx.Profile.from_json(Path('profile.json').read_text())}\n"
    report = tdfx_command("inspect", "staged/report.json")[0]
    assert "FLOPs" in report
    assert tdfx_command("inspect", "staged")[0] == report


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "other.json is no JSON"),
        ("[]", "other.json is a JSON list; expected an object"),
        ('{"name": 1}', "other.json has the fields name; expected a plan, profile, report or latency table"),
        ('{"version": 1, "candidates": []}', "other.json: "),
    ],
)
def test_inspect_refuses_other_files(folder: Path, content: str, message: str) -> None:
    Path("other.json").write_text(content)
    stdout, stderr = tdfx_command("inspect", "other.json", code=1)
    assert stdout == ""
    assert message in stderr


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_profiles_and_plans_are_refused(folder: Path, share: float) -> None:
    staged()
    for name, command in (
        ("profile.json", ("plan", "profile.json", *BUDGET)),
        ("plan.json", ("apply", MODEL, "plan.json", *BOTH_INPUTS, "--out", "out")),
    ):
        content = Path(name).read_text()
        Path(name).write_text(content[: int(share * len(content))])
        _, stderr = tdfx_command(*command, code=1)
        assert stderr.startswith(f"error: {name}: ")
        assert not Path("out").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"version": 1', '"version": 99', "version 99"),
        ('"kind": "conv2d"', '"kind": "conv9d"', "conv9d"),
        ('"seed": 0', '"seed": -1', "seed"),
        ('"metric": "weight:relative",', '"metrik": "weight:relative",', "metrik"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(folder: Path, old: str, new: str, message: str) -> None:
    profile()
    text = Path("profile.json").read_text()
    assert old in text
    Path("profile.json").write_text(text.replace(old, new, 1))
    _, stderr = tdfx_command("plan", "profile.json", *BUDGET, code=1)
    assert stderr.startswith("error: profile.json: ")
    assert message in stderr


def test_passes_are_listed_with_their_kind(folder: Path) -> None:
    stdout, _ = tdfx_command("passes")
    rows = {line.split()[0]: line for line in stdout.splitlines()[2:]}
    assert {"FoldBatchNorm", "FindSites", "Factorize", "LiftLayers", "VerifyChains"} <= rows.keys()
    assert "rewrite" in rows["Factorize"]
    assert "analysis" in rows["FindSites"]
    assert rows.keys().isdisjoint({GraphPass.__name__, "RewritePass", "AnalysisPass"})


def test_export_of_what_was_not_saved_is_refused(folder: Path) -> None:
    _, stderr = tdfx_command("export", "nowhere", code=1)
    assert stderr.startswith("error: ")
    assert "nowhere" in stderr
