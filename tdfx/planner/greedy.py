"""Within one limit, greedily: down each site's convex hull of value over cost, the best gain per cost first.

Starting from the cheapest candidate of every site, the hulls' steps are taken in order of falling gain per cost; a step
that does not fit ends its site's. Up to the first such step this is the optimum of the linear relaxation, so the value
is above the least one by less than that step gains; what room is left then goes to changes of single sites.

Source: Kellerer, Pferschy and Pisinger, Knapsack Problems (2004), section 11.2.1 (MCKP-Greedy).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np

from tdfx.errors import OptionError
from tdfx.planner import FloatArray, Infeasible, IntArray
from tdfx.planner.table import Table, at_least, check, polish


def solve(values: Sequence[FloatArray], costs: Sequence[IntArray], limits: IntArray) -> list[int]:
    """Chooses one candidate per site within one limit (arguments and errors: see ``Planner``).

    The total value is near the least, above it by less than the gain of one step on a hull. No change of a single site
    lowers it within the limit. Of a site's candidates with equal value and cost the first is taken.

    Raises:
        OptionError: there is not exactly one limit.
    """
    check(values, costs, limits)
    if limits.size != 1:
        raise OptionError(
            f"planner='greedy' takes one budget, found {limits.size}; planner='knapsack' takes several at once"
        )
    if not values:
        return []
    table = Table.of(values, costs)
    (limit,), least = limits.tolist(), int(table.least_cost.sum())
    if least > limit:
        raise Infeasible([least], at_least(Fraction(least, limit)) if limit else math.inf)
    hulls = [_hull(value, cost[:, 0]) for value, cost in zip(values, costs, strict=True)]
    choice = table.starts + _descend(values, costs, hulls, limit - least)
    return [int(row) for row in polish(table, limits, choice) - table.starts]


def _descend(
    values: Sequence[FloatArray], costs: Sequence[IntArray], hulls: Sequence[list[int]], room: int
) -> IntArray:
    """Per site the candidate that the steps which fit into the room lead to."""
    chosen = [hull[0] for hull in hulls]
    # Along a hull the rates fall, so a stable order keeps each site's steps in theirs.
    steps = sorted(
        (-_rate(values[site], costs[site][:, 0], step), site, step)
        for site, hull in enumerate(hulls)
        for step in pairwise(hull)
    )
    for _, site, (start, end) in steps:
        extra = int(costs[site][end, 0] - costs[site][start, 0])
        if chosen[site] == start and extra <= room:
            chosen[site] = end
            room -= extra
    return np.array(chosen)


def _hull(value: FloatArray, cost: IntArray) -> list[int]:
    """Candidates on the lower convex hull of value over cost, from the cheapest to the one of least value."""
    hull: list[int] = []
    for index in np.lexsort((value, cost)).tolist():
        if hull and value[index] >= value[hull[-1]]:
            continue
        while len(hull) > 1 and _rate(value, cost, (hull[-1], index)) >= _rate(value, cost, (hull[-2], hull[-1])):
            hull.pop()
        hull.append(index)
    return hull


def _rate(value: FloatArray, cost: IntArray, step: tuple[int, int]) -> float:
    """What a step from one candidate to a dearer one gains per unit of cost."""
    start, end = step
    return float((value[start] - value[end]) / (cost[end] - cost[start]))
