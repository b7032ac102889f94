"""Plans made on measured latency: asked, predicted, measured; and plans by FLOPs with free ranks, on the grid, guarded.

    python benchmarks/latency.py [--networks resnet18 ...] [--threads 1 2] [--data DIR] [--peers "torch-pruning" ...]

All times are medians in ONNX Runtime, those of a network and its original taken in turn; guarded networks are timed
against their original in three runs. With --peers the outputs of other tools at the same FLOPs are timed beside them,
all in one run. Weights are random but for the CIFAR networks, which take --data; factors of the peers are random.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from cifar import images, trained_resnet
from networks import TextEncoder, VisionTransformer, mobilenet_v2, vgg16
from peers import pruned, uniform_rank, uniform_spatial_svd
from scale import ResNet
from time_ratios import time_ratios
from torch import Tensor, nn

import tdfx
from tdfx.budget import Budget
from tdfx.records.latency import Measured, Runtime
from tdfx.records.profile import Profile
from tdfx.stages.apply import carry_out
from tdfx.stages.guard import carry_out_measured, with_time
from tdfx.stages.latency import measured_rank_grid
from tdfx.tables import align, seconds

IMAGE = (1, 3, 224, 224)
RANDOM: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (lambda: ResNet(18), IMAGE),
    "resnet50": (lambda: ResNet(50), IMAGE),
    "vgg16": (vgg16, IMAGE),
    "mobilenet_v2": (mobilenet_v2, IMAGE),
    "vit_small": (VisionTransformer, IMAGE),
    "bert_small": (TextEncoder, (1, 128, 512)),
}
TRAINED = {"cifar_resnet20": 20, "cifar_resnet56": 56}
SHARES = (70, 50, 35)
GUARDED = (50, 30)  # percent of the FLOPs
RUNS = 3
Peer = Callable[[nn.Module, Tensor, float], tuple[nn.Module, float]]
PEERS: dict[str, Peer] = {
    "tensorly-torch CP": lambda m, x, share: uniform_rank(m, x, share, "cp", decompose=False),
    "tensorly-torch Tucker": lambda m, x, share: uniform_rank(m, x, share, "tucker", decompose=False),
    "torch-pruning": pruned,
    "AIMET spatial SVD": uniform_spatial_svd,
}
HEADER = ("network", "threads", "grid", "asked", "predicted", "measured", "quartiles", "FLOPs", "plans", "layers left")
NOTED = ("latency", "other processes")


def main() -> None:
    """Prints a row for every budget, as it is reached."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--networks", nargs="+", default=[*RANDOM, *TRAINED], choices=[*RANDOM, *TRAINED])
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options.add_argument(
        "--data", type=Path, default=os.environ.get("TDFX_DATA"), help="folder with the CIFAR networks"
    )
    options.add_argument("--peers", nargs="*", default=[], choices=list(PEERS), help="other tools to run beside")
    options.add_argument("--methods", nargs="+", default=["svd", "channel_svd", "spatial_svd", "tucker2", "tt"])
    options.add_argument("--cache", type=Path, default=None, help="folder that keeps errors and times between runs")
    given = options.parse_args()
    rows = []
    for name in given.networks:
        model, example = network(name, given.data)
        for threads in given.threads:
            for row in measured_rows(model, example, Runtime(threads), given):
                rows.append((name, str(threads), *row))
                print(*rows[-1], sep="  ", flush=True)
    print("\n" + align(HEADER, rows, right=range(1, 9)))


def network(name: str, data: Path | None) -> tuple[nn.Module, Tensor]:
    """A network and an example input."""
    torch.manual_seed(0)
    if name in RANDOM:
        make, shape = RANDOM[name]
        return make().eval(), torch.randn(shape)
    if data is None:
        raise SystemExit(f"{name}: name the folder with the CIFAR networks by --data or TDFX_DATA")
    return trained_resnet(Path(data), TRAINED[name]), images(Path(data), "test")[0][:2]


def measured_rows(
    model: nn.Module, example: Tensor, runtime: Runtime, given: argparse.Namespace
) -> Iterator[tuple[str, ...]]:
    """One row a budget, without the network's name."""
    cache = given.cache
    captured = tdfx.capture(model, example)
    grid = measured_rank_grid(runtime, cache)
    profiles = {
        multiple: tdfx.profile(captured, methods=given.methods, rank_multiple=multiple, cache_dir=cache, target=target)
        for multiple, target in ((grid, "ort-cpu"), (1, None))
    }
    started = time.perf_counter()
    table = tdfx.measure_latency(captured, profiles[grid], runtime=runtime, cache_dir=cache)
    took_s = time.perf_counter() - started
    print(f"{len(table.rows)} times in {took_s:.0f} s, whole {seconds(table.network_s)}", *table.notes, flush=True)
    timed = tdfx.with_latency(profiles[grid], table)

    def row(asked: str, multiple: int, make: Callable[[], tdfx.Result]) -> tuple[str, ...]:
        try:
            result = make()
        except tdfx.BudgetError as error:
            least = error.least.get("latency")
            share = "" if least is None else f" (least {1e-9 * least / table.network_s:.1%})"
            print(error, flush=True)
            return str(multiple), asked, "-", "-", "-", "-", "-", f"not reachable{share}"
        measured = result.report.measured
        assert measured is not None
        print(*(note for note in result.report.notes if note.startswith(NOTED)), sep="\n", flush=True)
        left = sum(candidate.is_dense for candidate in result.plan.candidates)
        return str(multiple), asked, *_cells(result, measured), f"{left} of {len(result.plan.candidates)}"

    def measured(asked: str, guard: str) -> tdfx.Result:
        def make(profile: Profile, within: Budget | None) -> tdfx.Result:
            return carry_out(captured, tdfx.plan(profile, within, slower=guard != "measured"))

        return carry_out_measured(captured, timed, Budget.parse(asked), make, runtime=runtime, guard=guard)

    def unguarded(asked: str, multiple: int) -> tdfx.Result:
        return with_time(captured, carry_out(captured, tdfx.plan(profiles[multiple], asked)), runtime)

    for share in SHARES:
        asked = f"latency={share}%"
        yield row(asked, grid, partial(measured, asked, "estimated"))
    yield row("flops=50%, free ranks", 1, partial(unguarded, "flops=50%", 1))
    yield row("flops=50%, grid", grid, partial(unguarded, "flops=50%", grid))
    kept: dict[str, nn.Module] = {}
    for share in GUARDED:

        def guarded(share: int = share) -> tdfx.Result:
            result = measured(f"flops={share}%", "measured")
            kept[f"flops={share}%, guarded"] = result.module
            return result

        yield row(f"flops={share}%, guarded", grid, guarded)
    for run in range(RUNS if kept else 0):
        for name, ratio in time_ratios(model, kept, example, runtime).items():
            yield str(grid), f"{name}, run {run + 1}", "-", f"{ratio:.1%}", "-", "-", "-", "-"
    yield from peer_rows(model, example, runtime, kept, given.peers)


def peer_rows(
    model: nn.Module, example: Tensor, runtime: Runtime, own: Mapping[str, nn.Module], peers: list[str]
) -> Iterator[tuple[str, ...]]:
    """Outputs of other tools at half of the FLOPs and the guarded networks, timed in one run."""
    made, shares = dict(own), {}
    for name in peers:
        try:
            made[name], shares[name] = PEERS[name](model, example, 0.5)
        except Exception as error:
            yield "-", name, "-", "-", "-", "-", "-", f"{type(error).__name__}: {str(error).splitlines()[0]}"
    for name, ratio in (time_ratios(model, made, example, runtime) if shares else {}).items():
        flops = f"{shares[name]:.1%}" if name in shares else "-"
        yield "-", f"{name}, beside peers", "-", f"{ratio:.1%}", "-", flops, "-", "-"


def _cells(result: tdfx.Result, measured: Measured) -> tuple[str, ...]:
    lower, upper = measured.quartiles
    return (
        "-" if measured.predicted_ratio is None else f"{measured.predicted_ratio:.1%}",
        f"{measured.ratio:.1%}",
        f"{lower:.1%} {upper:.1%}",
        f"{result.after.flops / result.before.flops:.1%}",
        str(measured.plans),
    )


if __name__ == "__main__":
    main()
