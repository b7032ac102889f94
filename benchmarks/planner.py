"""Time of the planners, and what greedy loses against knapsack.

    python benchmarks/planner.py [--data DIR]

First made-up instances: 60 sites with 60 candidates each, error falling with cost as in low-rank approximation, at a
decay drawn anew for every site; budgets are half and a third of the dense total. With two resources, which greedy does
not take, parameters are unrelated to MACs. Objectives are relative to knapsack's, the largest of all instances.

With the folder of the CIFAR files also real profiles: trained CIFAR ResNets, budgets as shares of the whole model's
FLOPs. The objective is the sum of squared errors; top-1 is that of the plan's network, with no data and no tuning.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from cifar import images, top1, trained_resnet

import tdfx
from tdfx.metrics import contribution
from tdfx.planner import FloatArray, IntArray, find_planner
from tdfx.tables import align

SITES, CANDIDATES, SEEDS, REPEATS = 60, 60, 5, 5
PLANNERS = ("knapsack", "greedy")
METHODS = ("svd", "spatial_svd", "tucker2", "cp")
RANK_MULTIPLE = 16
T = TypeVar("T")


def main() -> None:
    """Prints a table of made-up instances and, with the data, one of real profiles."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=os.environ.get("TDFX_DATA"), help="folder with the CIFAR files")
    options.add_argument("--depths", type=int, nargs="+", default=[20, 56])
    options.add_argument("--budgets", type=int, nargs="+", default=[70, 50, 30], help="percent of the model's FLOPs")
    options.add_argument("--cache", type=Path, default=None, help="folder that keeps errors between runs")
    arguments = options.parse_args()
    header = ("resources", "share", "planner", "median s", "most s", "objective")
    print(align(header, made_up_rows(), right=(0, 1, 3, 4, 5)))
    if arguments.data is not None:
        header = ("network", "budget", "planner", "FLOPs", "objective", "plan s", "top-1 (dense)")
        print()
        print(align(header, real_rows(arguments), right=range(3, len(header))))


def made_up_rows() -> list[tuple[str, ...]]:
    """A row per number of resources, share and planner."""
    rows = []
    for resources in (1, 2):
        for share in (0.5, 0.33):
            best: list[float] = []
            for planner in PLANNERS[: 1 if resources > 1 else None]:
                times, totals = [], []
                for seed in range(SEEDS):
                    values, costs, dense = instance(seed, resources)
                    limits = (dense * share).astype(np.int64)
                    chosen, seconds = timed(find_planner(planner), values, costs, limits)
                    times.append(seconds)
                    totals.append(sum(float(value[i]) for value, i in zip(values, chosen, strict=True)))
                best = best or totals
                worst = max(total / least for total, least in zip(totals, best, strict=True))
                seconds_ = (f"{statistics.median(times):.3f}", f"{max(times):.3f}")
                rows.append((str(resources), f"{share:.0%}", planner, *seconds_, f"{worst:.4f}"))
    return rows


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


def real_rows(arguments: argparse.Namespace) -> list[tuple[str, ...]]:
    """A row per network, budget and planner: one profile a network, then a plan and a network each."""
    inputs, labels = images(Path(arguments.data), "test")
    example, rows = inputs[:2], []
    for depth in arguments.depths:
        model = trained_resnet(Path(arguments.data), depth)
        dense = top1(model, inputs, labels)
        captured = tdfx.capture(model, example)
        profiled = tdfx.profile(captured, methods=METHODS, rank_multiple=RANK_MULTIPLE, cache_dir=arguments.cache)
        for share in arguments.budgets:
            for planner in PLANNERS:
                runs = [timed(tdfx.plan, profiled, f"flops={share}%", planner=planner) for _ in range(REPEATS)]
                plan = runs[0][0]
                accuracy = top1(tdfx.apply(model, example, plan).module, inputs, labels)
                rows.append(
                    (
                        f"ResNet-{depth}",
                        f"flops={share}%",
                        planner,
                        f"{plan.after.macs / plan.before.macs:.2%}",
                        f"{sum(contribution(candidate.metric, candidate.error) for candidate in plan.candidates):.5f}",
                        f"{statistics.median(seconds for _, seconds in runs):.3f}",
                        f"{accuracy:.2f} ({dense:.2f})",
                    )
                )
    return rows


def timed(function: Callable[..., T], *args: Any, **kwargs: Any) -> tuple[T, float]:
    """What a call returns, and its seconds."""
    started = time.perf_counter()
    found = function(*args, **kwargs)
    return found, time.perf_counter() - started


if __name__ == "__main__":
    main()
