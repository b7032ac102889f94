"""How much the outputs of a transformer, an autoencoder and a denoiser change by compression, by metric.

    python benchmarks/regression.py --data DIR

The networks are trained here, on MNIST, in a minute or so each: a transformer that reads an image row by row and gives
logits, an autoencoder of linear layers, and a U-Net that takes noise away. Budgets are shares of the whole model's
FLOPs, ranks are free, nothing is tuned. Calibration inputs are drawn from the training set, without labels or clean
images.

Printed by metric are the squared change of the outputs on test images, over the squared deviation of the original's
outputs from their mean, and in brackets the score: top-1 (higher is better), or the mean squared error from the clean
image, its pixels between 0 and 1 (lower is better). The last columns are the change with ``feature`` and with ``loss``
over the smaller of the two with ``weight``.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tdfx
from tdfx.stages.apply import carry_out
from tdfx.tables import align

VARIANTS = {
    "weight": ("weight", False),
    "weight + correction": ("weight", True),
    "feature": ("feature", True),
    "loss": ("loss", True),
}
NOISE = 0.5  # standard deviation
SEED = 0
TEST = 2000  # images
BATCH = 64
RATE = 3e-3  # the highest
HEADER = ("network", "dense", "budget", *VARIANTS, "feature / weight", "loss / weight")


class Transformer(nn.Module):
    """Logits (batch, 10) of images (batch, 28, 28), which are read as sequences of 28 rows."""

    def __init__(self, width: int = 96, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(28, width)
        self.position = nn.Parameter(0.02 * torch.randn(28, width))
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x) + self.position).mean(1))


class Autoencoder(nn.Sequential):
    """Images (batch, 784) by way of 32 numbers."""

    def __init__(self) -> None:
        super().__init__(
            *_dense(784, 512), *_dense(512, 256), nn.Linear(256, 32), *_dense(32, 256), *_dense(256, 512),
            nn.Linear(512, 784),
        )  # fmt: skip


class UNet(nn.Module):
    """Images (batch, 1, 28, 28) at three resolutions, each joined with the one below (Ronneberger et al. 2015)."""

    def __init__(self, fine: int = 12, middle: int = 32, coarse: int = 96) -> None:
        super().__init__()
        self.down1 = nn.Sequential(*_conv(1, fine), *_conv(fine, fine))
        self.down2 = nn.Sequential(*_conv(fine, middle), *_conv(middle, middle))
        self.bottom = nn.Sequential(*_conv(middle, coarse), *_conv(coarse, coarse))
        self.up2 = nn.Sequential(*_conv(coarse + middle, middle), *_conv(middle, middle))
        self.up1 = nn.Sequential(*_conv(middle + fine, fine), *_conv(fine, fine))
        self.out = nn.Conv2d(fine, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        middle = self.down2(F.max_pool2d(fine, 2))
        coarse = self.bottom(F.max_pool2d(middle, 2))
        middle = self.up2(torch.cat([F.interpolate(coarse, scale_factor=2.0), middle], 1))
        return self.out(self.up1(torch.cat([F.interpolate(middle, scale_factor=2.0), fine], 1)))


@dataclass(frozen=True)
class Task:
    """What a network is trained to do.

    Attributes:
        network: makes it, untrained.
        loss: of outputs and targets.
        score: of outputs and targets, as it is printed.
        steps: of training.
        train: inputs and targets.
        test: inputs and targets.
    """

    network: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], str]
    steps: int
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def main() -> None:
    """Prints a line per network and budget."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=os.environ.get("TDFX_DATA"), help="folder with mnist.npz")
    options.add_argument("--budgets", type=int, nargs="+", default=[50, 30], help="percent of the model's FLOPs")
    options.add_argument("--images", type=int, default=512, help="for calibration")
    options.add_argument("--methods", nargs="+", default=["svd", "channel_svd", "spatial_svd", "tucker2", "cp"])
    options.add_argument("--cache", type=Path, default=None, help="folder that keeps errors between runs")
    arguments = options.parse_args()
    if arguments.data is None:
        options.error("name the folder with mnist.npz by --data or TDFX_DATA")
    rows = []
    for name, task in tasks(Path(arguments.data)).items():
        started = time.perf_counter()
        network = trained(task)
        print(f"{name}: trained in {time.perf_counter() - started:.0f} s", flush=True)
        rows += [(name, *row) for row in compress_all(task, network, arguments)]
    print(f"\n{torch.get_num_threads()} threads, {arguments.images} calibration images\n")
    print(align(HEADER, rows, right=range(1, len(HEADER))))


def tasks(folder: Path) -> dict[str, Task]:
    """By name; pixels lie between 0 and 1."""
    with np.load(folder / "mnist.npz") as archive:
        images = [torch.from_numpy(archive[f"{split}_images"]).float() / 255 for split in ("train", "test")]
        labels = [torch.from_numpy(archive[f"{split}_labels"].astype(np.int64)) for split in ("train", "test")]
    images[1], labels[1] = images[1][:TEST], labels[1][:TEST]
    rows, layers = [value.flatten(1) for value in images], [value.unsqueeze(1) for value in images]
    draws = torch.Generator().manual_seed(SEED)
    noisy = [value + NOISE * torch.randn(value.shape, generator=draws) for value in layers]
    return {
        "transformer": Task(Transformer, F.cross_entropy, top1, 1000, *zip(images, labels, strict=True)),
        "autoencoder": Task(Autoencoder, F.mse_loss, squared_error, 2000, *zip(rows, rows, strict=True)),
        "denoiser": Task(UNet, F.mse_loss, squared_error, 150, *zip(noisy, layers, strict=True)),
    }


def trained(task: Task) -> nn.Module:
    """The network after its training, in eval mode."""
    torch.manual_seed(SEED)
    network = task.network().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=task.steps)
    inputs, targets = task.train
    for _ in range(task.steps):
        drawn = torch.randint(len(inputs), (BATCH,))
        loss = task.loss(network(inputs[drawn]), targets[drawn])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def compress_all(task: Task, network: nn.Module, arguments: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """The lines of a network, without its name: moments taken once, a profile for each variant."""
    inputs, targets = task.test
    reference = outputs(network, inputs)
    order = torch.randperm(len(task.train[0]), generator=torch.Generator().manual_seed(SEED))
    captured = tdfx.capture(network, inputs[:2])
    moments = tdfx.calibrate(captured, task.train[0][order[: arguments.images]], cache_dir=arguments.cache)
    print(f"  calibrated on {moments.samples} images, outputs are {moments.output}", flush=True)
    found: dict[tuple[int, str], Tensor] = {}
    for variant, (metric, correct) in VARIANTS.items():
        started = time.perf_counter()
        known = None if metric == "weight" else moments
        profiled = tdfx.profile(
            captured,
            methods=arguments.methods,
            metric=metric,
            moments=known,
            correct=correct,
            target=None,
            rank_multiple=1,
            cache_dir=arguments.cache,
        )
        shares = []
        for budget in arguments.budgets:
            result = carry_out(captured, tdfx.plan(profiled, f"flops={budget}%"), moments=known)
            found[budget, variant] = outputs(result.module, inputs)
            shares.append(f"{result.after.flops / result.before.flops:.1%}")
        print(f"  {variant}: FLOPs {', '.join(shares)}, {time.perf_counter() - started:.0f} s", flush=True)
    for budget in arguments.budgets:
        errors = {variant: change(reference, found[budget, variant]) for variant in VARIANTS}
        cells = [f"{error:.4f} ({task.score(found[budget, variant], targets)})" for variant, error in errors.items()]
        least = min(errors["weight"], errors["weight + correction"])
        ratios = [f"{errors[metric] / least:.2f}" for metric in ("feature", "loss")]
        yield task.score(reference, targets), f"{budget}%", *cells, *ratios


def change(reference: Tensor, found: Tensor) -> float:
    """Squared difference over the squared deviation of the reference from its mean over samples."""
    return float((found - reference).square().sum() / (reference - reference.mean(0)).square().sum())


def top1(logits: Tensor, labels: Tensor) -> str:
    """Percentage of rows whose largest logit is the label's."""
    return f"{float((logits.argmax(1) == labels).float().mean()):.1%}"


def squared_error(found: Tensor, wanted: Tensor) -> str:
    """Mean over pixels."""
    return f"{float(F.mse_loss(found, wanted)):.5f}"


@torch.no_grad()
def outputs(network: nn.Module, inputs: Tensor) -> Tensor:
    """Of all inputs, in batches."""
    return torch.cat([network(batch) for batch in inputs.split(100)])


def _dense(in_features: int, out_features: int) -> tuple[nn.Module, ...]:
    return nn.Linear(in_features, out_features, bias=False), nn.BatchNorm1d(out_features), nn.ReLU()


def _conv(in_channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return conv, nn.BatchNorm2d(out_channels), nn.ReLU()


if __name__ == "__main__":
    main()
