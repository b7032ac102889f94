"""What every planner must hold to, within one limit; a new planner is tested here unasked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdfx.errors import OptionError
from tdfx.planner import FloatArray, Infeasible, IntArray, Planner, find_planner, greedy, knapsack, planners

each_planner = pytest.mark.parametrize("solve", planners().values(), ids=planners().keys())

Sites = Sequence[Sequence[tuple[float, int]]]
CANDIDATES = st.tuples(st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1e-9]), st.integers(0, 12))
SITES = st.lists(st.lists(CANDIDATES, min_size=1, max_size=5), min_size=1, max_size=4)


def arrays(sites: Sites) -> tuple[list[FloatArray], list[IntArray]]:
    """Values and costs of sites that are lists of (value, cost)."""
    values = [np.array([value for value, _ in site]) for site in sites]
    return values, [np.array([[cost] for _, cost in site]) for site in sites]


def totals(sites: Sites, chosen: Sequence[int]) -> tuple[float, int]:
    picked = [site[index] for site, index in zip(sites, chosen, strict=True)]
    return sum(value for value, _ in picked), sum(cost for _, cost in picked)


def every_choice(sites: Sites) -> list[tuple[float, int]]:
    return [totals(sites, chosen) for chosen in itertools.product(*(range(len(site)) for site in sites))]


@each_planner
@settings(deadline=None, derandomize=True)
@given(sites=SITES, limit=st.integers(0, 40), scale=st.sampled_from([1, 10**9]))
def test_against_all_choices(solve: Planner, sites: Sites, limit: int, scale: int) -> None:
    sites, limit = [[(value, cost * scale) for value, cost in site] for site in sites], limit * scale
    values, costs = arrays(sites)
    fitting = [value for value, cost in every_choice(sites) if cost <= limit]
    least = min(cost for _, cost in every_choice(sites))
    if not fitting:
        with pytest.raises(Infeasible) as caught:
            solve(values, costs, np.array([limit]))
        assert caught.value.least == [least]
        factor = caught.value.scale
        assert factor == math.inf if limit == 0 else factor == pytest.approx(least / limit, rel=1e-6)
        assert limit == 0 or math.floor(Fraction(factor) * limit) >= least
        return
    chosen = solve(values, costs, np.array([limit]))
    value, cost = totals(sites, chosen)
    assert cost <= limit
    assert value >= min(fitting)
    assert solve(values, costs, np.array([limit])) == chosen
    for site, index in zip(sites, chosen, strict=True):
        for other_value, other_cost in site:
            assert other_value >= site[index][0] or cost - site[index][1] + other_cost > limit


@each_planner
def test_with_room_for_all_the_least_values_are_taken(solve: Planner) -> None:
    values, costs = arrays([[(2, 1), (1, 2), (1, 2)], [(1, 3), (1, 3)], [(0, 5), (0, 3)]])
    assert solve(values, costs, np.array([100])) == [1, 0, 1]
    assert solve([], [], np.array([1])) == []


@each_planner
def test_one_unit_decides(solve: Planner) -> None:
    values, costs = arrays([[(0.0, 10**12 + 1), (1.0, 10**12)]] * 2)
    assert solve(values, costs, np.array([2 * 10**12 + 2])) == [0, 0]
    assert sorted(solve(values, costs, np.array([2 * 10**12 + 1]))) == [0, 1]
    assert solve(values, costs, np.array([2 * 10**12])) == [1, 1]


@each_planner
@pytest.mark.parametrize(
    ("value", "cost", "limit", "message"),
    [
        ([1.0, math.nan], [[1], [2]], [1], "site 1: values must be finite"),
        ([1.0, math.inf], [[1], [2]], [1], "site 1: values must be finite"),
        ([1.0, -1.0], [[1], [2]], [1], "site 1: values must be finite and >= 0"),
        ([1.0, 1.0], [[1], [-2]], [1], "site 1: costs must be >= 0"),
        ([1.0, 1.0], [[1], [2]], [-1], "limits"),
        ([1.0, 1.0], [[1], [2]], [[1]], "limits"),
        ([1.0, 1.0], [[1], [2], [3]], [1], r"site 1: .* found \(2,\) and \(3, 1\)"),
        ([1.0, 1.0], [[1, 1], [2, 2]], [1], r"site 1: .* found \(2,\) and \(2, 2\)"),
        ([[1.0], [1.0]], [[1], [2]], [1], r"site 1: .* found \(2, 1\)"),
    ],
)
def test_refuses_bad_numbers_and_shapes(
    solve: Planner, value: object, cost: object, limit: object, message: str
) -> None:
    values, costs = [np.zeros(1), np.array(value)], [np.zeros((1, 1), dtype=np.int64), np.array(cost)]
    with pytest.raises(ValueError, match=message):
        solve(values, costs, np.array(limit))


@each_planner
def test_refuses_a_site_without_candidates_and_lists_of_different_length(solve: Planner) -> None:
    with pytest.raises(ValueError, match=r"n > 0, found \(0,\)"):
        solve([np.zeros(0)], [np.zeros((0, 1), dtype=np.int64)], np.array([1]))
    with pytest.raises(ValueError, match="values of 1 sites, but costs of 0"):
        solve([np.zeros(1)], [], np.array([1]))


def test_registry() -> None:
    assert planners() == {"greedy": greedy.solve, "knapsack": knapsack.solve}
    assert find_planner("knapsack") is knapsack.solve
    with pytest.raises(OptionError, match="planner='knapsak' is not known; choose one of: greedy, knapsack"):
        find_planner("knapsak")
