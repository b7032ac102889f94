"""The commands that show curves."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import tdfx_command

import tdfx
from tdfx.cli.curves import load_evaluate
from tdfx.errors import InputError
from tdfx.records.frontier import COLUMNS
from tdfx.stages.sensitivity import sensitivity, to_csv

SOURCE = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16))

def score(network):
    with open("calls", "a") as file:
        file.write("x")
    return -network(torch.ones(1, 24)).norm().item()

def bad(network): return None
half = 0.5
"""
NET = ["frontier", "mlp.py:make", "--input", "4x24", "--rank-multiple", "1", "--target", "none", "--methods", "svd"]


@pytest.fixture
def here(folder: Path) -> Path:
    Path("mlp.py").write_text(SOURCE)
    return folder


def rows(path: str) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_frontier_writes_the_curve(here: Path) -> None:
    stdout, _ = tdfx_command(*NET, "--out", "curve.csv", "--png", "curve.png", "--points", "3")
    found = rows("curve.csv")
    assert tuple(found[0]) == COLUMNS and len(found) == 3
    assert found[-1]["share"] == "1.0" and found[-1]["score"] == ""
    assert Path("curve.png").read_bytes().startswith(b"\x89PNG")
    assert "curve.csv, curve.png" in stdout and "weight:relative" in stdout


def test_frontier_measures_with_a_function_and_keeps_the_scores(here: Path) -> None:
    options = [*NET, "--out", "curve.csv", "--points", "3", "--evaluate", "mlp.py:score", "--resource", "params"]
    stdout, _ = tdfx_command(*options)
    first = rows("curve.csv")
    assert all(float(row["score"]) < 0 for row in first)
    assert "score" in stdout
    assert Path("calls").read_text() == "xxxx"
    tdfx_command(*options)
    assert rows("curve.csv") == first
    assert Path("calls").read_text() == "xxxx"
    tdfx_command(*options, "--cache-dir", "none")
    assert Path("calls").read_text() == "xxxxxxxx"


@pytest.mark.parametrize(("metric", "named"), [(None, "of loss"), ("feature:absolute", "of feature:absolute")])
def test_frontier_takes_data(here: Path, metric: str | None, named: str) -> None:
    np.save("x.npy", torch.randn(64, 24, generator=torch.Generator().manual_seed(0)).numpy())
    options = [] if metric is None else ["--metric", metric]
    arguments = [*NET, "--out", "c.csv", "--points", "2", "--data", "x.npy", "--evaluate", "mlp.py:score", *options]
    stdout, _ = tdfx_command(*arguments)
    assert named in stdout
    assert float(rows("c.csv")[0]["error"]) > 0


def test_frontier_leaves_no_file_where_it_fails(here: Path) -> None:
    _, stderr = tdfx_command(*NET, "--out", "curve.csv", "--evaluate", "mlp.py:bad", code=1)
    assert "evaluate returned None" in stderr
    assert not Path("curve.csv").exists()


def test_frontier_without_matplotlib_stops_first(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    _, stderr = tdfx_command(*NET, "--out", "curve.csv", "--png", "c.png", "--evaluate", "mlp.py:score", code=1)
    assert "pip install tdfx[plots]" in stderr
    assert not Path("calls").exists() and not Path("curve.csv").exists()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("score", "with a colon"),
        ("mlp.py:", "with a colon"),
        ("none.py:score", "evaluate 'none.py:score': there is no file none.py"),
        ("mlp.py:scores", "has no 'scores'; did you mean 'score'"),
        ("mlp.py:half", "found a float; expected a function"),
    ],
)
def test_functions_that_are_none(name: str, found: str, here: Path) -> None:
    with pytest.raises(InputError, match=found):
        load_evaluate(name)


def test_sensitivity_shows_a_profile(here: Path) -> None:
    tdfx_command("profile", *NET[1:], "--out", "profile.json")
    arguments = ["--csv", "s.csv", "--png", "s.png", "--resource", "params"]
    stdout, _ = tdfx_command("sensitivity", "profile.json", *arguments)
    records = sensitivity(tdfx.Profile.from_json(Path("profile.json").read_text()), "params")
    assert Path("s.csv").read_text() == to_csv(records)
    assert Path("s.png").read_bytes().startswith(b"\x89PNG")
    assert all(f"\n{record.site} " in stdout for record in records)
    assert "of a layer's params" in stdout


def test_sensitivity_refuses_other_resources_and_files(here: Path) -> None:
    tdfx_command("profile", *NET[1:], "--out", "profile.json")
    _, stderr = tdfx_command("sensitivity", "profile.json", "--resource", "time", code=1)
    assert "resource: unknown resource 'time'" in stderr
    _, stderr = tdfx_command("sensitivity", "none.json", code=1)
    assert "cannot read none.json" in stderr
