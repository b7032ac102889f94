"""Trained CIFAR ResNets in float32 and int8, as they are and factorized: top-1, size and speed in ONNX Runtime.

    python benchmarks/quantize.py --data DIR

Factorized networks have half of the whole model's FLOPs, by the loss metric, ranks in multiples of 16 and unlabeled
images of the training set, which int8 files are calibrated on as well. Top-1 is on the test images. Speed is the median
over the rounds of the time of the dense float32 file over that of the file, all files run in turn in one process, one
thread, batch 2.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from cifar import images, trained_resnet
from torch import Tensor, nn

import tdfx
from tdfx.stages.apply import carry_out
from tdfx.tables import align, count
from tdfx.timing import open_session

METHODS = ("svd", "spatial_svd", "tucker2", "cp")
HEADER = ("network", "factors", "numbers", "top-1", "difference", "bytes", "median", "speed", "quartiles")


@dataclass(frozen=True)
class File:
    """An ONNX file; ``difference`` is that of its outputs in Euclidean norm, relative to those of the network."""

    path: Path
    factors: str
    numbers: str
    difference: float


def main() -> None:
    """Prints one line for each file."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=os.environ.get("TDFX_DATA"), help="folder with the CIFAR files")
    options.add_argument("--depths", type=int, nargs="+", default=[20])
    options.add_argument("--budget", type=int, default=50, help="percent of the model's FLOPs")
    options.add_argument("--images", type=int, default=1024, help="for calibration")
    options.add_argument("--rounds", type=int, default=300, help="timed runs of each file")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--cache", type=Path, default=None, help="folder that keeps errors and moments between runs")
    arguments = options.parse_args()
    if arguments.data is None:
        options.error("name the folder with the CIFAR files by --data or TDFX_DATA")
    data = Path(arguments.data)
    test, train = images(data, "test"), images(data, "train")[0]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(arguments.seed))
    calibration = train[order[: arguments.images]]
    rows = []
    for depth in arguments.depths:
        dense = trained_resnet(data, depth)
        factorized = compressed(dense, calibration, arguments)
        with tempfile.TemporaryDirectory() as folder:
            files = [
                file
                for name, network in (("dense", dense), ("factorized", factorized))
                for file in exported(network, name, Path(folder), test[0][:2], calibration)
            ]
            bench = tdfx.bench([file.path for file in files], test[0][:2], rounds=arguments.rounds)
            for file, timed in zip(files, bench.rows, strict=True):
                rows.append(
                    (
                        f"ResNet-{depth}",
                        file.factors,
                        file.numbers,
                        f"{top1(file.path, *test):.2f}",
                        f"{file.difference:.3f}",
                        f"{count(file.path.stat().st_size)}B",
                        f"{1e3 * timed.median_s:.2f} ms",
                        f"{timed.speed:.2f}x",
                        "{:.2f} to {:.2f}".format(*timed.speed_quartiles),
                    )
                )
                print(*rows[-1], sep="  ", flush=True)
    print(f"\n{arguments.images} calibration images, no labels; flops={arguments.budget}% where factorized\n")
    print(align(HEADER, rows, right=range(3, len(HEADER))))


def compressed(model: nn.Module, calibration: Tensor, arguments: argparse.Namespace) -> nn.Module:
    """The network at the budget."""
    captured = tdfx.capture(model, calibration[:2])
    moments = tdfx.calibrate(captured, calibration, metric="loss", seed=arguments.seed, cache_dir=arguments.cache)
    profiled = tdfx.profile(
        captured,
        methods=METHODS,
        metric="loss",
        moments=moments,
        rank_multiple=16,
        seed=arguments.seed,
        cache_dir=arguments.cache,
    )
    return carry_out(captured, tdfx.plan(profiled, f"flops={arguments.budget}%"), moments=moments).module


def exported(network: nn.Module, name: str, folder: Path, example: Tensor, calibration: Tensor) -> list[File]:
    """The network's files in float32 and int8."""
    paths = [folder / f"{name}.{numbers}.onnx" for numbers in ("float32", "int8")]
    tdfx.export_onnx(network, paths[0], example)
    int8 = tdfx.export_onnx(network, paths[1], example, quantize="int8", calibration=calibration).quantization
    assert int8 is not None
    (output,) = int8.outputs
    return [File(paths[0], name, "float32", 0.0), File(paths[1], name, "int8", output.rel_l2_diff)]


def top1(path: Path, inputs: Tensor, labels: Tensor) -> float:
    """Percentage of images whose largest logit of the file is the label's."""
    session = open_session(path)
    (name,) = (value.name for value in session.get_inputs())
    right = 0
    for batch, wanted in zip(inputs.split(100), labels.split(100), strict=True):
        (logits,) = session.run(None, {name: batch.numpy()})
        right += int((torch.from_numpy(logits).argmax(1) == wanted).sum())
    return 100 * right / len(labels)


if __name__ == "__main__":
    main()
