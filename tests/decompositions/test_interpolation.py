"""Errors at many ranks from a few: where they are exact, and how near they are between."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tdfx.decompositions import registry
from tdfx.decompositions.base import KNOTS, norm_in
from tdfx.decompositions.interpolation import from_knots
from tdfx.records.layer import LayerSpec, Rank, Site
from tests.decompositions.test_oracles import trained_like

RANKS = [(r,) for r in range(1, 41)]


def power(rank: Rank) -> float:
    return 3.0 * rank[0] ** -0.7


def test_a_power_of_the_guess_is_met_exactly_from_few_computed() -> None:
    asked: list[Rank] = []

    def error(rank: Rank) -> float:
        asked.append(rank)
        return power(rank)

    found = from_knots(error, RANKS, [1 / r for (r,) in RANKS], 5)
    np.testing.assert_allclose(found, [power(rank) for rank in RANKS], rtol=1e-12)
    assert len(asked) == len(set(asked)) == 5
    assert {(1,), (40,)} <= set(asked)


def test_errors_between_knots_are_between_those_of_the_knots() -> None:
    steps = {1: 5.0, 40: 1.0}
    found = from_knots(lambda rank: steps.get(rank[0], 2.0), RANKS, [1 / r for (r,) in RANKS], 4)
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == (5.0, 1.0)


@pytest.mark.parametrize("guesses", [[1.0] * 40, [0.0] * 40])
def test_equal_guesses_take_one_error(guesses: list[float]) -> None:
    asked: list[Rank] = []
    found = from_knots(lambda rank: asked.append(rank) or 2.0, RANKS, guesses, 5)  # type: ignore[func-returns-value]
    assert found == [2.0] * 40
    assert asked == [(1,)]


def test_errors_of_zero_stay_zero_and_the_others_finite() -> None:
    assert from_knots(lambda rank: 0.0, RANKS, [1 / r for (r,) in RANKS], 5) == [0.0] * 40
    found = from_knots(lambda rank: max(0.0, 1 - rank[0] / 40), RANKS, [1 / r for (r,) in RANKS], 5)
    assert found[-1] == 0.0
    assert all(0 < error <= 1 for error in found[:-1])


@pytest.mark.parametrize("name", ["cp", "cp4", "tucker2", "tt"])
def test_errors_are_near_those_of_the_factors_at_every_rank(name: str) -> None:
    method, weight = registry()[name], trained_like(24, 16, 3, 3)
    site = Site.of(
        LayerSpec("conv", "conv2d", 16, 24, (3, 3), (1, 1), (1, 1), dilation=(1, 1)).called_on(((1, 16, 8, 8),))
    )
    ranks = method.shortlist(site, weight, method.ranks(site))
    assert len(ranks) > KNOTS
    actual = [norm_in(None, weight - method.reconstruct(method.decompose(weight, rank))) for rank in ranks]
    ratio = np.array(method.errors(weight, ranks)) / actual
    assert np.abs(np.log(ratio)).mean() < 0.05
    assert np.sum(np.abs(ratio - 1) < 1e-9) >= KNOTS - 1  # two knots may fall on one rank
    assert torch.isfinite(torch.tensor(ratio)).all()
