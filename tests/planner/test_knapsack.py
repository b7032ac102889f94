from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from scipy.optimize import OptimizeResult, milp

from tdfx.planner import FloatArray, Infeasible, IntArray, knapsack
from tdfx.planner.table import Table

Instance = tuple[list[FloatArray], list[IntArray], IntArray]


def mixed(rng: np.random.Generator) -> Instance:
    """Errors from 1e-8 to 1, costs from 0 to 1e10, ties, and limits that some choice meets exactly or just misses."""
    resources = int(rng.integers(1, 4))
    top = 10 ** rng.uniform(0, 10, resources)
    values, costs = [], []
    for _ in range(rng.integers(1, 6)):
        n = int(rng.integers(1, 7))
        error = 10 ** rng.uniform(-8, 0, n)
        if rng.random() < 0.3:
            error = np.round(error, 1)
        if rng.random() < 0.7:
            error[0] = 0
        cost = (top * rng.random((n, resources)) ** rng.choice([1, 8])).astype(np.int64)
        if rng.random() < 0.5:
            cost = rng.choice([0, 1]) * top.astype(np.int64) // 2 + rng.integers(0, 3, (n, resources))
        if rng.random() < 0.7:  # the cheaper, the worse
            error, cost = np.sort(error), -np.sort(-cost, axis=0)
        values.append(error**2)
        costs.append(cost)
    if rng.random() < 0.5:  # a common factor, as of feature maps' sizes
        factor = int(rng.integers(2, 50))
        costs = [cost * factor for cost in costs]
    least = sum(cost.min(axis=0) for cost in costs)
    limits = sum(cost[rng.integers(len(cost))] for cost in costs)
    if rng.random() < 0.7:
        limits = np.maximum(limits, least)
    if rng.random() < 0.3:
        limits = limits + rng.integers(-1, 2, resources)
    if rng.random() < 0.2:
        limits = (limits * rng.uniform(0.7, 1.3, resources)).astype(np.int64)
    return values, costs, np.maximum(limits, 0)


def near(rng: np.random.Generator) -> Instance:
    """Large costs that differ in the last digits only, so that floating-point rows cannot tell them apart."""
    resources, top = int(rng.integers(1, 4)), int(10 ** rng.uniform(7, 12))
    values, costs = [], []
    for _ in range(rng.integers(2, 6)):
        n = int(rng.integers(2, 7))
        values.append(10 ** rng.uniform(-16, 0, n))
        costs.append(top * rng.integers(0, 3, (n, 1)) + rng.integers(0, rng.choice([3, 1000]), (n, resources)))
    limits = sum(cost[rng.integers(len(cost))] for cost in costs) + rng.integers(-2, 3, resources)
    if rng.random() < 0.2:
        limits = (limits * rng.uniform(0.7, 1, resources)).astype(np.int64)
    return values, costs, np.maximum(limits, 0)


def all_choices(sizes: Iterable[int]) -> IntArray:
    return np.array(list(itertools.product(*map(range, sizes))))


def check_against_all_choices(values: list[FloatArray], costs: list[IntArray], limits: IntArray) -> bool:
    """Whether a choice fits; fails if the solver does not say so, or has another least value, least cost or scale."""
    choices = all_choices(map(len, values))
    value: FloatArray = np.sum([v[i] for v, i in zip(values, choices.T, strict=True)], axis=0)
    cost: IntArray = np.sum([c[i] for c, i in zip(costs, choices.T, strict=True)], axis=0)
    fits = (cost <= limits).all(axis=1)
    if fits.any():
        chosen = knapsack.solve(values, costs, limits)
        assert (sum(c[i] for c, i in zip(costs, chosen, strict=True)) <= limits).all()
        least = float(value[fits].min())
        assert sum(float(v[i]) for v, i in zip(values, chosen, strict=True)) <= least * (1 + 1e-12)
        return True
    with pytest.raises(Infeasible) as caught:
        knapsack.solve(values, costs, limits)
    assert caught.value.least == cost.min(axis=0).tolist()
    scale = caught.value.scale
    share = np.divide(cost, limits, out=np.full(cost.shape, math.inf), where=limits > 0)
    share[cost == 0] = 0
    assert scale <= share.max(axis=1).min() * (1 + 1e-7)
    if math.isfinite(scale):
        scaled = np.array([math.floor(Fraction(scale) * limit) for limit in limits.tolist()])
        assert (cost <= scaled).all(axis=1).any()
    return False


@pytest.mark.parametrize(("draw", "seed"), [(mixed, 0), (mixed, 1), (mixed, 2), (near, 3)])
def test_against_all_choices(draw: Callable[[np.random.Generator], Instance], seed: int) -> None:
    rng = np.random.default_rng(seed)
    feasible = sum(check_against_all_choices(*draw(rng)) for _ in range(500))
    assert 250 < feasible < 490


def least_by_dynamic_programming(values: list[FloatArray], costs: list[IntArray], limit: int) -> float:
    best = np.zeros(limit + 1)  # least value by total cost allowed
    for value, cost in zip(values, costs, strict=True):
        added = np.full((len(value), limit + 1), np.inf)
        for row, v, c in zip(added, value, cost[:, 0], strict=True):
            if c <= limit:
                row[c:] = best[: limit + 1 - c] + v
        best = added.min(axis=0)
    return float(best[limit])


def curves(rng: np.random.Generator, sites: int, candidates: int, unit: int) -> tuple[list[FloatArray], list[IntArray]]:
    """Errors that fall with the cost as those of low-rank approximations do; the first candidate is dense."""
    values, costs = [], []
    for _ in range(sites):
        share = np.append(1, rng.uniform(0.02, 0.95, candidates - 1))
        error = 10 ** rng.uniform(-2, 1) * np.exp(-rng.uniform(2, 20) * share) * rng.uniform(0.8, 1.2, candidates)
        values.append(np.where(share == 1, 0, error) ** 2)
        costs.append(np.ceil(unit * 10 ** rng.uniform(-2, 0) * share).astype(np.int64)[:, None])
    return values, costs


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_many_sites_against_dynamic_programming(share: float) -> None:
    values, costs = curves(np.random.default_rng(0), sites=20, candidates=30, unit=300)
    limit = int(share * sum(int(cost[0, 0]) for cost in costs))
    chosen = knapsack.solve(values, costs, np.array([limit]))
    assert sum(int(cost[i, 0]) for cost, i in zip(costs, chosen, strict=True)) <= limit
    total = sum(float(value[i]) for value, i in zip(values, chosen, strict=True))
    assert total == pytest.approx(least_by_dynamic_programming(values, costs, limit), rel=1e-6, abs=0)
    assert knapsack.solve(values, costs, np.array([limit])) == chosen


def test_one_unit_decides() -> None:
    values, costs = [np.array([0.0, 1.0])] * 2, [np.array([[10**12 + 1], [10**12]])] * 2
    assert knapsack.solve(values, costs, np.array([2 * 10**12 + 2])) == [0, 0]
    assert sorted(knapsack.solve(values, costs, np.array([2 * 10**12 + 1]))) == [0, 1]
    assert knapsack.solve(values, costs, np.array([2 * 10**12])) == [1, 1]
    with pytest.raises(Infeasible) as caught:
        knapsack.solve(values, costs, np.array([2 * 10**12 - 1]))
    assert caught.value.least == [2 * 10**12]
    assert math.floor(Fraction(caught.value.scale) * (2 * 10**12 - 1)) == 2 * 10**12


def test_of_equal_candidates_the_first() -> None:
    values, costs = [np.array([2.0, 1.0, 1.0]), np.array([1.0, 1.0])], [np.array([[1], [2], [2]]), np.array([[3], [3]])]
    assert knapsack.solve(values, costs, np.array([100])) == [1, 0]
    assert knapsack.solve(values, costs, np.array([5])) == [1, 0]


def test_of_equal_values_the_cheapest() -> None:
    assert knapsack.solve([np.zeros(3)], [np.array([[5], [3], [4]])], np.array([9])) == [1]


def test_no_sites_and_no_limits() -> None:
    assert knapsack.solve([], [], np.array([1])) == []
    assert knapsack.solve([np.array([2.0, 1.0])], [np.zeros((2, 0), dtype=np.int64)], np.zeros(0, dtype=np.int64)) == [
        1
    ]


@pytest.mark.parametrize(
    ("limits", "least", "scale"),
    [([2, 100], [4, 10], 2.0), ([5, 5], [4, 10], 3.0), ([0, 100], [4, 10], math.inf), ([3, 2], [4, 10], 17 / 3)],
)
def test_infeasible_says_what_would_do(limits: list[int], least: list[int], scale: float) -> None:
    costs = [np.array([[1, 12], [9, 7]]), np.array([[3, 8], [8, 3]])]
    with pytest.raises(Infeasible) as caught:
        knapsack.solve([np.zeros(2)] * 2, costs, np.array(limits))
    assert caught.value.least == least
    assert caught.value.scale == pytest.approx(scale, rel=1e-6)


def alike(rng: np.random.Generator, resources: int, blocks: int = 12) -> Instance:
    """The layers of a transformer: the same few sizes in every block, and nearly the same errors; half of the costs."""
    ranks = np.arange(16, 192, 8)
    values, costs = [], []
    for _ in range(blocks):
        for inputs, outputs in ((384, 1152), (384, 384), (384, 1536), (1536, 384)):
            error = 1 - ranks / min(inputs, outputs) * rng.uniform(0.999, 1.001)
            values.append(np.append(0.0, error**2))
            params = np.append(inputs * outputs, ranks * (inputs + outputs))
            costs.append(np.stack([params * (197, 1, 4)[k] + k * 64 for k in range(resources)], axis=1))
    return values, costs, sum(cost[0] for cost in costs) // 2


@pytest.mark.parametrize("resources", [1, 2])
def test_layers_that_are_alike_are_chosen_among_in_no_time(resources: int) -> None:
    values, costs, limits = alike(np.random.default_rng(0), resources)
    chosen = knapsack.solve(values, costs, limits)
    assert (sum(cost[i] for cost, i in zip(costs, chosen, strict=True)) <= limits).all()
    total = sum(float(value[i]) for value, i in zip(values, chosen, strict=True))
    steps = [cost[:, :1] // np.gcd.reduce([int(c) for some in costs for c in some[:, 0]]) for cost in costs]
    least = least_by_dynamic_programming(values, steps, sum(int(step[0, 0]) for step in steps) // 2)
    assert total >= least * (1 - 1e-12)
    if resources == 1:
        assert total == pytest.approx(least, rel=1e-12)


def test_with_few_partial_choices_kept_the_limits_hold_and_the_total_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    values, costs, limits = alike(np.random.default_rng(1), 2)
    best = knapsack.solve(values, costs, limits)
    monkeypatch.setattr(knapsack, "KEPT", (5,))
    chosen = knapsack.solve(values, costs, limits)
    assert (sum(cost[i] for cost, i in zip(costs, chosen, strict=True)) <= limits).all()
    totals = [sum(float(v[i]) for v, i in zip(values, choice, strict=True)) for choice in (best, chosen)]
    assert totals[0] <= totals[1] <= 1.02 * totals[0]


def test_no_change_of_one_site_is_left_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [np.array([3.0, 2.0, 0.0]), np.array([9.0, 4.0])]
    costs = [np.array([[0, 0], [1, 1], [9, 0]]), np.array([[0, 0], [2, 1]])]
    monkeypatch.setattr(knapsack, "_least_value", lambda table, limits: np.array([0, 3]))
    assert knapsack.solve(values, costs, np.array([3, 2])) == [1, 1]
    assert knapsack.solve(values, costs, np.array([2, 2])) == [0, 1]


def test_highs_cannot_write_to_stdout(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def talkative(*args: object, **kwargs: object) -> object:
        os.write(1, b"for developers")
        return milp(*args, **kwargs)

    monkeypatch.setattr(knapsack, "milp", talkative)
    with pytest.raises(Infeasible):
        knapsack.solve([np.array([0.0, 1.0])] * 2, [np.array([[2], [1]])] * 2, np.array([1]))
    os.write(1, b"heard again")
    assert capfd.readouterr().out == "heard again"


def test_a_failure_of_highs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "milp", lambda *args, **kwargs: OptimizeResult(status=4, message="no idea", x=None))
    with pytest.raises(RuntimeError, match="HiGHS failed: no idea"):
        knapsack.solve([np.array([0.0, 1.0])] * 2, [np.array([[2], [1]])] * 2, np.array([1]))


def test_prices_rule_out_most_candidates_and_never_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    shares = np.sort(rng.uniform(0.05, 1, (8, 30)))
    values = [np.exp(-rng.uniform(2, 8) * share) for share in shares]
    costs = [(rng.integers(10**4, 10**6) * share).astype(np.int64)[:, None] for share in shares]
    limits = sum(cost[-1] for cost in costs) // 3
    seen: list[int] = []
    least_choice = knapsack.least_choice

    def spy(table: Table, *args: Any) -> tuple[IntArray | None, bool]:
        seen.append(table.site.size)
        return least_choice(table, *args)

    monkeypatch.setattr(knapsack, "least_choice", spy)
    priced = knapsack.solve(values, costs, limits)
    assert seen
    assert max(seen) < 8 * 30 / 3
    monkeypatch.setattr(knapsack, "_prices", lambda table, limits: None)
    monkeypatch.setattr(knapsack, "KEPT", (10**6,))
    plain = knapsack.solve(values, costs, limits)
    assert sum(v[i] for v, i in zip(values, priced, strict=True)) == pytest.approx(
        sum(v[i] for v, i in zip(values, plain, strict=True)), rel=1e-9
    )
