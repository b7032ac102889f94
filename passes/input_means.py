"""Means of the layers' inputs without data, from what BatchNorm says of its outputs.

After a BatchNorm a channel has mean b and standard deviation |w|, its parameters; as a normal variable it is followed
through element-wise functions by Gauss-Hermite quadrature, through sums of independent terms, and through pooling by
average. What follows anything else is not known.

Source: Nagel et al. 2019, section 4.2.2 and appendix C (means behind a clipped activation, there in closed form).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tdfx.im2col import im2col
from tdfx.passes.base import AnalysisPass, layer_at
from tdfx.passes.fold_batch_norm import BATCH_NORM, BatchNorm
from tdfx.passes.shape_prop import TensorMeta
from tdfx.records.layer import Site

POINTS = 64  # of the quadrature
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow)
ELEMENTWISE = (
    F.relu, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus, F.hardswish,
    F.hardsigmoid, F.sigmoid, F.tanh, torch.relu, torch.sigmoid, torch.tanh, "relu", "relu_", "sigmoid", "tanh",
)  # fmt: skip
ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus,
    nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh,
)  # fmt: skip
SAME = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
AVERAGES = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
AVERAGE_FUNCTIONS = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)


@dataclass(frozen=True)
class Normal:
    """Mean and variance by channel, dimension 1 of a value; float64."""

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class InputMeans(AnalysisPass[dict[str, Tensor]]):
    """Mean of the im2col input, (in k k,) float64, by site, where it is known for all calls and the same.

    Attributes:
        sites: the layers of interest.
        metas: shapes by node name, as ``ShapeProp`` returns them.
    """

    sites: tuple[Site, ...]
    metas: dict[str, TensorMeta]

    def apply(self, graph_module: fx.GraphModule) -> dict[str, Tensor]:
        known: dict[str, Normal] = {}
        calls: dict[str, list[Tensor | None]] = {}
        names = {site.name for site in self.sites}
        for node in graph_module.graph.nodes:
            if node.op == "call_module" and node.target in names:
                source = node.all_input_nodes[0]
                calls.setdefault(node.target, []).append(self._columns(graph_module, node, known.get(source.name)))
            value = self._follow(graph_module, node, known)
            changed = [node.name, *_changed_in_place(graph_module, node)]
            for name in changed:
                known.pop(name, None)
            if value is not None:
                known |= dict.fromkeys(changed, value)
        return {name: means[0] for name, means in calls.items() if len(means) == 1 and means[0] is not None}

    def _columns(self, graph_module: fx.GraphModule, node: fx.Node, value: Normal | None) -> Tensor | None:
        """The mean over positions of the layer's columns: padding lowers what lies at the border."""
        if value is None:
            return None
        layer = layer_at(graph_module, str(node.target))
        shape = self.metas[node.all_input_nodes[0].name].shape
        if isinstance(layer, nn.Linear):
            # Channels are dimension 1, features the last one.
            return value.mean if len(shape) == 2 and shape[1] == len(value.mean) else None
        if len(shape) != layer.weight.dim():
            return None
        sample = value.mean.reshape(1, -1, *[1] * (len(shape) - 2)).expand(1, *shape[1:])
        return im2col(sample, layer).mean(0)

    def _follow(self, graph_module: fx.GraphModule, node: fx.Node, known: dict[str, Normal]) -> Normal | None:
        if BATCH_NORM in node.meta:
            return _normalized(**node.meta[BATCH_NORM])
        module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, BatchNorm):
            return _normalized(module.weight, module.bias)
        sources = [known.get(source.name) for source in node.all_input_nodes]
        values = [source for source in sources if source is not None]
        if not values or len(values) < len(sources):
            return None
        if self._keeps_channels(graph_module, node):
            return values[0]
        if module is not None:
            return _through_module(module, values[0])
        if node.target in ADDITIONS and len(values) == 2 and "alpha" not in node.kwargs:
            same = self.metas[node.all_input_nodes[0].name].shape == self.metas[node.all_input_nodes[1].name].shape
            return Normal(*(sum(parts, start=torch.zeros(())) for parts in _parts(values))) if same else None
        if len(values) == 1 and node.target in ELEMENTWISE:
            return _through(values[0], lambda x: _call(node, x))
        if node.target in AVERAGE_FUNCTIONS or self._averages(node):
            return Normal(values[0].mean, torch.zeros_like(values[0].variance))
        return None

    def _averages(self, node: fx.Node) -> bool:
        """Whether the node is a mean over all of a convolution's positions."""
        if node.target not in (torch.mean, "mean"):
            return False
        shape, result = self.metas[node.all_input_nodes[0].name].shape, self.metas[node.name].shape
        return len(shape) > 2 and result[:2] == shape[:2] and all(size == 1 for size in result[2:])

    def _keeps_channels(self, graph_module: fx.GraphModule, node: fx.Node) -> bool:
        """Whether the node flattens a value with one position left."""
        flattens = node.target in (torch.flatten, "flatten")
        if node.op == "call_module":
            flattens = isinstance(graph_module.get_submodule(str(node.target)), nn.Flatten)
        if not flattens:
            return False
        shape, result = self.metas[node.all_input_nodes[0].name].shape, self.metas[node.name].shape
        return len(result) == 2 and result == shape[:2]


def _changed_in_place(graph_module: fx.GraphModule, node: fx.Node) -> list[str]:
    """Name of the node whose value the operation overwrites with its own, if any."""
    module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    ends = node.op in ("call_method", "call_function") and name.endswith("_") and not name.endswith("__")
    in_place = getattr(module, "inplace", False) or node.kwargs.get("inplace", False) or node.target in IN_PLACE or ends
    return [node.all_input_nodes[0].name] if in_place and node.all_input_nodes else []


def _parts(values: list[Normal]) -> tuple[list[Tensor], list[Tensor]]:
    return [value.mean for value in values], [value.variance for value in values]


def _normalized(weight: Tensor | None, bias: Tensor | None) -> Normal | None:
    if weight is None or bias is None:
        return None
    return Normal(bias.detach().double(), weight.detach().double().square())


def _through_module(module: nn.Module, value: Normal) -> Normal | None:
    if isinstance(module, ELEMENTWISE_MODULES):
        return _through(value, module)
    if isinstance(module, SAME):
        return value
    if isinstance(module, AVERAGES):
        return Normal(value.mean, torch.zeros_like(value.variance))
    return None


def _through(value: Normal, function: Any) -> Normal:
    """Mean and variance of a function of a normal variable."""
    points, weights = (torch.from_numpy(array) for array in np.polynomial.hermite_e.hermegauss(POINTS))
    weights = weights / weights.sum()
    with torch.no_grad():
        values = function(value.mean[:, None] + value.variance.sqrt()[:, None] * points)
    mean = values @ weights
    return Normal(mean, (values.square() @ weights - mean.square()).clamp_min(0))


def _call(node: fx.Node, value: Tensor) -> Any:
    args = tuple(value.clone() if isinstance(arg, fx.Node) else arg for arg in node.args)
    kwargs = {name: value.clone() if isinstance(arg, fx.Node) else arg for name, arg in node.kwargs.items()}
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)
