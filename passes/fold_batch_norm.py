"""Folds BatchNorm into the convolution or linear layer before it.

y = (W x + b - m) * g / sqrt(v + eps) + h becomes one layer with W' = W g / sqrt(v + eps) and the bias to match
(Jacob et al. 2018, section 3.2, equation 14). Computed in float64.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from tdfx.passes.base import AnalysisPass, Layer, RewritePass, layer_at, set_submodule
from tdfx.passes.capture import has_stock_forward
from tdfx.passes.shape_prop import TensorMeta
from tdfx.passes.sharing import sharers
from tdfx.records.layer import Skipped
from tdfx.weights import LOOKUPS, relaid, weight_of

BatchNorm = nn.modules.batchnorm._BatchNorm
BATCH_NORM = "batch_norm"
"""Key, in the meta of a layer's node, of the weight and bias of the BatchNorm that was folded into the layer."""
_STOCK_FORWARDS = (BatchNorm.forward, nn.SyncBatchNorm.forward)


@dataclass(frozen=True)
class FoldBatchNorm(RewritePass):
    """Folds every BatchNorm with running statistics whose input is a layer that nobody else uses.

    The BatchNorm's weight and bias stay in ``node.meta[BATCH_NORM]`` of the layer's node: they give mean and spread
    of what follows.

    Attributes:
        metas: shapes by node name, as ``ShapeProp`` returns them.
    """

    metas: dict[str, TensorMeta]

    def rewrite(self, graph_module: fx.GraphModule) -> None:
        for node in list(graph_module.graph.nodes):
            if _batch_norm(graph_module, node) is None or obstacle(graph_module, node, self.metas) is not None:
                continue
            _fold(graph_module, node.all_input_nodes[0], node)


@dataclass(frozen=True)
class RemainingBatchNorms(AnalysisPass[tuple[Skipped, ...]]):
    """BatchNorms that cannot be folded, with reasons.

    Attributes:
        metas: shapes by node name.
    """

    metas: dict[str, TensorMeta]

    def apply(self, graph_module: fx.GraphModule) -> tuple[Skipped, ...]:
        found = {}
        for node in graph_module.graph.nodes:
            if _batch_norm(graph_module, node) is not None:
                reason = obstacle(graph_module, node, self.metas)
                if reason is not None:
                    found[str(node.target)] = f"BatchNorm is not folded: {reason}"
        return tuple(Skipped(layer, reason) for layer, reason in found.items())


def obstacle(graph_module: fx.GraphModule, node: fx.Node, metas: dict[str, TensorMeta]) -> str | None:
    """Why this BatchNorm node cannot be folded, None if it can."""
    batch_norm = _batch_norm(graph_module, node)
    if batch_norm is None or batch_norm.running_mean is None or batch_norm.running_var is None:
        return "it keeps no running statistics and normalises with those of the batch in eval mode too"
    source = node.all_input_nodes[0]
    if source.op != "call_module":
        return "it does not follow a convolution or linear layer"
    layer = graph_module.get_submodule(str(source.target))
    if not has_stock_forward(layer) or isinstance(layer, LOOKUPS):
        return f"it follows {type(layer).__name__}, not a convolution or linear layer"
    if len(source.users) > 1:
        return f"the output of {source.target} has other users"
    if Counter(n.target for n in graph_module.graph.nodes if n.op == "call_module")[source.target] > 1:
        return f"{source.target} is called more than once"
    others = sharers(graph_module, str(source.target))
    if others:
        return f"{source.target} shares parameters with {', '.join(others)}"
    if len(metas[source.name].shape) != layer_at(graph_module, str(source.target)).weight.dim():
        return f"it normalises dimension 1 of the output of {source.target}, which does not hold its channels"
    return None


def _batch_norm(graph_module: fx.GraphModule, node: fx.Node) -> BatchNorm | None:
    if node.op != "call_module":
        return None
    module = graph_module.get_submodule(str(node.target))
    return module if isinstance(module, BatchNorm) and type(module).forward in _STOCK_FORWARDS else None


def _fold(graph_module: fx.GraphModule, source: fx.Node, node: fx.Node) -> None:
    layer = layer_at(graph_module, str(source.target))
    batch_norm = cast(BatchNorm, graph_module.get_submodule(str(node.target)))
    folded = copy.deepcopy(layer)
    folded.weight, folded.bias = folded_parameters(layer, batch_norm)
    set_submodule(graph_module, str(source.target), folded)
    source.meta[BATCH_NORM] = {"weight": _detached(batch_norm.weight), "bias": _detached(batch_norm.bias)}
    node.replace_all_uses_with(source)
    graph_module.graph.erase_node(node)


def folded_parameters(layer: Layer, batch_norm: BatchNorm) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of the layer with the BatchNorm folded in, in the layer's dtype."""
    assert batch_norm.running_mean is not None and batch_norm.running_var is not None
    mean, var = batch_norm.running_mean.double(), batch_norm.running_var.double()
    scale = torch.ones_like(mean) if batch_norm.weight is None else batch_norm.weight.detach().double()
    shift = torch.zeros_like(mean) if batch_norm.bias is None else batch_norm.bias.detach().double()
    weight = weight_of(layer).double()
    bias = None if layer.bias is None else layer.bias.detach().double()
    new: tuple[Tensor, Tensor]
    if isinstance(layer, nn.Linear):
        new = fuse_linear_bn_weights(weight, bias, mean, var, batch_norm.eps, scale, shift)
    else:
        new = fuse_conv_bn_weights(weight, bias, mean, var, batch_norm.eps, scale, shift)
    dtype, learns = layer.weight.dtype, layer.weight.requires_grad
    folded = relaid(new[0].detach(), layer).contiguous()
    return nn.Parameter(folded.to(dtype), learns), nn.Parameter(new[1].detach().to(dtype), learns)


def _detached(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach().clone()
