"""How well a layer's declared ``loss`` tells the divergence that its compression alone causes.

    python benchmarks/ranking.py --data DIR

One layer at a time of a trained CIFAR ResNet is replaced by a chain; the divergence of the outputs from the original's
is measured on images that calibration has not seen. Printed are Spearman's rank correlation of declared and measured,
for every metric, and for ``loss`` quantiles of measured over declared, which would be 1 if positions were independent.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from cifar import images, trained_resnet
from scipy.stats import spearmanr
from torch import Tensor

import tdfx
from tdfx.chains import solve
from tdfx.correction import spliced
from tdfx.divergence import divergence
from tdfx.inputs import run
from tdfx.passes.candidates import site_weight
from tdfx.scoring import Scoring, taken_means
from tdfx.tables import align

METRICS = ("weight:absolute", "weight:relative", "feature:absolute", "feature:relative", "loss")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def main() -> None:
    """Prints the correlation by metric and the quantiles of the ratio."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=os.environ.get("TDFX_DATA"), help="folder with the CIFAR files")
    options.add_argument("--depth", type=int, default=20)
    options.add_argument("--images", type=int, default=1024, help="for calibration, and as many to measure on")
    options.add_argument("--methods", nargs="+", default=["spatial_svd", "cp"])
    options.add_argument("--ranks", type=int, default=3, help="by site and method")
    arguments = options.parse_args()
    if arguments.data is None:
        options.error("name the folder with the CIFAR files by --data or TDFX_DATA")
    model = trained_resnet(Path(arguments.data), arguments.depth)
    train = images(Path(arguments.data), "train")[0]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    calibration, held_out = (train[order[i * arguments.images : (i + 1) * arguments.images]] for i in (0, 1))
    captured = tdfx.capture(model, train[:2])
    moments = tdfx.calibrate(captured, calibration)
    profiled = tdfx.profile(captured, moments=moments, methods=arguments.methods, target=None, rank_multiple=1)
    declared, measured = pairs(captured, profiled, moments, held_out, arguments.ranks)
    ratios = torch.tensor([m / d for m, d in zip(measured, declared["loss"], strict=True)], dtype=torch.float64)
    print(f"ResNet-{arguments.depth}, {len(measured)} pairs of layer and rank, {len(held_out)} images held out\n")
    print(align(("metric", "Spearman"), [(n, f"{spearmanr(v, measured).statistic:.3f}") for n, v in declared.items()]))
    at = ", ".join(f"{q:.0%}: {float(ratios.quantile(q)):.2f}" for q in QUANTILES)
    print(f"\nmeasured divergence over declared loss, quantiles: {at}")


def pairs(
    captured: tdfx.Capture, profiled: tdfx.Profile, moments: tdfx.Moments, held_out: Tensor, ranks: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Declared errors by metric, and the divergences measured."""
    reference = outputs(captured.module, held_out)
    scorings = {name: Scoring(name, moments, taken_means(moments)) for name in METRICS}
    declared: dict[str, list[float]] = {name: [] for name in METRICS}
    measured = []
    for site in profiled.sites:
        weight = site_weight(captured.module, site)
        for method in sorted({c.method for c in profiled.of_site(site.name)} - {"dense"}):
            offered = [c for c in profiled.of_site(site.name) if c.method == method]
            step = max(1, len(offered) // ranks)
            for candidate in offered[step // 2 :: step][:ranks]:
                solved = solve(captured.module, site, candidate, scorings["loss"], 0)
                for name, scoring in scorings.items():
                    declared[name].append(solved.error(weight, scoring))
                network = spliced(captured.module, {site.name: solved})
                measured.append(float(divergence([reference], [outputs(network, held_out)], "logits")))
    return declared, measured


def outputs(module: torch.nn.Module, data: Tensor) -> Tensor:
    """Logits of all images, in batches."""
    return torch.cat([run(module, (batch,), {})[0] for batch in data.split(128)]).double()


if __name__ == "__main__":
    main()
