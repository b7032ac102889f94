"""Moments kept on disk: what is computed again, and how interrupted runs go on."""

# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import LIMIT, assert_same, captured, cross_entropies, images, network
from torch import Tensor, nn

import tdfx.stages.calibrate as stage
from tdfx.records.capture import Capture
from tdfx.stages.calibrate import calibrate
from tdfx.stages.capture import capture


def test_a_second_run_computes_nothing(tmp_path: Path, runs: list[Tensor]) -> None:
    first = calibrate(captured(), images(), cache_dir=tmp_path)
    count = len(runs)
    again = calibrate(captured(), images(), cache_dir=tmp_path)
    assert len(runs) == count == 1
    assert_same(again, first)
    assert [path.name.partition("-")[0] for path in tmp_path.iterdir()] == ["moments"]
    assert_same(calibrate(captured(), images()), first)


def changed_network() -> Capture:
    model = network()
    with torch.no_grad():
        model[6].weight[0, 0] += 1e-3
    return capture(model, images(2))


@pytest.mark.parametrize(
    "change",
    [
        {"data": images(11)},
        {"data": images() * 1.001},
        {"data": (images(), torch.arange(10) % 5), "loss": nn.CrossEntropyLoss(reduction="sum")},
        {"captured": changed_network()},
        {"seed": 1},
        {"samples": 9},
        {"output": "values"},
        {"metric": "feature"},
    ],
    ids=lambda change: "-".join(change),
)
def test_other_data_models_and_options_are_computed(change: dict[str, Any], tmp_path: Path, runs: list[Tensor]) -> None:
    calibrate(captured(), images(), cache_dir=tmp_path)
    count = len(runs)
    options = {"captured": captured(), "data": images(), **change}
    found = calibrate(**options, cache_dir=tmp_path)
    assert len(runs) > count
    assert_same(found, calibrate(**options))


def test_moments_of_own_losses_are_not_kept(tmp_path: Path, runs: list[Tensor]) -> None:
    labels = torch.arange(10) % 5
    losses = (cross_entropies, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.5))
    for loss in losses:  # a module's attributes and a function's globals do not show from outside
        calibrate(captured(), (images(), labels), loss=loss, cache_dir=tmp_path)
    assert len(runs) == 3
    assert not list(tmp_path.iterdir())


def test_loaders_are_known_by_all_their_batches(tmp_path: Path, runs: list[Tensor]) -> None:
    parts = list(images().split(3))  # type: ignore[no-untyped-call]
    first = calibrate(captured(), iter(parts), cache_dir=tmp_path)
    assert len(runs) == 4
    assert_same(calibrate(captured(), iter(parts), cache_dir=tmp_path), first)
    assert len(runs) == 4
    found = calibrate(captured(), iter(parts[:3]), cache_dir=tmp_path)
    assert len(runs) == 7
    assert_same(found, calibrate(captured(), parts[:3]))
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"moments"}


def broken_off(parts: list[Tensor], after: int) -> Iterator[Tensor]:
    yield from parts[:after]
    raise KeyboardInterrupt


@pytest.mark.parametrize("later_change", [False, True])
def test_an_interrupted_run_goes_on_if_the_data_is_the_same(
    later_change: bool, tmp_path: Path, runs: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "CHECKPOINT_S", 0.0)
    parts = list(images().split(2))  # type: ignore[no-untyped-call]
    with pytest.raises(KeyboardInterrupt):
        calibrate(captured(), broken_off(parts, 3), cache_dir=tmp_path)
    assert len(runs) == 3
    if later_change:  # as a loader that shuffles may
        parts[1], parts[3] = parts[3], parts[1]
    found = calibrate(captured(), iter(parts), cache_dir=tmp_path)
    assert len(runs) == 3 + (5 if later_change else 2)
    assert_same(found, calibrate(captured(), parts))
    assert [path.name.partition("-")[0] for path in tmp_path.iterdir()] == ["moments"]


def test_checkpoints_that_cannot_be_read_are_made_anew(
    tmp_path: Path, runs: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "CHECKPOINT_S", 0.0)
    parts = list(images().split(2))  # type: ignore[no-untyped-call]
    with pytest.raises(KeyboardInterrupt):
        calibrate(captured(), broken_off(parts, 3), cache_dir=tmp_path)
    for path in tmp_path.glob("partial-*"):
        path.write_bytes(b"no tensors")
    found = calibrate(captured(), iter(parts), cache_dir=tmp_path)
    assert len(runs) == 3 + 5
    next(tmp_path.iterdir()).write_bytes(b"no tensors")
    assert_same(calibrate(captured(), iter(parts), cache_dir=tmp_path), found)


KILLED = """
import importlib.util, os, signal, sys
sys.path[:0] = {path!r}
import tdfx.stages.calibrate as stage
from tdfx.passes.calibrate import AccumulateMoments

spec = importlib.util.spec_from_file_location("tests_of_calibrate", {file!r})
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
original, left = AccumulateMoments.apply, [{runs}]

def apply(self, graph_module):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    original(self, graph_module)

AccumulateMoments.apply = apply
stage.CHECKPOINT_S = 0.0
parts = list(tests.images().split(2))
stage.calibrate(tests.captured(), {data}, output="values", memory_limit={limit}, cache_dir={folder!r})
"""


@pytest.mark.parametrize(("data", "done"), [("iter(parts)", 3), ("parts", 12)])  # of 5 batches in each of 3 sweeps
def test_a_killed_run_goes_on(
    data: str, done: int, tmp_path: Path, runs: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = KILLED.format(path=sys.path, file=__file__, runs=done, data=data, limit=LIMIT, folder=str(tmp_path))
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    monkeypatch.setattr(stage, "CHECKPOINT_S", 0.0)
    parts = list(images().split(2))  # type: ignore[no-untyped-call]
    given = iter(parts) if data != "parts" else parts
    found = calibrate(captured(), given, output="values", memory_limit=LIMIT, cache_dir=tmp_path)
    assert len(runs) == 15 - done
    assert_same(found, calibrate(captured(), parts, output="values", memory_limit=LIMIT))
    assert [path.name.partition("-")[0] for path in tmp_path.iterdir()] == ["moments"]
