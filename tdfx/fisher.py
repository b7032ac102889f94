"""Losses whose gradients have the Fisher matrix for second moment: targets are drawn from the network's own output.

For logits z the loss is -log p(t) with t drawn from p = softmax(z) (the true Fisher matrix, not the empirical one:
Kunstner et al. 2019, section 2). For values y it is the projection sum_j xi_j y_j / (sigma sqrt(m)), xi standard normal
and m the outputs of a sample: the expected square of its change is the relative squared error of y.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tdfx.data import Batch
from tdfx.divergence import floats, variance
from tdfx.errors import InputError
from tdfx.inputs import tensors

Loss = Callable[[Any, Any], Tensor]


@dataclass
class OutputLoss:
    """The loss of one batch, summed over its samples.

    Draws are seeded sample by sample: however samples are put in batches, each meets the same target.

    Attributes:
        output: "logits", "values" or "labels".
        loss: for "labels", of the network's output and the batch's labels.
        seed: of the draws.
        variances: for "values", of each float output; those of the first batch if empty.
    """

    output: str
    loss: Loss | None = None
    seed: int = 0
    variances: list[float] = field(default_factory=list)

    def __call__(self, output: Any, batch: Batch, first: int) -> Tensor:
        """A scalar that gradients can be taken of.

        Args:
            output: of the network on the batch.
            batch: its index and labels.
            first: number of the batch's first sample.

        Raises:
            InputError: the network's output or the loss is no finite number; names the batch.
        """
        outputs = floats(list(tensors(output)))
        value = self._value(output, outputs, batch, first)
        if isinstance(value, Tensor) and value.isfinite().all():
            return value.sum()
        where, found = f"batch {batch.index} of the data", _not_finite(outputs)
        if found is not None and isinstance(value, Tensor):
            raise InputError(
                f"{where}: the network's output holds {found} though its inputs are finite; run the model on that "
                "batch, and check its weights and its dtype (float16 ends at 65504)"
            )
        raise InputError(f"{where}: the loss is {_shown(value)}; expected a finite tensor")

    def _value(self, output: Any, outputs: Sequence[Tensor], batch: Batch, first: int) -> Any:
        if self.loss is not None:
            return self.loss(output, batch.labels)
        if self.output == "logits":
            return _drawn_cross_entropy(outputs[0], self._seeds(outputs[0], batch, first))
        if not self.variances:
            self.variances = [float(variance(value.detach().double())) for value in outputs]
        terms = [
            _projection(value, self._seeds(value, batch, first)) / (scale * value[0].numel()) ** 0.5
            for value, scale in zip(outputs, self.variances, strict=True)
        ]
        return torch.stack(terms).sum()

    def _seeds(self, value: Tensor, batch: Batch, first: int) -> list[int]:
        """One for each sample; one for all where the value's first dimension is not that of the samples."""
        return [_seed(self.seed, first + index) for index in range(batch.samples if len(value) == batch.samples else 1)]


def _drawn_cross_entropy(logits: Tensor, seeds: Sequence[int]) -> Tensor:
    """Sum over rows of (n, C), (n, T, C) or (n, C, *spatial), classes drawn by inversion of the distribution."""
    logits = (logits.movedim(1, -1) if logits.dim() >= 4 else logits).flatten(0, -2)
    logits = logits.double()  # in float32 the gradients of a certain network are lost
    drawn = [torch.rand(len(logits) // len(seeds), generator=_generator(seed), dtype=torch.float64) for seed in seeds]
    edges = logits.detach().double().softmax(-1).cumsum(-1)
    targets = torch.searchsorted(edges, torch.cat(drawn).to(edges.device)[:, None] * edges[:, -1:])
    targets = targets.clamp_max(logits.shape[1] - 1)  # NaN lies behind all classes; the loss of it is NaN
    return F.cross_entropy(logits, targets[:, 0], reduction="sum")


def _projection(values: Tensor, seeds: Sequence[int]) -> Tensor:
    """Sum of (n, ...) times standard normal numbers."""
    values = values if values.dtype == torch.float64 else values.float()
    rows = values.reshape(len(seeds), -1)
    drawn = [torch.randn(rows.shape[1], generator=_generator(seed), dtype=torch.float64) for seed in seeds]
    return (torch.stack(drawn).to(rows) * rows).sum()


def _seed(seed: int, sample: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {sample}".encode()).digest()[:7], "big")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _not_finite(values: Sequence[Tensor]) -> str | None:
    """What the values hold that is no finite number."""
    if any(value.isnan().any() for value in values):
        return "NaN"
    return "Inf" if any(value.isinf().any() for value in values) else None


def _shown(value: object) -> str:
    return "NaN or Inf" if isinstance(value, Tensor) else f"a {type(value).__name__}"
