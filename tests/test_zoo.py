"""Members of the benchmark's zoo that need no other library, and what the rows say of them."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import problems
from zoo_examine import Row, examine
from zoo_models import Case, Factory, build, family

MEMBERS = (
    "vae", "keyword_spotter", "slowfast", "recommender", "generator", "discriminator", "siamese",
    "weight_standardized", "vocoder", "pointnet",
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


class Generated(nn.Module):
    """A convolution whose weight depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Linear(4, 4 * 4 * 9)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight(x.mean((0, 2, 3))).view(4, 4, 3, 3))


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


def test_a_weight_that_comes_from_the_input_is_missed_in_the_coverage() -> None:
    row = row_of(lambda: Case(Generated(), (torch.randn(2, 4, 8, 8),)))
    assert row.coverage is not None and row.coverage < 0.5
    assert any("sees only" in problem for problem in problems(row))


def test_parameters_that_start_constant_are_drawn() -> None:
    case = build(lambda: Case(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), (torch.randn(2, 4),)))
    for parameter in case.model.parameters():
        assert 0 < float(parameter.detach().std()) < math.inf
    assert not case.model.training
