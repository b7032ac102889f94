"""One reading of the calibration data for one group of sites, which can be kept in a file between two batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, fx

from tdfx.data import Batch
from tdfx.errors import InputError, PassError
from tdfx.files import replacing
from tdfx.fisher import OutputLoss
from tdfx.passes.calibrate import AccumulateMoments, Sums

MOST_SAMPLES = 512
MOST_BYTES = 128_000_000


@dataclass
class Sweep:
    """What was summed up so far.

    Attributes:
        sums: by name of the site.
        loss: whose gradients are wanted; None for inputs alone.
        seed: of what the network itself draws.
        batches: how many were added.
        samples: in these.
        inputs: first samples, at most ``MOST_SAMPLES`` and ``MOST_BYTES``, one tensor a placeholder; the first batch
            alone where inputs are not divisible into samples.
        full: no more samples are kept in ``inputs``.
    """

    sums: dict[str, Sums]
    loss: OutputLoss | None
    seed: int = 0
    batches: int = 0
    samples: int = 0
    inputs: tuple[Tensor, ...] = ()
    full: bool = field(default=False)

    def add(self, module: fx.GraphModule, batch: Batch) -> None:
        """Runs a batch through the graph.

        Raises:
            InputError: the network does not run on it, or its loss is no number; names the batch.
        """
        loss, first = self.loss, self.samples
        device = next((parameter.device for parameter in module.parameters()), batch.inputs[0].device)
        try:
            AccumulateMoments(
                tuple(value.to(device) for value in batch.inputs),
                self.sums,
                None if loss is None else lambda output: loss(output, batch, first),
                self.seed + batch.index,
            ).run(module)
        except PassError as error:
            shapes = ", ".join(f"{str(value.dtype)[6:]} {tuple(value.shape)}" for value in batch.inputs)
            raise InputError(
                f"batch {batch.index} of the data: calibration failed on its inputs, {shapes} "
                f"({error.__cause__ or error}); expected inputs like the example inputs, and a loss that takes the "
                "network's output and the labels"
            ) from error
        self.keep(batch)
        self.batches += 1
        self.samples += batch.samples

    def keep(self, batch: Batch) -> None:
        """Keeps inputs for later stages, while they are few."""
        if self.full:
            return
        sample_bytes = sum(value.nbytes for value in batch.inputs) // batch.samples
        kept = len(self.inputs[0]) if self.inputs and self.inputs[0].dim() else 0
        room = min(MOST_SAMPLES, MOST_BYTES // max(1, sample_bytes)) - kept
        fits = batch.is_divisible and [value.shape[1:] for value in batch.inputs] == [
            value.shape[1:] for value in self.inputs or batch.inputs
        ]
        if self.inputs and not (fits and room > 0):
            self.full = True
            return
        new = tuple(value.detach().cpu() for value in batch.first(max(1, room)).inputs)
        pairs = zip(self.inputs or [value[:0] if value.dim() else value for value in new], new, strict=True)
        self.inputs = tuple(torch.cat(pair) if fits else pair[1].clone() for pair in pairs)
        self.full = not fits or room <= batch.samples

    def save(self, path: Path, digests: list[str]) -> None:
        """Writes a safetensors file, whole or not at all, with the digests of the batches that were added."""
        about: dict[str, Any] = {
            "digests": digests,
            "batches": self.batches,
            "samples": self.samples,
            "full": self.full,
            "variances": [] if self.loss is None else self.loss.variances,
            "positions": {name: sums.positions for name, sums in self.sums.items()},
            "reached": [name for name, sums in self.sums.items() if sums.reached],
        }
        tensors = {f"input:{index}": value for index, value in enumerate(self.inputs)}
        for name, sums in self.sums.items():
            tensors |= {f"{key}:{name}": value for key, value in _tensors(sums).items()}
        with replacing(path) as staged:
            safetensors.torch.save_file(tensors, staged, {"about": json.dumps(about)})

    def load(self, path: Path, is_known: Callable[[list[str]], bool]) -> None:
        """Takes over what ``save`` wrote for the same sites, if the digests of its batches are known."""
        try:
            with safe_open(path, "pt") as archive:
                about = json.loads(archive.metadata()["about"])
                if set(about["positions"]) != set(self.sums) or not is_known(about["digests"]):
                    return
                tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError):
            return
        self.batches, self.samples, self.full = about["batches"], about["samples"], about["full"]
        if self.loss is not None:
            self.loss.variances = about["variances"]
        count = sum(name.startswith("input:") for name in tensors)
        self.inputs = tuple(tensors[f"input:{index}"] for index in range(count))
        for name, sums in self.sums.items():
            sums.positions, sums.reached = about["positions"][name], name in about["reached"]
            for key in ("total", "gram", "out_gram", "shift"):
                setattr(sums, key, tensors.get(f"{key}:{name}"))


def _tensors(sums: Sums) -> Mapping[str, Tensor]:
    values = {"total": sums.total, "gram": sums.gram, "out_gram": sums.out_gram, "shift": sums.shift}
    return {key: value for key, value in values.items() if value is not None}
