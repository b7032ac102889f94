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
