"""A captured model: its graph, what it was captured with, and what was learnt on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from tdfx.records.cost import Workload
from tdfx.records.layer import Skipped
from tdfx.signature import Signature

AUTO, FX, EXPORT, INPLACE = "auto", "fx", "export", "inplace"
TIERS = (AUTO, FX, EXPORT, INPLACE)
"""How a model may be captured; "auto" is the first of the others that takes it."""


@dataclass(frozen=True)
class Capture:
    """A normalized graph of a model; the model itself is not referred to, only an isolated copy.

    Attributes:
        original: copy of the model as given, in eval mode, without hooks and parametrizations.
        module: the graph, with layers as ``call_module`` nodes under their original qualified names, and the input
            weights of recurrent layers as linear layers.
        plain: the same graph with recurrent layers as they are.
        tier: how it was captured: "fx" by symbolic tracing, "export" by torch.export, "inplace" as Python code that
            one node runs.
        args: positional example inputs of the graph, tensors.
        kwargs: keyword example inputs of the graph; none where the model is called with more than tensors.
        trainable: whether BatchNorm and Dropout were kept.
        workloads: convolutions and matrix products of one run of the model as given.
        module_workloads: those of one run of ``module``; others where layers were merged.
        params: parameters of the model as given.
        weight_bytes: bytes of those.
        structure: fingerprint of the model's structure.
        weights: fingerprint of its weights.
        skipped: layers that the graph does not show, as those merged into others, and BatchNorms that stay; reasons.
        max_rel_diff: difference of the captured graph's outputs from the model's, relative to the largest output.
        notes: what the user should know.
        signature: how the model is called.
    """

    original: nn.Module
    module: fx.GraphModule
    plain: fx.GraphModule
    tier: str
    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]
    trainable: bool
    workloads: tuple[Workload, ...]
    module_workloads: tuple[Workload, ...]
    params: int
    weight_bytes: int
    structure: str
    weights: str
    skipped: tuple[Skipped, ...]
    max_rel_diff: float
    notes: tuple[str, ...]
    signature: Signature

    @property
    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword example inputs of the model, and of results."""
        return (self.args, self.kwargs) if self.signature.is_plain else self.signature.call(self.args)

    @property
    def keeps_batch_norm(self) -> bool:
        """Whether BatchNorm and Dropout are still there; Python code is left as it is."""
        return self.trainable or self.tier == INPLACE
