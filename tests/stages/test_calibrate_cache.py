"""Moments kept on disk: what is computed again, and how interrupted runs go on."""

# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
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
    assert not list(tmp_path.glob("partial-*"))
    age(tmp_path)
    calibrate(captured(), parts, cache_dir=tmp_path)  # whatever runs next
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"moments"}


def age(folder: Path, days: float = 8) -> None:
    """As if nothing had happened there since."""
    then = time.time() - days * 86400
    for path in folder.iterdir():
        os.utime(path, (then, then))


def killed(folder: Path, parts: list[Tensor]) -> None:
    """Leaves what a run that is killed at the third batch leaves."""
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(stage, "CHECKPOINT_S", 0.0)
        patched.setattr("shutil.rmtree", lambda *args, **kwargs: None)
        calibrate(captured(), broken_off(parts, 3), cache_dir=folder)


@pytest.mark.parametrize(("days", "left"), [(6.9, {"moments", "batches", "partial", ".tdfx"}), (7.1, {"moments"})])
def test_leftovers_of_killed_runs_go_when_nobody_comes_back(days: float, left: set[str], tmp_path: Path) -> None:
    parts = list(images().split(2))  # type: ignore[no-untyped-call]
    killed(tmp_path, parts)
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"batches", "partial", ".tdfx"}
    age(tmp_path, days)
    calibrate(captured(), iter(parts[::-1]), cache_dir=tmp_path)  # shuffled: of another key
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == left


def test_a_killed_run_goes_on_after_months(tmp_path: Path, runs: list[Tensor]) -> None:
    parts = list(images().split(2))  # type: ignore[no-untyped-call]
    killed(tmp_path, parts)
    age(tmp_path, 100)
    calibrate(captured(), iter(parts), cache_dir=tmp_path)
    assert len(runs) == len(parts)


def test_the_same_run_beside_it_does_no_harm(tmp_path: Path) -> None:
    """Both have the same key; the one that ends first removes its own batches alone."""
    parts = list(images().split(2))  # type: ignore[no-untyped-call]

    def loader() -> Iterator[Tensor]:
        yield from parts[:4]
        calibrate(captured(), iter(parts), memory_limit=LIMIT, cache_dir=tmp_path)
        yield parts[4] + 1  # otherwise the other's moments would be taken

    found = calibrate(captured(), loader(), memory_limit=LIMIT, cache_dir=tmp_path)
    assert_same(found, calibrate(captured(), [*parts[:4], parts[4] + 1], memory_limit=LIMIT))


def test_a_run_that_only_reads_its_batches_again_shows_that_it_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "CHECKPOINT_S", 0.0)
    parts = list(images().split(2))  # type: ignore[no-untyped-call]
    ages: list[float] = []

    def report(description: str, done: int, total: int) -> None:
        (kept,) = tmp_path.glob("batches-*")
        ages.append(time.time() - kept.stat().st_mtime)
        age(tmp_path, 8)

    calibrate(captured(), iter(parts), memory_limit=LIMIT, cache_dir=tmp_path, progress=report)
    assert len(ages) == 15 and max(ages) < 86400
