from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdfx.errors import OptionError
from tdfx.planner import FloatArray, IntArray, greedy, knapsack

Instance = tuple[list[FloatArray], list[IntArray], int]


def total(tables: list[FloatArray] | list[IntArray], chosen: list[int]) -> float:
    return float(sum(table[index].sum() for table, index in zip(tables, chosen, strict=True)))


def least_value(values: list[FloatArray], costs: list[IntArray], limit: int) -> float:
    choices = itertools.product(*(range(len(value)) for value in values))
    return min(total(values, list(chosen)) for chosen in choices if total(costs, list(chosen)) <= limit)


def hull_by_definition(value: FloatArray, cost: IntArray) -> list[tuple[int, float]]:
    """(cost, value) of the vertices that some price of cost makes the only least, from the cheapest to the best."""
    points = sorted({(int(c), float(v)) for c, v in zip(cost[:, 0], value, strict=True)})
    points = [p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)]

    def is_vertex(p: tuple[int, float]) -> bool:
        cheaper, dearer = [q for q in points if q < p], [q for q in points if q > p]
        rates_in = [(q[1] - p[1]) / (p[0] - q[0]) for q in cheaper]
        rates_out = [(p[1] - q[1]) / (q[0] - p[0]) for q in dearer]
        return min(rates_in, default=np.inf) > max(rates_out, default=-np.inf)

    return [p for p in points if is_vertex(p)]


@st.composite
def instances(draw: Callable[..., object]) -> Instance:
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    sizes = rng.integers(1, 7, rng.integers(1, 6))
    values = [np.sort(rng.integers(0, 30, n) / 30.0)[::-1] for n in sizes]
    costs = [np.sort(rng.integers(0, 40, (n, 1)), axis=0) for n in sizes]
    least, most = (sum(int(pick(cost)) for cost in costs) for pick in (np.min, np.max))
    return values, costs, int(rng.integers(least, most + 1))


@settings(deadline=None, derandomize=True)
@given(instances())
def test_the_value_is_above_the_least_by_less_than_one_steps_gain(instance: Instance) -> None:
    values, costs, limit = instance
    chosen = greedy.solve(values, costs, np.array([limit]))
    hulls = [hull_by_definition(value, cost) for value, cost in zip(values, costs, strict=True)]
    largest = max((p[1] - q[1] for hull in hulls for p, q in itertools.pairwise(hull)), default=0.0)
    assert total(costs, chosen) <= limit
    assert total(values, chosen) <= least_value(values, costs, limit) + largest + 1e-12


@settings(deadline=None, derandomize=True)
@given(instances())
def test_the_hull_is_that_of_the_definition(instance: Instance) -> None:
    for value, cost in zip(*instance[:2], strict=True):
        found = [(int(cost[i, 0]), float(value[i])) for i in greedy._hull(value, cost[:, 0])]
        vertices = hull_by_definition(value, cost)
        assert [p for p in found if p in vertices] == vertices
        rates = [(p[1] - q[1]) / (q[0] - p[0]) for p, q in itertools.pairwise(found)]
        assert all(before > after for before, after in itertools.pairwise(rates))


@settings(deadline=None, derandomize=True)
@given(instances(), st.data())
def test_a_limit_that_steps_use_up_gives_the_optimum(instance: Instance, data: st.DataObject) -> None:
    values, costs, _ = instance
    hulls = [greedy._hull(value, cost[:, 0]) for value, cost in zip(values, costs, strict=True)]
    rates = sorted(
        greedy._rate(v, c[:, 0], step)
        for v, c, hull in zip(values, costs, hulls, strict=True)
        for step in itertools.pairwise(hull)
    )
    prices = [(a + b) / 2 for a, b in itertools.pairwise([0.0, *rates, 100.0]) if b - a > 1e-9]
    price = data.draw(st.sampled_from(prices))  # all steps that gain more than this per unit of cost are taken
    chosen = [int((v + price * c[:, 0]).argmin()) for v, c in zip(values, costs, strict=True)]
    limit = int(total(costs, chosen))
    found = greedy.solve(values, costs, np.array([limit]))
    assert total(values, found) <= total(values, chosen) + 1e-12


def test_steps_are_taken_by_gain_per_cost_and_not_by_gain() -> None:
    values = [np.array([10.0, 0.0]), np.array([4.0, 0.0]), np.array([4.0, 0.0])]
    costs = [np.array([[0], [10]]), np.array([[0], [3]]), np.array([[0], [3]])]
    assert greedy.solve(values, costs, np.array([9])) == [0, 1, 1]


def test_a_step_that_does_not_fit_stops_its_site_only() -> None:
    values = [np.array([10.0, 0.0]), np.array([1.0, 0.0])]
    costs = [np.array([[0], [10]]), np.array([[0], [5]])]
    assert greedy.solve(values, costs, np.array([9])) == [0, 1]


def test_what_room_is_left_goes_to_candidates_off_the_hull() -> None:
    values, costs = [np.array([10.0, 8.0, 0.0])], [np.array([[0], [5], [10]])]
    assert greedy._hull(values[0], costs[0][:, 0]) == [0, 2]
    assert greedy.solve(values, costs, np.array([9])) == [1]
    assert greedy.solve(values, costs, np.array([4])) == [0]


def test_the_greedy_choice_may_miss_the_optimum() -> None:
    values = [np.array([6.0, 0.0]), np.array([9.0, 0.0])]
    costs = [np.array([[0], [5]]), np.array([[0], [9]])]
    limit = np.array([9])
    assert greedy.solve(values, costs, limit) == [1, 0]
    assert knapsack.solve(values, costs, limit) == [0, 1]


@pytest.mark.parametrize("limits", [0, 2, 3])
def test_more_than_one_limit_is_refused(limits: int) -> None:
    costs = [np.zeros((2, limits), dtype=np.int64)]
    for values, cost in (([np.zeros(2)], costs), ([], [])):
        with pytest.raises(OptionError, match=f"greedy' takes one budget, found {limits}; planner='knapsack' takes"):
            greedy.solve(values, cost, np.zeros(limits, dtype=np.int64))


def test_the_steps_of_many_sites_come_near_the_optimum() -> None:
    rng = np.random.default_rng(1)
    shares = np.sort(rng.uniform(0.02, 1, (40, 30)))
    values = [np.exp(-rng.uniform(2, 12) * share) for share in shares]
    costs = [(rng.integers(10**4, 10**6) * share).astype(np.int64)[:, None] for share in shares]
    limit = sum(cost[-1] for cost in costs) // 3
    found, best = (total(values, solve(values, costs, limit)) for solve in (greedy.solve, knapsack.solve))
    assert best <= found <= 1.01 * best
