"""Members of the benchmark's zoo that need no other library, and what the rows say of them."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from zoo import problems
from zoo_examine import Row, examine
from zoo_models import Case, Factory, build, family

MEMBERS = (
    "vae", "keyword_spotter", "slowfast", "recommender", "generator", "discriminator", "siamese", "vocoder", "pointnet",
    "super_resolution", "detector", "graph",
)  # fmt: skip


def row_of(factory: Factory) -> Row:
    return examine("member", partial(build, factory))


@pytest.mark.parametrize("name", MEMBERS)
def test_member(name: str) -> None:
    row = row_of(family("handwritten")[name])
    assert problems(row) == []
    assert row.coverage is not None and row.coverage >= 0.99
    assert row.full_rank is not None and row.full_rank <= 1e-5
    assert row.parity is not None and row.parity <= 1e-4


class Vanishing(nn.Module):
    """A layer whose outputs are lost in rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.kept, self.lost = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.kept(x) + 1e-9 * self.lost(x)


class FailingAtOnce(nn.Module):
    """A network that does not run."""

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no")


def test_a_factor_that_does_not_count_in_the_outputs_is_named() -> None:
    row = row_of(lambda: Case(Vanishing(), (torch.randn(2, 32),)))
    assert row.unmoved == ("lost",)
    assert any("lost" in problem for problem in problems(row))


def test_a_crash_is_a_row() -> None:
    row = row_of(lambda: Case(FailingAtOnce(), (torch.randn(2, 4),)))
    assert row.tier == ""
    assert row.failed == "build: ValueError: no"


def test_weights_behind_functions_are_missed_in_the_coverage() -> None:
    row = examine("hidden", partial(build, family("handwritten")["weight_standardized"]))
    assert row.coverage is not None and row.coverage < 0.01
    assert any("sees only 0.0%" in problem for problem in problems(row))


def test_parameters_that_start_constant_are_drawn() -> None:
    case = build(lambda: Case(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), (torch.randn(2, 4),)))
    for parameter in case.model.parameters():
        assert parameter.std() > 0 and math.isfinite(parameter.std())
    assert not case.model.training
