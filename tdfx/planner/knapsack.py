"""Least total value within several limits: a multiple-choice knapsack, exact in integers.

SciPy's HiGHS prices the resources by the linear relaxation. What the prices choose is a first answer, which rules most
candidates out; among the others the best choice is grown site after site (``partial_choices``). HiGHS's own branch and
bound does not come to an end where many layers are alike, as in transformers; it says by how much limits that no choice
keeps would have to grow. It works in floating point, so its answers are checked in integers.

Source: Kellerer, Pferschy and Pisinger, Knapsack Problems (2004), chapter 11 (the problem, dominance, reduction).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from threading import Lock

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

from tdfx.planner import FloatArray, Infeasible, IntArray
from tdfx.planner.partial_choices import least_choice, undominated
from tdfx.planner.table import Table, at_least, check, polish

KEPT = (300, 3_000, 30_000)
"""Partial choices that are kept at most, try by try: each better choice leaves fewer candidates for the next try."""

UNIT = 1_000
"""Largest coefficient of an objective: HiGHS's absolute gap of 1e-6, which cannot be set, is 1e-9 of it."""

SCALE_ERROR = 1e-6
"""Of the least scale, by HiGHS's tolerance."""

_STDOUT = Lock()


def solve(values: Sequence[FloatArray], costs: Sequence[IntArray], limits: IntArray) -> list[int]:
    """Chooses one candidate per site, of least total value within all limits (arguments and errors: see ``Planner``).

    The total is the least one, but for more than 30,000 partial choices of which none is worse than another: then it is
    the least of those that the most promising ones lead to. No change of a single site lowers it within the limits.
    Of a site's candidates with equal value and costs the first is taken.
    """
    check(values, costs, limits)
    if not values:
        return []
    table = Table.of(values, costs)
    best = _least_value(table, limits)
    if best is None:
        raise Infeasible(table.least_cost.sum(axis=0).tolist(), _least_scale(table, limits)[0])
    return [int(row) for row in polish(table, limits, best) - table.starts]


def _least_value(table: Table, limits: IntArray) -> IntArray | None:
    """Rows of a choice of least value, None if no choice is within the limits."""
    rows = _reduce(table, _undominated(table), limits, math.inf)
    if rows is None:
        return None
    left = table.at(rows)
    free = left.first_least(left.value)
    if (left.cost[free].sum(axis=0) <= limits).all():
        return rows[free]
    prices = _prices(left, limits)
    by_unit = (np.ones(limits.size) if prices is None else prices) / np.maximum(limits, 1)
    found = None if prices is None else _priced_choice(table, rows, limits, prices)
    if found is None:
        scale, choice = _least_scale(table, limits)
        if scale > 1 + SCALE_ERROR:
            return None
        found = choice if scale <= 1 else None
    for most_kept in KEPT:
        most_value = math.inf if found is None else float(table.value[found].sum())
        rows = _promising(table, rows, limits, prices, most_value)
        if rows is None:
            break
        choice, is_proven = least_choice(table.at(rows), limits, by_unit, most_value, most_kept)
        if choice is not None and table.value[rows[choice]].sum() < most_value:
            found = rows[choice]
        if is_proven:
            break
    return found


def _prices(table: Table, limits: IntArray) -> FloatArray | None:
    """What a unit of each resource's room is worth at the optimum of the linear relaxation, None without an optimum."""
    value, cost, room = _shifted(table, limits)
    one_each = csr_array((np.ones(table.site.size), (table.site, np.arange(table.site.size))))
    with _silent_stdout():
        relaxed = linprog(value / (value.max() or 1.0), cost.T, room, one_each, np.ones(table.starts.size))
    if relaxed.status != 0:
        return None
    prices: FloatArray = np.maximum(-relaxed.ineqlin.marginals, 0.0) * (value.max() or 1.0)
    return prices


def _priced_choice(table: Table, rows: IntArray, limits: IntArray, prices: FloatArray) -> IntArray | None:
    """Rows of a choice within the limits that is near the optimum: the best at these prices, raised until it fits."""
    left = table.at(rows)
    value, cost, _ = _shifted(left, limits)

    def at(factor: float) -> IntArray:
        return left.first_least(value + cost @ (prices * factor))

    def fits(choice: IntArray) -> bool:
        return bool((left.cost[choice].sum(axis=0) <= limits).all())

    high = next((factor for factor in 2.0 ** np.arange(20) if fits(at(factor))), None)
    if high is None:
        return None
    low = high / 2
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(at(middle)) else (middle, high)
    return rows[polish(left, limits, at(high))]


def _promising(
    table: Table, rows: IntArray, limits: IntArray, prices: FloatArray | None, most_value: float
) -> IntArray | None:
    """Rows that may be part of a choice of at most this value, by the Lagrangian bound at these prices.

    Any prices give a bound: a choice with candidate j is worth at least the least priced total plus what j's priced
    value is above its site's least (Kellerer et al. 2004, section 11.2). Rounding is allowed for.
    """
    if prices is not None:
        left = table.at(rows)
        value, cost, room = _shifted(left, limits)
        priced = value + cost @ prices
        least = np.minimum.reduceat(priced, left.starts)
        bound = least.sum() - room @ prices + priced - least[left.site]
        spare = most_value - left.least_value.sum()
        rows = rows[bound <= spare + 1e-9 * (value.max() + prices.sum())]
    return _reduce(table, rows, limits, most_value)


def _shifted(table: Table, limits: IntArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Values and costs above their site's least, and the room that the least costs leave, in units of the limits."""
    unit = np.maximum(limits, 1)
    room: FloatArray = (limits - table.least_cost.sum(axis=0)) / unit
    cost: FloatArray = (table.cost - table.least_cost[table.site]) / unit
    return table.value - table.least_value[table.site], cost, room


def _undominated(table: Table) -> IntArray:
    """Rows without those that another one of the same site matches or beats in value and in every cost."""
    sites = np.split(np.arange(table.site.size), table.starts[1:])
    return np.concatenate([rows[undominated(table.value[rows], table.cost[rows])] for rows in sites])


def _reduce(table: Table, rows: IntArray, limits: IntArray, most_value: float) -> IntArray | None:
    """Rows without those that are too much even beside the others' least; None if a site has none left."""
    sites = table.starts.size
    while (left := table.at(rows)).starts.size == sites:
        room = limits - left.least_cost.sum(axis=0)
        spare = most_value - left.least_value.sum()
        fits = (left.cost - left.least_cost[left.site] <= room).all(axis=1)
        fits &= left.value - left.least_value[left.site] <= spare
        if fits.all():
            return rows
        rows = rows[fits]
    return None


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """HiGHS 1.12 now and then prints a line for its developers, past all options (ERGO-Code/HiGHS#2783)."""
    with _STDOUT, open(os.devnull, "w") as nowhere:
        stdout = os.dup(1)
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)


def _least_scale(table: Table, limits: IntArray) -> tuple[float, IntArray | None]:
    """The smallest factor of all limits that lets a choice fit, and its rows; with ``SCALE_ERROR`` less none does."""
    rows = np.flatnonzero((table.cost[:, limits == 0] == 0).all(axis=1))
    left = table.at(rows)
    sites, n = table.starts.size, rows.size
    if left.starts.size < sites:
        return math.inf, None
    cost, limits = left.cost[:, limits > 0], limits[limits > 0]

    def scale(choice: IntArray) -> Fraction:
        return max(map(Fraction, cost[choice].sum(axis=0).tolist(), limits.tolist()))

    # The least scale is at most this choice's and at least that over the number of limits: a good unit.
    share = cost / limits
    start = left.first_least(share.sum(axis=1))
    unit = float(scale(start))
    # The last number is the scale in that unit. A candidate that alone takes more is as well kept out by taking 2.
    matrix = np.insert(UNIT * np.minimum(share / unit, 2).T, n, -UNIT, axis=1)
    one_each = csr_array((np.ones(n), (left.site, np.arange(n))), shape=(sites, n + 1))
    with _silent_stdout():
        result = milp(
            np.append(np.zeros(n), UNIT),
            integrality=np.append(np.ones(n), 0),
            bounds=Bounds(0, np.append(np.ones(n), sites)),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(matrix, ub=np.zeros(limits.size))],
            options={"mip_rel_gap": 0.0},
        )
    if result.status not in (0, 2):
        raise RuntimeError(f"HiGHS failed: {result.message}")
    best = start if result.x is None else left.first_least(-result.x[:n])
    best = min(start, best, key=scale)
    return at_least(scale(best)), rows[best]
