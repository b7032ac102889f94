"""Time and error of the decompositions against tensorly's, at the same form, dtype, rank and number of sweeps.

Layers have the shapes of ResNet-50 and of a 4096 x 4096 linear layer; weights are sums of random separable terms of
falling weight and noise. Both sides get the same tensor of float64 (or --dtype float32, which tdfx turns into float64
first) and run one after the other, repeatedly; times are medians, errors relative
Frobenius norms, computed in float64.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from unittest import mock

import tensorly as tl
import torch
from tensorly.decomposition import parafac, partial_tucker, tensor_train
from torch import Tensor

from tdfx.decompositions import als, registry, tucker2
from tdfx.records.layer import Rank
from tdfx.tables import align

HEADER = ("layer", "method", "rank", "tdfx s", "tensorly s", "times as fast", "error", "tensorly's", "ratio")
LAYERS = {
    "conv1": (64, 3, 7, 7),
    "layer1.conv2": (64, 64, 3, 3),
    "layer2.conv2": (128, 128, 3, 3),
    "layer3.conv2": (256, 256, 3, 3),
    "layer4.conv2": (512, 512, 3, 3),
    "layer4.conv3": (2048, 512, 1, 1),
    "linear": (4096, 4096),
}


@dataclass(frozen=True)
class Rival:
    """What tensorly does in a method's place: the approximation of a weight at a rank."""

    ranks: Callable[[tuple[int, ...]], Rank]
    approximate: Callable[[Tensor, Rank], Tensor]


def _tucker2(weight: Tensor, rank: Rank) -> Tensor:
    (core, factors), _ = partial_tucker(
        weight, rank=list(rank), modes=[0, 1], n_iter_max=tucker2.SWEEPS, tol=0, init="svd"
    )
    approximation: Tensor = tl.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
    return approximation


def _cp(weight: Tensor, rank: Rank) -> Tensor:
    tensor = weight.flatten(2)
    found = parafac(tensor, rank[0], n_iter_max=als.SWEEPS, tol=0, init="svd", random_state=0)
    approximation: Tensor = tl.cp_to_tensor(found)
    return approximation.reshape(weight.shape)


def _cp4(weight: Tensor, rank: Rank) -> Tensor:
    found = parafac(weight, rank[0], n_iter_max=als.SWEEPS, tol=0, init="svd", random_state=0)
    approximation: Tensor = tl.cp_to_tensor(found)
    return approximation


def _tt(weight: Tensor, rank: Rank) -> Tensor:
    found = tensor_train(weight.movedim(0, -1), [1, *rank, 1])
    approximation: Tensor = tl.tt_to_tensor(found)
    return approximation.movedim(-1, 0)


def _svd(weight: Tensor, rank: Rank) -> Tensor:
    u, s, v = tl.tenalg.svd_interface(weight.flatten(1), n_eigenvecs=rank[0])
    approximation: Tensor = (u * s) @ v
    return approximation.reshape(weight.shape)


def _half(shape: tuple[int, ...]) -> int:
    return max(min(shape[:2]) // 2, 2)


RIVALS = {
    "tucker2": Rival(lambda shape: (max(shape[0] // 2, 1), max(shape[1] // 2, 1)), _tucker2),
    "cp": Rival(lambda shape: (_half(shape),), _cp),
    "cp4": Rival(lambda shape: (_half(shape),), _cp4),
    "tt": Rival(lambda shape: (_half(shape),) * (len(shape) - 1), _tt),
    "svd": Rival(lambda shape: (shape[1] // 8,), _svd),
}


def main() -> None:
    """Prints one row per layer and method."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    options.add_argument("--methods", nargs="+", default=["tucker2", "cp", "tt", "svd"], choices=list(RIVALS))
    options.add_argument("--dtype", default="float64", choices=["float32", "float64"])
    options.add_argument("--sweeps", type=int, default=25, help="of alternating least squares, on both sides")
    options.add_argument("--repeats", type=int, default=3)
    arguments = options.parse_args()
    tl.set_backend("pytorch")
    rows = []
    with mock.patch.object(als, "SWEEPS", arguments.sweeps):
        for layer in arguments.layers:
            for name in arguments.methods:
                shape = LAYERS[layer]
                if (name == "svd") != (len(shape) == 2 or shape[2:] == (1, 1)):
                    continue
                row = compare(name, shape, arguments.repeats, getattr(torch, arguments.dtype))
                rows.append((layer, name, *row))
                print(*rows[-1], sep="  ", flush=True)
    for name in arguments.methods:
        own = [row for row in rows if row[1] == name]
        ours_s, theirs_s = (sum(float(row[column]) for row in own) for column in (3, 4))
        rows.append(
            ("all layers", name, "", f"{ours_s:.3f}", f"{theirs_s:.3f}", f"{theirs_s / ours_s:.1f}", "", "", "")
        )
    setting = f"{torch.get_num_threads()} threads, {arguments.dtype}, at most {arguments.sweeps} sweeps"
    print(f"\n{setting}, medians of {arguments.repeats}\n")
    print(align(HEADER, rows, right=range(3, len(HEADER))))


def compare(name: str, shape: tuple[int, ...], repeats: int, dtype: torch.dtype) -> tuple[str, ...]:
    """One row: times and errors of both sides."""
    weight = synthetic(shape).to(dtype)
    method, rival = registry()[name], RIVALS[name]
    rank = rival.ranks(shape)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        started = time.perf_counter()
        factors = method.decompose(weight.double(), rank)
        times[0].append(time.perf_counter() - started)
        started = time.perf_counter()
        theirs = rival.approximate(weight, rank)
        times[1].append(time.perf_counter() - started)
    errors = [relative_error(weight, approximation) for approximation in (method.reconstruct(factors), theirs)]
    ours_s, theirs_s = map(median, times)
    return (
        "x".join(map(str, rank)), f"{ours_s:.3f}", f"{theirs_s:.3f}", f"{theirs_s / ours_s:.1f}",
        f"{errors[0]:.4f}", f"{errors[1]:.4f}", f"{errors[0] / errors[1]:.4f}",
    )  # fmt: skip


def synthetic(shape: tuple[int, ...]) -> Tensor:
    """A weight whose spectrum falls as those of trained layers do."""
    generator = torch.Generator().manual_seed(0)
    terms = min(shape[:2])
    factors = [torch.randn(size, terms, generator=generator) for size in shape]
    decay = torch.arange(1, terms + 1).float() ** -0.7
    structured = ((factors[0] * decay) @ als.khatri_rao(factors[1:]).T).reshape(shape)
    return structured / structured.std() + 0.3 * torch.randn(shape, generator=generator)


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """Norm of the difference over that of the weight."""
    exact = weight.double()
    return float(torch.linalg.vector_norm(exact - approximation.double()) / torch.linalg.vector_norm(exact))


if __name__ == "__main__":
    main()
