"""What a trained CIFAR ResNet loses as it gets cheaper: the frontier, a drop as the budget, and which layers resist.

    python benchmarks/curves.py --data DIR [--drop 1%] [--out FOLDER]

Scores are top-1 on test images drawn at random; that of the network found within the drop is taken on the others too.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from cifar import images, top1, trained_resnet
from torch import nn

import tdfx
from tdfx.plots import plot_sensitivity
from tdfx.stages.frontier import frontier
from tdfx.stages.search import cheapest
from tdfx.stages.sensitivity import sensitivity


def main() -> None:
    """Prints the frontier, then the network found, then writes the pictures."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=os.environ.get("TDFX_DATA"), help="folder with the CIFAR files")
    options.add_argument("--depth", type=int, default=20)
    options.add_argument("--drop", default="1%", help="of the score of the network as given")
    options.add_argument("--images", type=int, default=1024, help="for calibration")
    options.add_argument("--scored", type=int, default=2000, help="test images that scores are taken on")
    options.add_argument("--methods", nargs="+", default=["svd", "spatial_svd", "tucker2"])
    options.add_argument("--points", type=int, default=8)
    options.add_argument("--out", type=Path, default=None, help="folder for frontier.csv and two pictures")
    options.add_argument("--cache", type=Path, default=None, help="folder that keeps errors and scores between runs")
    given = options.parse_args()
    if given.data is None:
        options.error("name the folder with the CIFAR files by --data or TDFX_DATA")
    model = trained_resnet(Path(given.data), given.depth)
    train = images(Path(given.data), "train")[0]
    test, labels = images(Path(given.data), "test")
    order, drawn = (torch.randperm(n, generator=torch.Generator().manual_seed(0)) for n in (len(train), len(test)))
    test, labels = test[drawn], labels[drawn]  # as stored, the first ones lose less than the others

    def score(network: nn.Module) -> float:
        return top1(network, test[: given.scored], labels[: given.scored])

    captured = tdfx.capture(model, test[:2])
    moments = tdfx.calibrate(captured, train[order[: given.images]], cache_dir=given.cache)
    profiled = tdfx.profile(captured, methods=given.methods, moments=moments, cache_dir=given.cache)
    kept = {"moments": moments, "evaluate": score, "cache_dir": given.cache}
    started = time.perf_counter()
    curve = frontier(captured, profiled, points=given.points, **kept)
    print(f"{curve}\n{time.perf_counter() - started:.0f} s\n", flush=True)
    started = time.perf_counter()
    result = cheapest(captured, profiled, f"drop={given.drop}", **kept)
    print(*result.report.notes, sep="\n")
    others = test[given.scored :], labels[given.scored :]
    print(
        f"on the {len(others[0])} other test images: {top1(model, *others):.2f} -> {top1(result.module, *others):.2f}"
    )
    print(f"{result.after.flops / result.before.flops:.1%} of the FLOPs; {time.perf_counter() - started:.0f} s")
    if given.out is None:
        return
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "frontier.csv").write_text(curve.to_csv())
    curve.to_png(given.out / "frontier.png")
    plot_sensitivity(sensitivity(profiled), given.out / "sensitivity.png")
    print(f"{given.out}: frontier.csv, frontier.png, sensitivity.png")


if __name__ == "__main__":
    main()
