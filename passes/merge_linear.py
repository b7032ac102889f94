"""Merges neighbouring linear operators into one where that is cheaper.

Two layers with nothing between them compute W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2): Linear after Linear, or
a convolution before or after one of 1 x 1, whose matrix multiplies the other's kernel at every position. Computed in
float64. Low-rank chains, which are dearer multiplied out, stay as they are.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx, nn

from tdfx.passes.base import AnalysisPass, RewritePass, layer_at, set_submodule
from tdfx.passes.capture import has_hooks, has_stock_forward
from tdfx.passes.shape_prop import TensorMeta
from tdfx.passes.sharing import sharers
from tdfx.passes.sites import kind_of, layer_spec
from tdfx.records.layer import Call, LayerSpec, Skipped
from tdfx.tables import count

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Mergeable = nn.Linear | Conv

MERGED = "merged"
"""Key, in the meta of a layer's node, of the ``LayerSpec``s that it was merged from, in the order of execution."""


@dataclass(frozen=True)
class MergeLinear(RewritePass):
    """Merges two layers, again and again, where one in their place has fewer multiply-accumulates or parameters.

    Neither may be more. The last layer gives the name, since it is its output that others read.

    Attributes:
        metas: shapes by node name, as ``ShapeProp`` returns them.
    """

    metas: dict[str, TensorMeta]

    def rewrite(self, graph_module: fx.GraphModule) -> None:
        for node in list(graph_module.graph.nodes):
            while self._merge(graph_module, node):
                pass

    def _merge(self, graph_module: fx.GraphModule, node: fx.Node) -> bool:
        """Merges the layer that a node calls with the one before it, if there is one and it is worth it."""
        if not _calls_own_layer(graph_module, node):
            return False
        (source,) = node.all_input_nodes
        if not _calls_own_layer(graph_module, source) or len(source.users) > 1:
            return False
        merged = merged_layer(*(cast(Mergeable, graph_module.get_submodule(str(n.target))) for n in (source, node)))
        if merged is None or not bool(torch.isfinite(merged.weight).all()):
            return False
        before, after = self._spec(graph_module, source), self._spec(graph_module, node)
        call = Call(before.calls[0].input_shape, after.calls[0].output_shape)
        if not _is_cheaper(layer_spec(after.name, merged, (call,)), before, after):
            return False
        set_submodule(graph_module, after.name, merged)
        node.meta[MERGED] = (*source.meta.get(MERGED, (before,)), *node.meta.get(MERGED, (after,)))
        node.replace_input_with(source, source.all_input_nodes[0])
        graph_module.graph.erase_node(source)
        return True

    def _spec(self, graph_module: fx.GraphModule, node: fx.Node) -> LayerSpec:
        name = str(node.target)
        call = Call(self.metas[node.all_input_nodes[0].name].shape, self.metas[node.name].shape)
        return layer_spec(name, layer_at(graph_module, name), (call,))


@dataclass(frozen=True)
class MergedLayers(AnalysisPass[tuple[Skipped, ...]]):
    """The layers that are no more, each with the one that it was merged into."""

    def apply(self, graph_module: fx.GraphModule) -> tuple[Skipped, ...]:
        found = []
        for node in graph_module.graph.nodes:
            *gone, last = node.meta.get(MERGED, (None,))
            if last is None:
                continue
            kept = layer_spec(last.name, layer_at(graph_module, last.name), ())
            reason = (
                f"{', '.join(layer.name for layer in gone)} and {last.name} were merged: {last.name} computes all of "
                f"it, with {count(kept.params)} in place of {count(sum(s.params for s in (*gone, last)))} parameters"
            )
            found += [Skipped(layer.name, reason) for layer in gone]
        return tuple(found)


def merged_layer(first: Mergeable, last: Mergeable) -> Mergeable | None:
    """The layer that computes ``last(first(x))``; None where no layer of their kind does."""
    if kind_of(first) != kind_of(last):
        return None
    if not isinstance(first, nn.Linear) and not isinstance(last, nn.Linear):
        if first.groups > 1 or last.groups > 1:
            return None
        if _is_pointwise(last):
            options: Mergeable = first
        elif _is_pointwise(first) and (first.bias is None or not _pads_with_zeros(last)):
            options = last  # with a bias the border would be that of the first layer's output, padded by zeros
        else:
            return None
    else:
        options = last
    inner, outer = (layer.weight.detach().double().reshape(*layer.weight.shape[:2], -1) for layer in (first, last))
    # One of the two kernels, p and q, has a single position.
    weight = torch.einsum("omp,miq->oipq", outer, inner).reshape(len(outer), inner.shape[1], *options.weight.shape[2:])
    bias = None if last.bias is None else last.bias.detach().double()
    if first.bias is not None:
        shift = outer.sum(2) @ first.bias.detach().double()
        bias = shift if bias is None else shift + bias
    merged = copy.deepcopy(options)
    if isinstance(merged, nn.Linear):
        merged.in_features, merged.out_features = inner.shape[1], len(outer)
    else:
        merged.in_channels, merged.out_channels = inner.shape[1], len(outer)
    dtype, learns = last.weight.dtype, first.weight.requires_grad or last.weight.requires_grad
    merged.weight = nn.Parameter(weight.to(dtype), learns)
    merged.bias = None if bias is None else nn.Parameter(bias.to(dtype), learns)
    return merged


def _calls_own_layer(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node calls a real layer that is called only there and whose parameters nothing else reads."""
    if node.op != "call_module" or len(node.all_input_nodes) != 1:
        return False
    layer = graph_module.get_submodule(str(node.target))
    if not isinstance(layer, Mergeable) or not has_stock_forward(layer) or has_hooks(layer):
        return False
    if not layer.weight.is_floating_point():
        return False
    calls = Counter(n.target for n in graph_module.graph.nodes if n.op == "call_module")
    return calls[node.target] == 1 and not sharers(graph_module, str(node.target))


def _is_pointwise(layer: Conv) -> bool:
    """Whether a convolution only mixes the channels of each position."""
    return math.prod(layer.kernel_size) == math.prod(layer.stride) == 1 and not _pads(layer)


def _pads_with_zeros(layer: Conv) -> bool:
    return _pads(layer) and layer.padding_mode == "zeros"


def _pads(layer: Conv) -> bool:
    if isinstance(layer.padding, str):
        return layer.padding == "same" and math.prod(layer.kernel_size) > 1
    return any(layer.padding)


def _is_cheaper(merged: LayerSpec, *separate: LayerSpec) -> bool:
    found, old = (merged.macs, merged.params), (sum(s.macs for s in separate), sum(s.params for s in separate))
    return found != old and all(new <= was for new, was in zip(found, old, strict=True))
