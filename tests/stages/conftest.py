"""Fixtures of tests of stages."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from tdfx.passes.calibrate import AccumulateMoments


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
