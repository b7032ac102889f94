"""Fixtures of tests of stages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from timed_networks import measured_once, simulate
from torch import Tensor

from tdfx.passes.calibrate import AccumulateMoments
from tdfx.records.latency import LatencyTable, Measured, Runtime
from tdfx.records.result import Result
from tdfx.stages import guard as guard_stage


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Inputs of every batch that is run through a network."""
    found: list[Tensor] = []
    original = AccumulateMoments.apply

    def apply(self: AccumulateMoments, graph_module: Any) -> None:
        found.append(self.inputs[0])
        original(self, graph_module)

    monkeypatch.setattr(AccumulateMoments, "apply", apply)
    return found


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[bytes | str]:
    """What a machine of the tests' own has run."""
    return simulate(monkeypatch)


@pytest.fixture
def table() -> LatencyTable:
    return measured_once()


@pytest.fixture
def ratios(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """How the next networks' times compare with what was predicted."""
    factors: list[float] = []

    def timed(captured: object, original: Path, result: Result, runtime: Runtime) -> Measured:
        before, after = result.plan.before.latency_s, result.plan.after.latency_s
        assert before is not None and after is not None
        factor = factors.pop(0)
        return guard_stage.measured_of([before] * 5, [factor * after] * 5, result.plan, runtime)

    monkeypatch.setattr(guard_stage, "time_against_original", timed)
    yield factors
    assert not factors
