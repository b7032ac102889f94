"""Fixtures of tests of stages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from timed_networks import Machine, measured_once, simulate
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
def machine(timed: list[bytes | str], monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Times networks: all layers take ``pace`` times what the table says, chains ``chain`` times that."""
    found = Machine()
    table = {(row.site, row.method, tuple(row.rank)): row.latency_s for row in measured_once().rows}
    whole_s = measured_once().network_s
    rest_s = whole_s - sum(seconds for (_, _, rank), seconds in table.items() if not rank)

    def time(captured: object, original: Path, result: Result, runtime: Runtime) -> Measured:
        chosen = [(table[c.site, c.method, c.rank], c.is_dense) for c in result.plan.candidates]
        after_s = rest_s + sum(seconds * (1 if is_dense else found.chain) for seconds, is_dense in chosen)
        found.plans += 1
        return guard_stage.measured_of([found.pace * whole_s] * 5, [found.pace * after_s] * 5, result.plan, runtime)

    monkeypatch.setattr(guard_stage, "time_against_original", time)
    monkeypatch.setattr(guard_stage, "original_file", nullcontext)
    return found


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
    monkeypatch.setattr(guard_stage, "original_file", nullcontext)
    yield factors
    assert not factors
