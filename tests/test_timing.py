from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tdfx import timing


def test_files_take_turns_and_medians_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []

    class Session:
        def __init__(self, file: Path, threads: int) -> None:
            self.file, self.runs, self.threads = file, 0, threads

        def get_inputs(self) -> list[SimpleNamespace]:
            return [SimpleNamespace(name="a"), SimpleNamespace(name="b")]

        def run(self, outputs: None, feed: dict[str, Any]) -> None:
            assert {name: value.shape for name, value in feed.items()} == {"a": (1,), "b": (2,)}
            assert self.threads == 1
            order.append(self.file.name)
            self.runs += 1
            slow_start = self.runs <= timing.WARM_UP
            clock[0] += 100.0 if slow_start or self.runs == timing.WARM_UP + 1 else float(self.file.name)

    monkeypatch.setattr(timing, "open_session", Session)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    inputs = [np.zeros(1), np.zeros(2)]
    assert timing.interleaved_medians([Path("2"), Path("3")], inputs, rounds=5) == (2.0, 3.0)
    assert len(order) == 2 * (timing.WARM_UP + 5)
    rounds = {tuple(order[at : at + 2]) for at in range(0, len(order), 2)}
    assert rounds == {("2", "3"), ("3", "2")}
