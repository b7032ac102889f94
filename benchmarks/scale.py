"""Full-size ResNets with random weights from capture to a written ONNX file: seconds by stage and memory.

Without data, or with --images calibrated on as many smooth random images for --metric.

Every network runs in a process of its own, so that the memory is its own. The definition follows He et al. 2016, with
the stride on the 3 x 3 convolution of a bottleneck.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tdfx
from tdfx.tables import align, count

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
STAGES = ("capture", "calibrate", "profile", "plan", "apply", "export", "whole")
HEADER = (
    "network",
    "params",
    "FLOPs",
    "sites",
    *(f"{stage} s" for stage in STAGES),
    "peak GB",
    "FLOPs after",
    "ORT diff",
)


class Block(nn.Module):
    """Basic block, or bottleneck where ``expansion`` is 4."""

    def __init__(self, inputs: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        outputs = width * expansion
        layers = (
            [(inputs, width, 3, stride), (width, width, 3, 1)]
            if expansion == 1
            else [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        )
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, s, k // 2, bias=False) for i, o, k, s in layers)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _, _ in layers)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(F.relu(y) if index else y))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """ImageNet ResNet. Input (batch, 3, 224, 224), output (batch, 1000)."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        expansion = 4 if depth >= 50 else 1
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        inputs, stages = 64, []
        for index, number in enumerate(BLOCKS[depth]):
            width = 64 << index
            for block in range(number):
                stages.append(Block(inputs, width, 2 if index and not block else 1, expansion))
                inputs = width * expansion
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(inputs, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def main() -> None:
    """Prints one row per network."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--depths", type=int, nargs="+", default=[18, 50, 101], choices=list(BLOCKS))
    options.add_argument("--methods", nargs="+", default=None, help="all if left out")
    options.add_argument("--budget", default="flops=50%")
    options.add_argument("--images", type=int, default=0, help="calibrate on so many of 224 x 224")
    options.add_argument("--metric", default=None, help='with --images: "loss" if left out, or "feature"')
    options.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.one, arguments)))
        return
    rows = []
    for depth in arguments.depths:
        command = [sys.executable, __file__, "--one", str(depth), "--budget", arguments.budget]
        command += ["--methods", *arguments.methods] if arguments.methods else []
        command += ["--images", str(arguments.images)]
        command += ["--metric", arguments.metric] if arguments.metric else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append((f"ResNet-{depth}", *json.loads(done.stdout.splitlines()[-1])))
        print(*rows[-1], sep="  ", flush=True)
    print(f"\n{torch.get_num_threads()} threads, budget {arguments.budget}\n")
    print(align(HEADER, rows, right=range(1, len(HEADER))))


def measure(depth: int, arguments: argparse.Namespace) -> tuple[str, ...]:
    """One row: size, seconds by stage, peak memory of this process, and what came out."""
    torch.manual_seed(0)
    model, example = ResNet(depth).eval(), torch.randn(1, 3, 224, 224)
    times = [time.perf_counter()]

    def lap() -> None:
        times.append(time.perf_counter())
        print(f"{STAGES[len(times) - 2]} {times[-1] - times[-2]:.1f} s", file=sys.stderr, flush=True)

    captured = tdfx.capture(model, example)
    lap()
    moments = None
    if arguments.images:
        coarse = torch.randn(arguments.images, 3, 14, 14)
        data = F.interpolate(coarse, 224, mode="bilinear") + 0.3 * torch.randn(arguments.images, 3, 224, 224)
        moments = tdfx.calibrate(captured, data, metric=arguments.metric or "loss")
    lap()
    profiled = tdfx.profile(captured, methods=arguments.methods, moments=moments, metric=arguments.metric)
    lap()
    plan = tdfx.plan(profiled, arguments.budget)
    lap()
    result = tdfx.apply(model, example, plan, moments=moments)
    lap()
    with tempfile.TemporaryDirectory() as folder:
        report = tdfx.export_onnx(result.module, Path(folder) / "model.onnx", example)
    lap()
    seconds = [after - before for before, after in pairwise(times)]
    return (
        count(result.before.params),
        count(result.before.flops),
        str(len(profiled.sites)),
        *(f"{value:.1f}" for value in (*seconds, sum(seconds))),
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f}",
        f"{result.after.flops / result.before.flops:.1%}",
        f"{report.max_rel_diff:.0e}",
    )


if __name__ == "__main__":
    main()
