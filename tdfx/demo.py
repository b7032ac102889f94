"""``tdfx demo``: trains a network on real handwritten digits, halves its FLOPs and shows what that did.

The digits are the 1,797 of scikit-learn's ``load_digits`` (UCI optical recognition of handwritten digits), enlarged to
16 x 16; a fifth is held out. Accuracy and latency are those of the two ONNX files, in ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdfx.errors import InputError
from tdfx.onnx_export import ExportReport, export_onnx
from tdfx.progress import reporter
from tdfx.records.cost import Cost
from tdfx.saving import output_folder, save_state_dict
from tdfx.stages.compress import compress
from tdfx.tables import align, count, seconds, share
from tdfx.timing import interleaved_medians, open_session

SEED = 0
SIDE = 16  # pixels, enlarged from 8
HELD_OUT = 360
EPOCHS, BATCH, RATE = 4, 64, 0.1
BUDGET = "flops=50%"
CALIBRATION = 256  # unlabeled images
MOST_LOST, MOST_FLOPS, MOST_DIFFERENCE = 0.02, 0.5, 1e-4


class DigitsNet(nn.Sequential):
    """A plain convolutional network. Input (batch, 1, 16, 16), output (batch, 10)."""

    def __init__(self) -> None:
        super().__init__(
            *_block(1, 64),
            *_block(64, 64),
            nn.MaxPool2d(2),
            *_block(64, 64),
            *_block(64, 128),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(128, 10),
        )


@dataclass(frozen=True)
class Digits:
    """Images (count, 1, 16, 16) and labels (count,), to train on and held out."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


@dataclass(frozen=True)
class Figures:
    """What one ONNX file was measured to be.

    Attributes:
        accuracy: share of the held-out digits that it recognises.
        flops: floating-point operations for one image.
        params: number of parameters.
        file_bytes: size of the file.
        latency_s: median seconds for one image, one thread.
        parity: largest relative difference of its outputs from the torch network's.
    """

    accuracy: float
    flops: int
    params: int
    file_bytes: int
    latency_s: float
    parity: float


def demo(
    out: Path, echo: Callable[[str], None] = print, *, epochs: int = EPOCHS, images: int | None = None
) -> list[str]:
    """Trains, compresses, exports and measures.

    Args:
        out: folder for both ONNX files, both state dicts, the plan and the report.
        echo: takes the text to show.
        epochs: of the training.
        images: number of images to train on, None for all.

    Returns:
        What is not as promised, empty if all is.

    Raises:
        InputError: scikit-learn is missing, or the folder cannot be written to.
    """
    with output_folder(out) as output, one_thread():
        digits = load_digits()
        network = train(digits.images[:images], digits.labels[:images], epochs)
        example = digits.held_out_images[:1]
        original_export = export_onnx(network, out / "original.onnx", example)
        save_state_dict(network, out / "original.safetensors")
        result = compress(network, example, budget=BUDGET, calibration=digits.images[:CALIBRATION])
        export = output.save(result, (example,), {})
    echo(f"{result.plan}\n")
    files = (out / "original.onnx", out / "model.onnx")
    accuracies = [evaluate(file, digits.held_out_images, digits.held_out_labels) for file in files]
    latencies = interleaved_medians(files, [example.numpy()])
    before, after = (
        _figures(*figures)
        for figures in zip(accuracies, (result.before, result.after), latencies, (original_export, export), strict=True)
    )
    echo(table(before, after))
    echo(f"\nboth networks, the plan and the report are in {out}")
    return checks(before, after)


def load_digits() -> Digits:
    """The digits, split at random with a fixed seed.

    Raises:
        InputError: scikit-learn, which holds them, is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise InputError("the demo needs scikit-learn for its digits; pip install tdfx[demo]") from error
    found = datasets.load_digits()
    images = torch.tensor(found.images / 8 - 1, dtype=torch.float32).unsqueeze(1)  # 0 to 16 becomes -1 to 1
    images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    labels = torch.tensor(found.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    held_out, rest = order[:HELD_OUT], order[HELD_OUT:]
    return Digits(images[rest], labels[rest], images[held_out], labels[held_out])


def train(images: Tensor, labels: Tensor, epochs: int = EPOCHS) -> DigitsNet:
    """A network trained on these digits, in eval mode; the caller's random numbers stay as they are."""
    batches = -(-len(images) // BATCH)
    with torch.random.fork_rng(devices=[]), reporter(None) as report:
        torch.manual_seed(SEED)
        network = DigitsNet()
        optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * batches)
        for step in range(epochs * batches):
            if step % batches == 0:
                order = torch.randperm(len(images)).chunk(batches)
            batch = order[step % batches]
            loss = F.cross_entropy(network(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            report("training", step + 1, epochs * batches)
    return network.eval()


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch: the same figures on any number of cores, and no threads that wait for busy ones."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def evaluate(file: Path, images: Tensor, labels: Tensor) -> float:
    """Share of the images that an ONNX file labels right."""
    session = open_session(file)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return float(np.mean(logits.argmax(1) == labels.numpy()))


def table(old: Figures, new: Figures) -> str:
    """Both networks side by side."""
    gained = f"{100 * (new.accuracy - old.accuracy):+.1f} points"
    speedup = f"{old.latency_s / new.latency_s:.2f}x as fast"
    rows = [
        ("accuracy", f"{old.accuracy:.1%}", f"{new.accuracy:.1%}", gained),
        ("FLOPs", count(old.flops), count(new.flops), share(new.flops, old.flops)),
        ("parameters", count(old.params), count(new.params), share(new.params, old.params)),
        ("file", f"{count(old.file_bytes)}B", f"{count(new.file_bytes)}B", share(new.file_bytes, old.file_bytes)),
        ("latency", seconds(old.latency_s), seconds(new.latency_s), speedup),
        ("parity", f"{old.parity:.1g}", f"{new.parity:.1g}", ""),
    ]
    title = f"{HELD_OUT} held-out digits; ONNX Runtime, one image, one thread"
    return f"{title}\n\n{align(('', 'original', 'compressed', ''), rows, right=(1, 2))}"


def checks(old: Figures, new: Figures) -> list[str]:
    """What the compressed network fails to keep of the demo's promises, in words."""
    lost = old.accuracy - new.accuracy
    parity = max(old.parity, new.parity)
    flops, times = share(new.flops, old.flops), f"{seconds(new.latency_s)}, the original {seconds(old.latency_s)}"
    promises = (
        (lost <= MOST_LOST, f"accuracy fell by {100 * lost:.2f} points; at most {100 * MOST_LOST:g} were promised"),
        (new.flops <= MOST_FLOPS * old.flops, f"FLOPs are {flops} of the original's; {MOST_FLOPS:.0%} were promised"),
        (parity <= MOST_DIFFERENCE, f"ONNX Runtime differs by {parity:.2g}; {MOST_DIFFERENCE:g} was promised"),
        (new.latency_s < old.latency_s, f"the compressed network takes {times}; less was promised"),
    )
    return [failure for kept, failure in promises if not kept]


def _block(in_channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return conv, nn.BatchNorm2d(out_channels), nn.ReLU()


def _figures(accuracy: float, cost: Cost, latency_s: float, export: ExportReport) -> Figures:
    return Figures(accuracy, cost.flops, cost.params, export.file_bytes, latency_s, export.max_rel_diff)
