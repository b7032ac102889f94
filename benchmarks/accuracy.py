"""Top-1 of compressed CIFAR ResNets without labels: by metric, with corrections and with tuning.

    python benchmarks/accuracy.py --data DIR [--keep rows.jsonl]

Budgets are shares of the whole model's FLOPs. Calibration images are drawn from the training set by seed, without their
labels; top-1 is on the test images. Speed is the median, over rounds in which both ONNX files run once, of the
original's time over the result's; one thread, batch 2. With --keep every finished row is written at once, and a run
that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean

import torch
from cifar import images, top1, trained_resnet
from peers import Balf, GreedySpatialSvd, pruned, uniform_rank
from time_ratios import time_ratios
from torch import Tensor, nn

import tdfx
from tdfx.stages.apply import carry_out
from tdfx.tables import align

Compress = Callable[[float], tuple[nn.Module, float]]
"""From a share of the FLOPs to a network and the share it has."""


@dataclass(frozen=True)
class Setting:
    """A trained network, and images in the order of a seed.

    Attributes:
        images: of the training set, shuffled; the first ``calibrated`` are for calibration.
        test: images and labels.
        dense: top-1 of the network as given.
    """

    depth: int
    seed: int
    model: nn.Module
    images: Tensor
    calibrated: int
    test: tuple[Tensor, Tensor]
    dense: float

    @property
    def example(self) -> Tensor:
        """Two images."""
        return self.test[0][:2]

    @property
    def calibration(self) -> Tensor:
        """Images to calibrate on."""
        return self.images[: self.calibrated]


VARIANTS = {
    "weight": ("weight", False),
    "weight + correction": ("weight", True),
    "feature": ("feature", True),
    "loss": ("loss", True),
}
TUNED = " + tune"
PEERS: dict[str, Callable[[Setting], Compress]] = {
    "activation-aware SVD": lambda s: Balf(s.model, s.example, s.calibration, s.seed).network,
    "tensorly-torch CP, uniform": lambda s: lambda share: uniform_rank(s.model, s.example, share, "cp"),
    "tensorly-torch Tucker, uniform": lambda s: lambda share: uniform_rank(s.model, s.example, share, "tucker"),
    "AIMET spatial SVD, greedy": lambda s: GreedySpatialSvd(s.model, s.example, s.calibration).network,
    "torch-pruning, magnitude": lambda s: lambda share: pruned(s.model, s.example, share),
}
"""Other tools."""
HEADER = ("network", "variant", "grid", "asked", "FLOPs", "params", "top-1", "spread", "drop", "speed", "seconds", "GB")


@dataclass(frozen=True)
class Row:
    """One compressed network; ``seconds`` from profile to the finished network, ``gigabytes`` at most so far."""

    depth: int
    variant: str
    grid: int
    budget: int
    seed: int
    flops: float
    params: float
    score: float
    dense: float
    speed: float
    seconds: float
    gigabytes: float

    @property
    def key(self) -> tuple[object, ...]:
        """What was asked for."""
        return self.depth, self.variant, self.grid, self.budget, self.seed


def main() -> None:
    """Prints one line per network, variant, grid and budget: means over the seeds."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=os.environ.get("TDFX_DATA"), help="folder with the CIFAR files")
    options.add_argument("--depths", type=int, nargs="+", default=[20, 56])
    options.add_argument(
        "--budgets", type=int, nargs="+", default=[70, 50, 30, 20], help="percent of the model's FLOPs"
    )
    options.add_argument("--peer-budgets", type=int, nargs="+", default=None, help="those of --budgets if left out")
    options.add_argument("--grids", type=int, nargs="+", default=[1, 16], help="rank_multiple")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--images", type=int, default=1024, help="for calibration")
    options.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    options.add_argument("--tune", type=int, nargs="*", default=[30, 20], help="budgets at which loss is tuned as well")
    options.add_argument("--tune-images", type=int, default=8192)
    options.add_argument("--peers", nargs="*", default=[], choices=list(PEERS), help="other tools to run beside")
    options.add_argument("--methods", nargs="+", default=["svd", "spatial_svd", "tucker2", "cp"])
    options.add_argument("--cache", type=Path, default=None, help="folder that keeps errors and moments between runs")
    options.add_argument("--keep", type=Path, default=None, help="file that keeps finished rows between runs")
    arguments = options.parse_args()
    if arguments.data is None:
        options.error("name the folder with the CIFAR files by --data or TDFX_DATA")
    kept = _read(arguments.keep)
    data = Path(arguments.data)
    test, train = images(data, "test"), images(data, "train")[0]

    def setting(depth: int, seed: int) -> Setting:
        model = trained_resnet(data, depth)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        return Setting(depth, seed, model, train[order], arguments.images, test, top1(model, *test))

    def keep(row: Row) -> None:
        if row.key in kept:
            return
        kept[row.key] = row
        if arguments.keep is not None:
            with arguments.keep.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
        print(*row.key, f"{row.score:.2f} ({row.dense:.2f})", _times(row.speed), f"{row.seconds:.0f} s", flush=True)

    for depth, seed, grid, variant in product(arguments.depths, arguments.seeds, arguments.grids, arguments.variants):
        wanted = [b for b in arguments.budgets if (depth, variant, grid, b, seed) not in kept]
        tuned = [
            b
            for b in arguments.tune
            if variant == "loss" and b in arguments.budgets and (depth, variant + TUNED, grid, b, seed) not in kept
        ]
        if not wanted and not tuned:
            continue
        for row in compress_all(setting(depth, seed), grid, variant, sorted({*wanted, *tuned}), tuned, arguments):
            keep(row)
    for depth, seed, peer in product(arguments.depths, arguments.seeds, arguments.peers):
        budgets = arguments.peer_budgets or arguments.budgets
        wanted = [b for b in budgets if (depth, peer, 1, b, seed) not in kept]
        for row in peer_rows(setting(depth, seed), peer, wanted) if wanted else ():
            keep(row)
    print(f"\n{torch.get_num_threads()} threads, {arguments.images} calibration images, no labels\n")
    print(align(HEADER, table(kept.values()), right=range(2, len(HEADER))))


def compress_all(
    setting: Setting, grid: int, variant: str, budgets: list[int], tuned: list[int], arguments: argparse.Namespace
) -> Iterator[Row]:
    """Rows for all budgets: one profile, then a plan and a network each."""
    metric, correct = VARIANTS[variant]
    started = time.perf_counter()
    captured = tdfx.capture(setting.model, setting.example)
    moments = None
    if metric != "weight":
        moments = tdfx.calibrate(
            captured, setting.calibration, metric=metric, seed=setting.seed, cache_dir=arguments.cache
        )
    profiled = tdfx.profile(
        captured,
        methods=arguments.methods,
        metric=metric,
        moments=moments,
        correct=correct,
        # Free ranks are for accuracy alone; ranks on the grid are those that the target's estimate calls faster.
        target=None if grid == 1 else "ort-cpu",
        rank_multiple=grid,
        seed=setting.seed,
        cache_dir=arguments.cache,
    )
    profile_s = time.perf_counter() - started
    for budget in budgets:
        started = time.perf_counter()
        try:
            result = carry_out(captured, tdfx.plan(profiled, f"flops={budget}%"), moments=moments)
        except tdfx.BudgetError as error:
            print(
                setting.depth,
                variant,
                grid,
                f"{budget}%: least {error.least['flops'] / profiled.before.flops:.1%}",
                flush=True,
            )
            continue
        seconds = profile_s + time.perf_counter() - started
        yield _row(setting, variant, grid, budget, result, seconds)
        if budget in tuned:
            pool = setting.images[: arguments.tune_images]
            result = tdfx.tune(result, pool, minutes=2.8, seed=setting.seed)  # 3 with what is before and after
            seconds = result.report.timings_s["tune"]
            yield _row(setting, variant + TUNED, grid, budget, result, seconds)


def peer_rows(setting: Setting, peer: str, budgets: list[int]) -> Iterator[Row]:
    """Rows of another tool; speed and parameters are not measured."""
    started = time.perf_counter()
    compress = PEERS[peer](setting)
    prepared_s = time.perf_counter() - started
    for budget in budgets:
        started = time.perf_counter()
        network, flops = compress(budget / 100)
        seconds = prepared_s + time.perf_counter() - started
        yield Row(
            setting.depth, peer, 1, budget, setting.seed,
            flops=flops,
            params=math.nan,
            score=top1(network, *setting.test),
            dense=setting.dense,
            speed=math.nan,
            seconds=seconds,
            gigabytes=peak_gigabytes(),
        )  # fmt: skip


def _times(speed: float) -> str:
    return "-" if math.isnan(speed) else f"{speed:.2f}x"


def _row(setting: Setting, variant: str, grid: int, budget: int, result: tdfx.Result, seconds: float) -> Row:
    return Row(
        setting.depth, variant, grid, budget, setting.seed,
        flops=result.after.flops / result.before.flops,
        params=result.after.params / result.before.params,
        score=top1(result.module, *setting.test),
        dense=setting.dense,
        speed=1 / time_ratios(setting.model, {variant: result.module}, setting.example)[variant],
        seconds=seconds,
        gigabytes=peak_gigabytes(),
    )  # fmt: skip


def peak_gigabytes() -> float:
    """Most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def table(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """One line for the rows of all seeds."""
    groups: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.key[:-1]].append(row)
    lines = []
    for (depth, variant, grid, budget), group in groups.items():
        scores = [row.score for row in group]
        lines.append(
            (
                f"ResNet-{depth}", str(variant), str(grid), f"{budget}%",
                f"{mean(row.flops for row in group):.1%}",
                "-" if math.isnan(group[0].params) else f"{mean(row.params for row in group):.1%}",
                f"{mean(scores):.2f}",
                f"{max(scores) - min(scores):.2f} of {len(scores)}",
                f"{group[0].dense - mean(scores):.2f}",
                _times(mean(row.speed for row in group)),
                f"{mean(row.seconds for row in group):.0f}",
                f"{max(row.gigabytes for row in group):.1f}",
            )
        )  # fmt: skip
    return lines


def _read(path: Path | None) -> dict[tuple[object, ...], Row]:
    if path is None or not path.exists():
        return {}
    rows = [Row(**json.loads(line)) for line in path.read_text().splitlines()]
    return {row.key: row for row in rows}


if __name__ == "__main__":
    main()
