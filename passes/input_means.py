"""Means of the layers' inputs without data, from what BatchNorm says of its outputs.

After a BatchNorm a channel has mean b and standard deviation |w|, its parameters (0 and 1 without them); as a normal
variable it is followed through element-wise functions by Gauss-Hermite quadrature, and through sums of independent
terms. Flattening repeats it for each position of its channel. An average over positions keeps the mean; its variance
lies anywhere from that of independent positions to that of equal ones, hence it is not known, nor is what a further
function makes of it. What follows anything else is not known.

Source: Nagel et al. 2019, section 4.2.2 and appendix C (means behind a clipped activation, there in closed form).
"""

from __future__ import annotations

import math
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
from tdfx.records.layer import Shape, Site

POINTS = 64  # of the quadrature
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow)
ELEMENTWISE = (
    F.relu, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus, F.hardswish,
    F.hardsigmoid, F.sigmoid, F.tanh, torch.relu, torch.sigmoid, torch.tanh, "relu", "relu_", "sigmoid", "tanh",
    "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "elu", "elu_", "selu", "celu", "gelu", "silu", "silu_",
    "mish", "softplus", "hardswish", "hardswish_", "hardsigmoid",
)  # fmt: skip
ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus,
    nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh,
)  # fmt: skip
SAME = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
RESHAPES = (torch.flatten, torch.reshape, "flatten", "reshape", "view")
AVERAGES: dict[object, int] = {
    nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3,
    F.adaptive_avg_pool1d: 1, F.adaptive_avg_pool2d: 2, F.adaptive_avg_pool3d: 3,
    nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3, F.avg_pool1d: 1, F.avg_pool2d: 2, F.avg_pool3d: 3,
    "adaptive_avg_pool1d": 1, "adaptive_avg_pool2d": 2, "adaptive_avg_pool3d": 3,
    "avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3,
}  # fmt: skip
"""Over how many dimensions, the last ones, an operator averages."""
POOL_OPTIONS = (
    "input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override",
)  # fmt: skip
"""Parameters of ``F.avg_pool2d``; that in one dimension lacks the last one."""


@dataclass(frozen=True)
class Normal:
    """Mean and variance by channel, dimension 1 of a value; float64. None for a variance that is not known."""

    mean: Tensor
    variance: Tensor | None


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
        # Channels are dimension 1, the features of a linear layer the last one.
        if len(shape) != layer.weight.dim() or shape[1] != len(value.mean):
            return None
        sample = value.mean.reshape(1, -1, *[1] * (len(shape) - 2)).expand(1, *shape[1:])
        return im2col(sample, layer).mean(0)

    def _follow(self, graph_module: fx.GraphModule, node: fx.Node, known: dict[str, Normal]) -> Normal | None:
        if BATCH_NORM in node.meta:
            return _normalized(**node.meta[BATCH_NORM], channels=self.metas[node.name].shape[1])
        module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, BatchNorm):
            return _normalized(module.weight, module.bias, module.num_features)
        sources = [known.get(source.name) for source in node.all_input_nodes]
        if sources and sources[0] is not None and self._flattens(node, module):  # sizes may be nodes too
            return _repeated(sources[0], math.prod(self._shape_before(node)[2:]))
        values = [source for source in sources if source is not None]
        if not values or len(values) < len(sources):
            return None
        if self._averages(node, module):
            return Normal(values[0].mean, None)
        if module is not None:
            return _through_module(module, values[0])
        target = _operator(node)
        if target in ADDITIONS and len(values) == 2 and "alpha" not in node.kwargs:
            same = self._shape_before(node) == self.metas[node.all_input_nodes[1].name].shape
            return _sum(*values) if same else None
        if len(values) == 1 and target in ELEMENTWISE:
            return _through(values[0], lambda x: _call(node, x))
        return None

    def _shape_before(self, node: fx.Node) -> Shape:
        return self.metas[node.all_input_nodes[0].name].shape

    def _averages(self, node: fx.Node, module: nn.Module | None) -> bool:
        """Whether the node is a mean over positions, all or some, and over nothing beside them."""
        dims = len(self._shape_before(node))
        target = _operator(node)
        if module is None and target in (torch.mean, "mean"):
            over = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else ())
            over = over if isinstance(over, tuple | list) else (over,)
            return bool(over) and all(isinstance(dim, int) and dim % dims > 1 for dim in over)
        if AVERAGES.get(target if module is None else type(module)) != dims - 2:
            return False
        given = dict(zip(POOL_OPTIONS, node.args, strict=False))
        options: dict[str, Any] = {**given, **node.kwargs} if module is None else vars(module)
        padding = options.get("padding", 0)
        is_padded = any(padding if isinstance(padding, tuple | list) else (padding,))
        counts_padding = is_padded and options.get("count_include_pad", True)
        return not counts_padding and options.get("divisor_override") is None

    def _flattens(self, node: fx.Node, module: nn.Module | None) -> bool:
        """Whether the node makes (samples, channels * positions) of (samples, channels, *positions)."""
        if not isinstance(module, nn.Flatten) and (module is not None or _operator(node) not in RESHAPES):
            return False
        shape = self._shape_before(node)
        return self.metas[node.name].shape == (shape[0], math.prod(shape[1:]))


def _operator(node: fx.Node) -> Any:
    """What a node calls; for an operator of torch.export its name, which that of the method is too."""
    return node.target.overloadpacket.__name__ if isinstance(node.target, torch._ops.OpOverload) else node.target


def _changed_in_place(graph_module: fx.GraphModule, node: fx.Node) -> list[str]:
    """Name of the node whose value the operation overwrites with its own, if any."""
    module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
    target = _operator(node)
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    ends = node.op in ("call_method", "call_function") and name.endswith("_") and not name.endswith("__")
    in_place = getattr(module, "inplace", False) or node.kwargs.get("inplace", False) or node.target in IN_PLACE or ends
    return [node.all_input_nodes[0].name] if in_place and node.all_input_nodes else []


def _normalized(weight: Tensor | None, bias: Tensor | None, channels: int) -> Normal:
    mean = torch.zeros(channels) if bias is None else bias.detach()
    deviation = torch.ones(channels) if weight is None else weight.detach()
    return Normal(mean.double(), deviation.double().square())


def _repeated(value: Normal, count: int) -> Normal:
    """Each channel so many times, one after another."""
    variance = None if value.variance is None else value.variance.repeat_interleave(count)
    return Normal(value.mean.repeat_interleave(count), variance)


def _sum(left: Normal, right: Normal) -> Normal:
    """Of two independent values."""
    mean = left.mean + right.mean
    if left.variance is None or right.variance is None:
        return Normal(mean, None)
    return Normal(mean, left.variance + right.variance)


def _through_module(module: nn.Module, value: Normal) -> Normal | None:
    if isinstance(module, ELEMENTWISE_MODULES):
        return _through(value, module)
    return value if isinstance(module, SAME) else None


def _through(value: Normal, function: Any) -> Normal | None:
    """Mean and variance of a function of a normal variable; None where its variance is not known."""
    if value.variance is None:
        return None
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
