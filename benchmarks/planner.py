"""Time of the knapsack planner on 60 sites with 60 candidates each.

    python benchmarks/planner.py

Error falls with cost as in low-rank approximation, at a decay drawn anew for every site; budgets are half and a third
of the dense total. With two resources, parameters are unrelated to MACs.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from tdfx.planner import FloatArray, IntArray, find_planner
from tdfx.tables import align

SITES, CANDIDATES, SEEDS = 60, 60, 5


def instance(seed: int, resources: int) -> tuple[list[FloatArray], list[IntArray], IntArray]:
    """Values, costs and dense totals; candidate 0 of each site is dense, and all MACs are multiples of 64."""
    draws = np.random.default_rng(seed)
    values, costs = [], []
    for _ in range(SITES):
        shares = np.append(1.0, np.sort(draws.uniform(0.02, 0.95, CANDIDATES - 1))[::-1])
        values.append(np.exp(-2 * draws.uniform(1, 6) * shares) * (shares < 1))
        dense = draws.integers(10**4, 10**6, resources) * 64
        others = [draws.permutation(shares) for _ in range(resources - 1)]
        costs.append(np.stack([64 * np.rint(d * s / 64) for d, s in zip(dense, [shares, *others], strict=True)], 1))
    whole = [cost.astype(np.int64) for cost in costs]
    return values, whole, sum(cost[0] for cost in whole)


def main() -> None:
    """Prints a row per number of resources and share."""
    rows = []
    for resources in (1, 2):
        for share in (0.5, 0.33):
            times = []
            for seed in range(SEEDS):
                values, costs, dense = instance(seed, resources)
                started = time.perf_counter()
                find_planner("knapsack")(values, costs, (dense * share).astype(np.int64))
                times.append(time.perf_counter() - started)
            rows.append((str(resources), f"{share:.0%}", f"{statistics.median(times):.2f}", f"{max(times):.2f}"))
    print(align(("resources", "share", "median s", "most s"), rows, right=range(4)))


if __name__ == "__main__":
    main()
