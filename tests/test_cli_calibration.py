"""``--data``, ``--moments`` and ``--tune``: the same networks as from Python, and what is said when they do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import tdfx_command
from safetensors.torch import load_file

import tdfx
from tdfx.loading import load_model
from tdfx.moments import Moments

SOURCE = """
import torch
from torch import nn

def classifier():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(864, 10)
    )
"""
MODEL = ("data.py:classifier", "--input", "2x3x8x8")
OPTIONS = ("--methods", "svd,spatial_svd", "--target", "none", "--rank-multiple", "1")


@pytest.fixture
def images(folder: Path) -> Path:
    """The current folder with a model and 32 images for it."""
    Path("data.py").write_text(SOURCE)
    noise = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.3
    np.save("images.npy", noise.numpy())
    return folder


def test_the_stages_with_data_do_what_compress_does(images: Path) -> None:
    data = ("--data", "images.npy")
    tdfx_command("compress", *MODEL, *OPTIONS, *data, "--budget", "params=40%", "--out", "whole")
    stdout, _ = tdfx_command("profile", *MODEL, *OPTIONS, *data, "-o", "staged/profile.json")
    assert "tdfx apply takes them as --moments" in stdout
    assert Moments.load("staged/moments.safetensors").samples == 32
    tdfx_command("plan", "staged/profile.json", "--budget", "params=40%", "-o", "plan.json")
    tdfx_command(
        "apply", *MODEL[:1], "plan.json", *MODEL[1:], "--moments", "staged/moments.safetensors", "--out", "one"
    )
    tdfx_command("apply", *MODEL[:1], "plan.json", *MODEL[1:], *data, "--out", "other")
    whole, one, other = (load_file(f"{name}/model.safetensors") for name in ("whole", "one", "other"))
    assert whole.keys() == one.keys() == other.keys()
    assert all(torch.equal(whole[name], one[name]) and torch.equal(one[name], other[name]) for name in whole)
    assert tdfx.Plan.from_json(Path("plan.json").read_text()).metric == "loss"


def test_a_plan_made_with_data_is_not_carried_out_without(images: Path) -> None:
    tdfx_command("profile", *MODEL, *OPTIONS, "--data", "images.npy", "--samples", "8", "-o", "profile.json")
    tdfx_command("plan", "profile.json", "--budget", "params=40%", "-o", "plan.json")
    _, stderr = tdfx_command("apply", *MODEL[:1], "plan.json", *MODEL[1:], "--out", "out", code=1)
    assert "the plan was made with calibration moments" in stderr
    _, stderr = tdfx_command(
        "apply", *MODEL[:1], "plan.json", *MODEL[1:], "--data", "images.npy", "--out", "out", code=1
    )
    assert "made with other moments" in stderr  # of 32 samples, not 8
    assert not Path("out").exists()


def test_a_metric_by_name(images: Path) -> None:
    options = ("--metric", "feature", "--output", "values", "--data", "images.npy", "--budget", "params=40%")
    tdfx_command("compress", *MODEL, *OPTIONS, *options, "--out", "out")
    plan = tdfx.Plan.from_json(Path("out/plan.json").read_text())
    assert plan.metric == "feature:relative" and plan.corrected


def test_tuning(images: Path) -> None:
    common = (*MODEL, *OPTIONS, "--data", "images.npy", "--budget", "params=40%")
    stdout, _ = tdfx_command("compress", *common, "--tune", "0.02", "--out", "out")
    assert "held" in stdout
    assert "model.onnx" in {path.name for path in Path("out").iterdir()}


def test_tuning_takes_data(images: Path) -> None:
    _, stderr = tdfx_command("compress", *MODEL, "--budget", "params=40%", "--tune", "1", "--out", "out", code=2)
    assert "--data" in stderr


def test_data_that_cannot_be_read(images: Path) -> None:
    _, stderr = tdfx_command(
        "compress", *MODEL, *OPTIONS, "--data", "no.npy", "--budget", "params=40%", "--out", "out", code=1
    )
    assert "no.npy" in stderr
    assert not Path("out").exists()


def test_numbers_by_channel(images: Path) -> None:
    _, stderr = tdfx_command(
        "compress", *MODEL, "--data", "images.npy", "--mean", "a,b", "--budget", "params=40%", "--out", "out", code=2
    )
    assert "a,b" in stderr


def test_accuracy_as_the_budget(images: Path) -> None:
    Path("score.py").write_text(
        "import torch\nx = torch.load('images.pt')\n"
        "def agreement(module):\n    return float((module(x).argmax(1) == torch.load('wanted.pt')).float().mean())\n"
    )
    x = torch.from_numpy(np.load("images.npy"))
    torch.save(x, "images.pt")
    torch.save(tdfx.capture(load_model("data.py:classifier"), x[:2]).module(x).argmax(1), "wanted.pt")
    options = ("--budget", "drop=10%", "--evaluate", "score.py:agreement", "--minimize", "params")
    stdout, _ = tdfx_command("compress", *MODEL, *OPTIONS, "--data", "images.npy", *options, "--out", "out")
    assert "drop=10%" in stdout
    assert tdfx.Report.from_json(Path("out/report.json").read_text()).after.params < 80_000
