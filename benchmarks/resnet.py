"""Top-1 and ONNX Runtime speed of compressed CIFAR ResNets, with no data and no tuning.

    python benchmarks/resnet.py --data DIR

Budgets are shares of the whole model's FLOPs. Speed is the median time of the original over that of the result,
both ONNX files run in turn in one process, one thread, batch 2.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from cifar import images, top1, trained_resnet

import tdfx
from tdfx.tables import align
from tdfx.timing import interleaved_medians

METHOD_SETS = {
    "svd family": ("svd", "spatial_svd"),
    "svd family + tucker2": ("svd", "spatial_svd", "tucker2"),
    "svd family + tucker2 + cp": ("svd", "spatial_svd", "tucker2", "cp"),
    "all": None,
}
HEADER = ("network", "methods", "grid", "asked", "FLOPs", "params", "top-1 (dense)", "speed", "seconds")


def main() -> None:
    """Prints one row per network, method set, grid and budget."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--data", type=Path, default=os.environ.get("TDFX_DATA"), help="folder with the CIFAR files")
    options.add_argument("--depths", type=int, nargs="+", default=[20, 56])
    options.add_argument("--budgets", type=int, nargs="+", default=[70, 50, 30], help="percent of the model's FLOPs")
    options.add_argument("--grids", type=int, nargs="+", default=[1, 16], help="rank_multiple")
    options.add_argument("--methods", nargs="+", default=list(METHOD_SETS), choices=list(METHOD_SETS))
    options.add_argument("--correct", action="store_true", help="biases, by what BatchNorm says of the inputs")
    options.add_argument("--cache", type=Path, default=None, help="folder that keeps errors between runs")
    arguments = options.parse_args()
    if arguments.data is None:
        options.error("name the folder with the CIFAR files by --data or TDFX_DATA")
    inputs, labels = images(Path(arguments.data), "test")
    rows = []
    for depth in arguments.depths:
        model = trained_resnet(Path(arguments.data), depth)
        for methods in arguments.methods:
            for grid in arguments.grids:
                for row in compress_all(model, methods, grid, arguments, inputs, labels):
                    rows.append((f"ResNet-{depth}", methods, str(grid), *row))
                    print(*rows[-1], sep="  ", flush=True)
    print()
    print(align(HEADER, rows, right=range(2, len(HEADER))))


def compress_all(
    model: torch.nn.Module,
    methods: str,
    grid: int,
    arguments: argparse.Namespace,
    inputs: torch.Tensor,
    labels: torch.Tensor,
) -> list[tuple[str, ...]]:
    """Rows for all budgets: one profile, then a plan and a network each."""
    example = inputs[:2]
    started = time.perf_counter()
    # Free ranks are for accuracy alone; ranks on the grid are those that the target's estimate calls faster.
    target = None if grid == 1 else "ort-cpu"
    profiled = tdfx.profile(
        tdfx.capture(model, example),
        methods=METHOD_SETS[methods],
        target=target,
        rank_multiple=grid,
        correct=arguments.correct,
        cache_dir=arguments.cache,
    )
    profile_s = time.perf_counter() - started
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        original = Path(folder) / "original.onnx"
        tdfx.export_onnx(model, original, example)
        dense = top1(model, inputs, labels)
        for share in arguments.budgets:
            started = time.perf_counter()
            try:
                result = tdfx.apply(model, example, tdfx.plan(profiled, f"flops={share}%"))
            except tdfx.BudgetError as error:
                rows.append((f"{share}%", f"least {error.least['flops'] / profiled.before.flops:.1%}", *["-"] * 4))
                continue
            seconds = profile_s + time.perf_counter() - started
            compressed = Path(folder) / f"{share}.onnx"
            tdfx.export_onnx(result.module, compressed, example)
            before_s, after_s = interleaved_medians([original, compressed], [example.numpy()])
            rows.append(
                (
                    f"{share}%",
                    f"{result.after.macs / result.before.macs:.1%}",
                    f"{result.after.params / result.before.params:.1%}",
                    f"{top1(result.module, inputs, labels):.1f} ({dense:.1f})",
                    f"{before_s / after_s:.2f}x",
                    f"{seconds:.0f}",
                )
            )
    return rows


if __name__ == "__main__":
    main()
