"""The command that draws a network."""

from __future__ import annotations

from pathlib import Path

from commands import BOTH_INPUTS, BUDGET, METHODS, tdfx_command

NET = ["net.py:make", *BOTH_INPUTS]


def test_graph_draws_a_model_and_a_plan(folder: Path) -> None:
    stdout, _ = tdfx_command("graph", *NET, "-o", "plain.dot")
    assert "Net: 4 layers (4 dense), 0 skipped" in stdout and "critical path" in stdout
    assert "plain.dot: the picture" in stdout
    tdfx_command("profile", *NET, *METHODS, "--trainable", "-o", "profile.json")
    tdfx_command("plan", "profile.json", *BUDGET, "-o", "plan.json")
    stdout, _ = tdfx_command("graph", *NET, "--plan", "plan.json", "-o", "made.svg")
    assert "Net: 4 layers (" in stdout and "spatial_svd" in stdout
    text = Path("made.svg").read_text()
    assert "spatial_svd" in text and "second" in text
    assert "spatial_svd" not in Path("plain.dot").read_text()


def test_graph_stops_before_it_captures(folder: Path) -> None:
    _, stderr = tdfx_command("graph", "none.py:make", "--input", "1x3", "-o", "net.pdf", code=1)
    assert "expected a name that ends in .dot, .svg, .png" in stderr
    _, stderr = tdfx_command("graph", *NET, "--plan", "none.json", "-o", "net.dot", code=1)
    assert "cannot read none.json" in stderr
    assert not Path("net.dot").exists()


SHARED = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.again = self.first

    def forward(self, x):
        return self.again(self.first(x).relu())
"""


def test_a_plan_is_drawn_in_the_way_it_was_captured(folder: Path) -> None:
    Path("two.py").write_text(SHARED)
    given = ("two.py:Two", "--input", "2x64")
    tdfx_command("profile", *given, "--capture", "export", "--methods", "svd", "--trainable", "-o", "profile.json")
    tdfx_command("plan", "profile.json", "--budget", "flops=60%", "-o", "plan.json")
    for options in ((), ("--capture", "export")):
        stdout, _ = tdfx_command("graph", *given, "--plan", "plan.json", "-o", "two.dot", *options)
        assert "(1 svd)" in stdout
    _, stderr = tdfx_command("graph", *given, "--plan", "plan.json", "-o", "two.dot", "--capture", "fx", code=1)
    assert "the plan names again" in stderr
