"""Accuracy beside time: the plan made for a share of the latency against the plan by FLOPs that takes as long.

    python benchmarks/latency_accuracy.py --data DIR [--depths 20 56] [--share 50]

The share of the FLOPs is searched until the measured time is within 2% of the first network's. Both plans choose from
the same profile (the metric loss, ranks on the measured grid); all times are medians in ONNX Runtime, one thread, in
turn with the original.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from cifar import images, top1, trained_resnet

import tdfx
from tdfx.budget import Budget
from tdfx.records.capture import Capture
from tdfx.records.latency import Runtime
from tdfx.records.profile import Profile
from tdfx.stages.apply import carry_out
from tdfx.stages.guard import carry_out_measured, with_time
from tdfx.stages.latency import measured_rank_grid
from tdfx.tables import align

HEADER = ("network", "plan", "FLOPs", "time", "top-1", "drop")
HALVINGS = 12
SAME = 0.02  # of the time


def main() -> None:
    """Prints two rows a network."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=os.environ.get("TDFX_DATA"), help="folder with the CIFAR files")
    options.add_argument("--depths", type=int, nargs="+", default=[20, 56])
    options.add_argument("--share", type=int, default=50, help="percent of the latency")
    options.add_argument("--images", type=int, default=1024, help="for calibration")
    options.add_argument("--methods", nargs="+", default=["svd", "channel_svd", "spatial_svd", "tucker2", "tt"])
    options.add_argument("--cache", type=Path, default=None, help="folder that keeps errors and times between runs")
    given = options.parse_args()
    if given.data is None:
        options.error("name the folder with the CIFAR files by --data or TDFX_DATA")
    test, train = images(Path(given.data), "test"), images(Path(given.data), "train")[0]
    rows, runtime = [], Runtime()
    for depth in given.depths:
        model = trained_resnet(Path(given.data), depth)
        captured = tdfx.capture(model, test[0][:2])
        moments = tdfx.calibrate(captured, train[: given.images], cache_dir=given.cache)
        grid = measured_rank_grid(runtime, given.cache)
        profiled = tdfx.profile(
            captured, methods=given.methods, moments=moments, rank_multiple=grid, cache_dir=given.cache
        )
        table = tdfx.measure_latency(captured, profiled, runtime=runtime, cache_dir=given.cache)
        budget = Budget.parse(f"latency={given.share}%")
        by_time = carry_out_measured(
            captured,
            tdfx.with_latency(profiled, table),
            budget,
            lambda found, within: carry_out(captured, tdfx.plan(found, within), moments=moments),  # noqa: B023
            runtime=runtime,
            guard="estimated",
        )
        by_flops = as_quick(captured, profiled, moments, _ratio(by_time), runtime)
        dense = top1(model, *test)
        for name, result in ((str(budget), by_time), ("by FLOPs", by_flops)):
            score = top1(result.module, *test)
            flops = f"{result.after.flops / result.before.flops:.1%}"
            rows.append(
                (f"ResNet-{depth}", name, flops, f"{_ratio(result):.1%}", f"{score:.2f}", f"{dense - score:.2f}")
            )
            print(*rows[-1], sep="  ", flush=True)
    print("\n" + align(HEADER, rows, right=range(2, 6)))


def as_quick(captured: Capture, profile: Profile, moments: tdfx.Moments, ratio: float, runtime: Runtime) -> tdfx.Result:
    """The network of a plan by FLOPs that takes this share of the original's time, as near as there is one."""
    low, high = 0.0, 1.0
    found: list[tdfx.Result] = []
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        try:
            chosen = tdfx.plan(profile, f"flops={100 * middle:.6f}%")
        except tdfx.BudgetError:
            low = middle
            continue
        found.append(with_time(captured, carry_out(captured, chosen, moments=moments), runtime))
        if abs(_ratio(found[-1]) / ratio - 1) <= SAME:
            break
        low, high = (middle, high) if _ratio(found[-1]) < ratio else (low, middle)
    return min(found, key=lambda result: abs(_ratio(result) - ratio))


def _ratio(result: tdfx.Result) -> float:
    assert result.report.measured is not None
    return result.report.measured.ratio


if __name__ == "__main__":
    main()
