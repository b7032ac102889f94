"""Least total value within several limits: a multiple-choice knapsack, solved by SciPy's HiGHS MILP.

HiGHS works in floating point. It lets a row be exceeded by 1e-6, its presolve may for that call a problem infeasible
that is not, and it stops at an absolute gap of 1e-6; SciPy can set none of this. So the limits are written as rows of
digits, where one unit too much is far beyond the tolerance; candidates that cannot be in an optimum are first removed
in exact integers; and an optimum far below the unit of the objective is sought again in a smaller unit, among the
candidates that could still better it. Answers are checked in integers.

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
from scipy.linalg import block_diag
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

from tdfx.planner import FloatArray, Infeasible, IntArray
from tdfx.planner.table import Table, at_least, check, polish

BASES = (100_000, 1_000)
"""Bases of the digits: large ones make few rows, small ones stay clear of HiGHS's tolerance should a large one not."""

UNIT = 1_000
"""Largest coefficient of an objective: HiGHS's 1e-6 is 1e-9 of it."""

_STDOUT = Lock()


def solve(values: Sequence[FloatArray], costs: Sequence[IntArray], limits: IntArray) -> list[int]:
    """Chooses one candidate per site, of least total value within all limits (arguments and errors: see ``Planner``).

    The total is within a relative 1e-6 of the least one, and no change of a single site lowers it within the limits.
    Of a site's candidates with equal value and costs the first is taken.
    """
    check(values, costs, limits)
    if not values:
        return []
    table = Table.of(values, costs)
    best = _least_value(table, limits)
    if best is None:
        raise Infeasible(table.least_cost.sum(axis=0).tolist(), _least_scale(table, limits))
    return [int(row) for row in polish(table, limits, best) - table.starts]


def _least_value(table: Table, limits: IntArray) -> IntArray | None:
    """Rows of a choice of least value, None if no choice is within the limits."""
    best = None
    gap = 0.01  # A quick first choice rules many candidates out.
    rows = _reduce(table, _undominated(table), limits, math.inf)
    prices = None if rows is None else _prices(table.at(rows), limits)
    if rows is not None and prices is not None:
        best = _priced_choice(table, rows, limits, prices)
        if best is not None:
            gap = 0.0
            rows = _promising(table, rows, limits, prices, float(table.value[best].sum()))
    while rows is not None:
        left = table.at(rows)
        choice = _choose(left, limits, gap)
        if choice is None:
            break
        best = rows[choice]
        # The absolute gap was 1e-9 of the largest value: close enough unless the choice is far below that.
        value = float(left.value[choice].sum())
        above = value - float(left.least_value.sum())
        if above <= 0 or (not gap and above >= left.largest_value / 10):
            break
        gap = 0.0
        rows = _promising(table, rows, limits, prices, value)
    return best


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
    front: list[int] = []
    for rows in np.split(np.arange(table.site.size), table.starts[1:]):
        cost = table.cost[rows]
        kept: list[int] = []
        for i in np.lexsort((*cost.T, table.value[rows])).tolist():
            if not (cost[kept] <= cost[i]).all(axis=1).any():
                kept.append(i)
        front += sorted(rows[kept].tolist())
    return np.array(front)


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


def _choose(table: Table, limits: IntArray, gap: float) -> IntArray | None:
    """Rows of a choice within the limits, of least value but for ``gap`` and 1e-9 of the largest; None if none fits."""
    value = table.value - table.least_value[table.site]
    cost = table.cost - table.least_cost[table.site]
    room = limits - table.least_cost.sum(axis=0)

    def fits(choice: IntArray) -> bool:
        return bool((cost[choice].sum(axis=0) <= room).all())

    least = table.first_least(value)
    if fits(least):
        return least
    for base in BASES:
        choice = _highs(table, UNIT * (value / (value.max() or 1.0)), *_digit_rows(cost, room, base), gap=gap)
        if choice is not None and fits(choice):
            return choice
    if choice is None:
        return None
    raise RuntimeError("HiGHS exceeded a limit that was given to it in digits")


def _digit_rows(cost: IntArray, room: IntArray, base: int) -> tuple[FloatArray, FloatArray]:
    """``cost.T @ x <= room`` digit by digit, lowest first, with integer carries as further columns.

    Row k says: the costs' digits k + carry k <= the room's digit k + base * carry k+1.
    """
    tables, bounds, carries = [], [], []
    for column, bound in zip(cost.T, room, strict=True):
        step = np.gcd.reduce(column) or 1
        column, bound = column // step, bound // step
        digits = 1
        while base**digits <= bound:
            digits += 1
        power = base ** np.arange(digits)
        tables.append(column // power[:, None] % base)
        bounds.append(bound // power % base)
        carries.append(np.eye(digits, digits - 1, -1) - base * np.eye(digits, digits - 1))
    return np.hstack([np.vstack(tables), block_diag(*carries)]), np.concatenate(bounds).astype(float)


def _highs(
    table: Table, value: FloatArray, matrix: FloatArray, bounds: FloatArray, *, gap: float = 0.0, integer: bool = True
) -> IntArray | None:
    """Rows of a choice of least value with ``matrix @ x <= bounds``; None if there is none.

    Columns beyond the candidates' are auxiliary numbers from 0 to the number of sites, integers if ``integer``.
    """
    n, sites, auxiliary = table.site.size, table.starts.size, matrix.shape[1] - table.site.size
    one_each = csr_array((np.ones(n), (table.site, np.arange(n))), shape=(sites, n + auxiliary))
    with _silent_stdout():
        result = milp(
            np.append(value, np.zeros(n + auxiliary - value.size)),
            integrality=np.repeat([1, int(integer)], [n, auxiliary]),
            bounds=Bounds(0, np.repeat([1, sites], [n, auxiliary])),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(matrix, ub=bounds)],
            options={"mip_rel_gap": gap},
        )
    if result.status not in (0, 2):
        raise RuntimeError(f"HiGHS failed: {result.message}")
    return None if result.x is None else table.first_least(-result.x[:n])


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


def _least_scale(table: Table, limits: IntArray) -> float:
    """The smallest factor of all limits that lets a choice fit: one does for certain, with 1e-6 less none."""
    sites, some = table.starts.size, limits > 0
    table = table.at(np.flatnonzero((table.cost[:, ~some] == 0).all(axis=1)))
    if table.starts.size < sites:
        return math.inf
    cost, limits = table.cost[:, some], limits[some]

    def scale(choice: IntArray) -> Fraction:
        return max(map(Fraction, cost[choice].sum(axis=0).tolist(), limits.tolist()))

    # The least scale is at most this choice's and at least that over the number of limits: a good unit.
    share = cost / limits
    start = table.first_least(share.sum(axis=1))
    unit = float(scale(start))
    # The auxiliary number is the scale in that unit. A candidate that alone takes more is as well kept out by taking 2.
    matrix = np.insert(UNIT * np.minimum(share / unit, 2).T, share.shape[0], -UNIT, axis=1)
    value = np.append(np.zeros(share.shape[0]), UNIT)
    best = _highs(table, value, matrix, np.zeros(limits.size), integer=False)
    least = min(scale(choice) for choice in (start, best) if choice is not None)
    return at_least(least)
