"""The best choice by growing all partial ones that may become it, site after site.

A partial choice is dropped where another one of the same sites matches or beats it in value and in every cost, and
where even the best rest, by a bound at some prices of the resources, leaves it above a value that is known to be
reachable. Costs are integers throughout, so that limits hold exactly.

Source: Dyer, Riha and Walker, A hybrid dynamic programming/branch-and-bound algorithm for the multiple-choice knapsack
problem (1995); Kellerer, Pferschy and Pisinger, Knapsack Problems (2004), sections 3.4 (lists), 11.5.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tdfx.planner import FloatArray, IntArray
from tdfx.planner.table import Table

BLOCK = 512
"""Partial choices that are compared with each other at once."""

WIDEST = 4
"""Multiple of the partial choices that may be kept, of which dominated ones are sought at most."""


def least_choice(
    table: Table, limits: IntArray, prices: FloatArray, most_value: float, most_kept: int
) -> tuple[IntArray | None, bool]:
    """Rows of the choice of least value within all limits, None if none is found, and whether that is proven.

    Args:
        table: the candidates.
        limits: (resources,).
        prices: (resources,), >= 0: value of one unit of each; any are right, good ones drop more.
        most_value: that the choice's value may be.
        most_kept: partial choices after each site; of more, those with the least value at these prices, which proves
            nothing.
    """
    value = table.value - table.least_value[table.site]
    cost = table.cost - table.least_cost[table.site]
    room = limits - table.least_cost.sum(axis=0)
    if (room < 0).any():
        return None, True
    priced = value + cost @ prices
    least = np.minimum.reduceat(priced, table.starts)
    rounding = 1e-9 * (value.sum() + room @ prices)
    bounds = most_value - table.least_value.sum() + room @ prices - (least.sum() - np.cumsum(least)) + rounding
    values, costs, totals = np.zeros(1), np.zeros((1, limits.size), dtype=np.int64), np.zeros(1)
    steps: list[tuple[IntArray, IntArray]] = []
    is_proven = True
    for rows, bound in zip(np.split(np.arange(table.site.size), table.starts[1:]), bounds, strict=True):
        parent, row = np.repeat(np.arange(values.size), rows.size), np.tile(rows, values.size)
        totals_of = totals[parent] + priced[row]
        kept = np.flatnonzero((totals_of <= bound) & (costs[parent] + cost[row] <= room).all(axis=1))
        kept = kept[np.argsort(totals_of[kept], kind="stable")]
        is_proven &= kept.size <= WIDEST * most_kept
        kept = kept[: WIDEST * most_kept]
        kept = kept[undominated(values[parent[kept]] + value[row[kept]], costs[parent[kept]] + cost[row[kept]])]
        is_proven &= kept.size <= most_kept
        kept = kept[:most_kept]
        if not kept.size:
            return None, is_proven
        parent, row = parent[kept], row[kept]
        values, costs, totals = values[parent] + value[row], costs[parent] + cost[row], totals[parent] + priced[row]
        steps.append((parent, row))
    place, chosen = int(values.argmin()), []
    for parent, row in reversed(steps):
        chosen.append(int(row[place]))
        place = int(parent[place])
    return np.array(chosen[::-1]), is_proven


def undominated(value: FloatArray, cost: IntArray) -> IntArray:
    """Which of these no other one matches or beats in value and in every cost, in their order; of equal ones one."""
    # None is dominated by one that comes after it in an order by value, then by costs.
    order = np.lexsort((*cost.T, value))
    cost = cost[order]
    kept = np.zeros(0, dtype=np.int64)
    for start in range(0, order.size, BLOCK):
        block = np.arange(start, min(start + BLOCK, order.size))
        block = block[~_is_matched(cost[block], cost[kept])]
        kept = np.append(kept, block[~np.triu(_matches(cost[block], cost[block]), 1).any(axis=0)])
    return np.sort(order[kept])


def _is_matched(cost: IntArray, kept: IntArray) -> NDArray[np.bool_]:
    """(n,): whether one of the kept is as cheap in every resource."""
    if not kept.size or cost.shape[1] > 2:
        return np.asarray(_matches(kept, cost).any(axis=0))
    kept = kept[np.argsort(kept[:, 0])]
    least = np.minimum.accumulate(kept[:, -1])  # of the last resource, among those as cheap in the first
    place = np.searchsorted(kept[:, 0], cost[:, 0], side="right")
    return (place > 0) & (least[place - 1] <= cost[:, -1])


def _matches(one: IntArray, other: IntArray) -> NDArray[np.bool_]:
    """(one, other): whether one is as cheap as the other in every resource."""
    found = np.ones((len(one), len(other)), dtype=bool)
    for column, against in zip(one.T, other.T, strict=True):
        found &= column[:, None] <= against
    return found
