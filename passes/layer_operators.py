"""Which operators are layers: from an operator on a parameter to torch's module that computes the same."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

aten = torch.ops.aten
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONV_TRANSPOSES = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CALL = "call"
"""Key, beside an operator's arguments, of its node."""
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class LayerCall:
    """A call of a layer that an operator amounts to.

    Attributes:
        weight: qualified name of the parameter that is the layer's weight.
        layer: the layer; its parameters are those of the graph, but for a transposed weight, which is a copy.
        inputs: what the layer is called with.
        transposed: whether the layer holds the parameter transposed.
        shift: what is added to the layer's output, where that is no bias that a layer can hold.
        replaced: operators besides that the layer does itself.
    """

    weight: str
    layer: nn.Module
    inputs: tuple[fx.Node, ...]
    transposed: bool = False
    shift: fx.Node | None = None
    replaced: tuple[fx.Node, ...] = ()


def layer_call(graph_module: fx.GraphModule, node: fx.Node) -> LayerCall | None:
    """The layer call that a node amounts to; None where it is none or its weight is no parameter."""
    given = arguments(node)
    return (
        None if given is None else _RULES[_SYNONYMS.get(node.target, node.target)](graph_module, given | {CALL: node})
    )


def arguments(node: fx.Node) -> dict[str, Any] | None:
    """Arguments by name of an operator that may amount to a layer, defaults included; None for other nodes."""
    target: Any = _SYNONYMS.get(node.target, node.target)
    if node.op != "call_function" or target not in _RULES:
        return None
    schema = target._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema}
    if node.target is F.embedding:  # takes them in another order, with None for what is not asked for
        found = inspect.signature(F.embedding).bind(*node.args, **node.kwargs).arguments
        return {**defaults, "padding_idx": None, **found, "indices": found["input"]}
    positional = dict(zip([argument.name for argument in schema], node.args, strict=False))
    return {**defaults, **positional, **node.kwargs}


def parameter_read(graph_module: fx.GraphModule, node: object) -> nn.Parameter | None:
    """The parameter that a node reads, None for other nodes and values."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = attribute(graph_module, node)
    return value if isinstance(value, nn.Parameter) else None


def attribute(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    """What a ``get_attr`` node reads."""
    holder, _, name = str(node.target).rpartition(".")
    return getattr(graph_module.get_submodule(holder), name)


def is_transpose(node: fx.Node) -> bool:
    """Whether a node transposes a matrix."""
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in (aten.t.default, aten.numpy_T.default, aten.mT.default, torch.t, "t"):
        return True
    if node.target in (aten.permute.default, torch.permute, "permute"):
        return node.args[1:] in (([1, 0],), ((1, 0),), (1, 0))
    if node.target in (aten.transpose.int, torch.transpose, "transpose"):
        return sorted(dim % 2 for dim in node.args[1:] if isinstance(dim, int)) == [0, 1]
    return node.target is getattr and node.args[1] in ("T", "mT")


def _linear(graph_module: fx.GraphModule, given: dict[str, Any]) -> LayerCall | None:
    return _product(graph_module, given["input"], given["weight"], given["bias"], transposed=False)


def _addmm(graph_module: fx.GraphModule, given: dict[str, Any]) -> LayerCall | None:
    if given["beta"] != 1 or given["alpha"] != 1:
        return None
    return _product(graph_module, given["mat1"], given["mat2"], given["self"], transposed=True)


def _matmul(graph_module: fx.GraphModule, given: dict[str, Any]) -> LayerCall | None:
    return _product(graph_module, given["self"], given.get("mat2", given.get("other")), None, transposed=True)


def _product(graph_module: fx.GraphModule, left: Any, right: Any, shift: Any, *, transposed: bool) -> LayerCall | None:
    """A product x W^T + b with ``right`` for W, or for W^T where ``transposed``."""
    while isinstance(right, fx.Node) and is_transpose(right):
        right, transposed = right.args[0], not transposed
    weight = parameter_read(graph_module, right)
    if weight is None or weight.dim() != 2:
        return None
    if not isinstance(left, fx.Node) or parameter_read(graph_module, left) is not None:
        return None
    held = nn.Parameter(weight.detach().T.contiguous(), weight.requires_grad) if transposed else weight
    bias = parameter_read(graph_module, shift)
    if bias is not None and tuple(bias.shape) != held.shape[:1]:
        bias = None
    layer = _holding(nn.Linear(held.shape[1], held.shape[0], bias is not None, device="meta"), held, bias)
    return LayerCall(str(right.target), layer, (left,), transposed, shift if bias is None else None)


def _convolution(graph_module: fx.GraphModule, given: dict[str, Any]) -> LayerCall | None:
    weight, bias = (parameter_read(graph_module, given[name]) for name in ("weight", "bias"))
    if weight is None or (bias is None and given["bias"] is not None):
        return None
    dims, groups = weight.dim() - 2, given["groups"]
    options = {name: _each(given[name], dims) for name in ("stride", "padding", "dilation")}
    channels = (weight.shape[1] * groups, weight.shape[0])
    kinds: tuple[type[nn.modules.conv._ConvNd], ...] = CONVS
    if given.get("transposed"):
        options["output_padding"] = _each(given["output_padding"], dims)
        channels, kinds = channels[::-1], CONV_TRANSPOSES
    if any(isinstance(value, fx.Node) for option in options.values() for value in option):
        return None
    layer = kinds[dims - 1](
        *channels, tuple(weight.shape[2:]), **options, groups=groups, bias=bias is not None, device="meta"
    )
    return LayerCall(str(given["weight"].target), _holding(layer, weight, bias), (given["input"],))


def _conv_transpose(graph_module: fx.GraphModule, given: dict[str, Any]) -> LayerCall | None:
    return _convolution(graph_module, {**given, "transposed": True})


def _embedding(graph_module: fx.GraphModule, given: dict[str, Any]) -> LayerCall | None:
    weight = parameter_read(graph_module, given["weight"])
    if weight is None or given.get("max_norm") is not None:
        return None
    is_function = "input" in given  # for which a negative index counts from the end
    padding = given["padding_idx"] if is_function or given["padding_idx"] >= 0 else None
    layer = nn.Embedding(weight.shape[0], weight.shape[1], padding, device="meta")
    layer.scale_grad_by_freq, layer.sparse = given["scale_grad_by_freq"], given["sparse"]
    renorm = _renorm(given["weight"], given["indices"], given[CALL])
    if renorm is not None:
        layer.max_norm, layer.norm_type = renorm.args[2:]  # type: ignore[assignment]
    replaced = () if renorm is None else (renorm,)
    return LayerCall(str(given["weight"].target), _holding(layer, weight, None), (given["indices"],), replaced=replaced)


def _renorm(weight: fx.Node, indices: fx.Node, call: fx.Node) -> fx.Node | None:
    """The operator that rescales, in place, the rows that a call looks up."""
    readers = (user for view in weight.users if view.target is aten.detach.default for user in view.users)
    renorms = (user for user in readers if user.target is aten.embedding_renorm_.default and user.args[1] is indices)
    return max((renorm for renorm in renorms if renorm < call), default=None)


def _layer_norm(graph_module: fx.GraphModule, given: dict[str, Any]) -> LayerCall | None:
    shape = tuple(given["normalized_shape"])
    return _norm(
        graph_module,
        given,
        lambda weight, bias: nn.LayerNorm(shape, given["eps"], bias=bias is not None, device="meta"),
    )


def _group_norm(graph_module: fx.GraphModule, given: dict[str, Any]) -> LayerCall | None:
    if given["bias"] is None:
        return None
    return _norm(
        graph_module,
        given,
        lambda weight, bias: nn.GroupNorm(given["num_groups"], len(weight), given["eps"], device="meta"),
    )


def _norm(
    graph_module: fx.GraphModule, given: dict[str, Any], make: Callable[[Tensor, Tensor | None], nn.Module]
) -> LayerCall | None:
    weight, bias = (parameter_read(graph_module, given[name]) for name in ("weight", "bias"))
    if weight is None or (bias is None and given["bias"] is not None):
        return None
    return LayerCall(str(given["weight"].target), _holding(make(weight, bias), weight, bias), (given["input"],))


def _each(value: Any, dims: int) -> Any:
    """One entry per spatial dimension; a word stays a word."""
    if isinstance(value, str):
        return value
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * dims if len(values) == 1 else values


def _holding(layer: M, weight: nn.Parameter, bias: nn.Parameter | None) -> M:
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer


# Other names of an operator, among them those that torch.fx's tracing gives.
_SYNONYMS: dict[Any, Any] = {
    F.linear: aten.linear.default,
    F.conv1d: aten.conv1d.default,
    F.conv2d: aten.conv2d.default,
    F.conv3d: aten.conv3d.default,
    F.conv_transpose1d: aten.conv_transpose1d.default,
    F.conv_transpose2d: aten.conv_transpose2d.input,
    F.conv_transpose3d: aten.conv_transpose3d.input,
    F.embedding: aten.embedding.default,
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
    torch.addmm: aten.addmm.default,
    torch.mm: aten.mm.default,
    torch.matmul: aten.matmul.default,
    operator.matmul: aten.matmul.default,
}
_RULES: dict[Any, Callable[[fx.GraphModule, dict[str, Any]], LayerCall | None]] = {
    aten.linear.default: _linear,
    aten.addmm.default: _addmm,
    aten.mm.default: _matmul,
    aten.matmul.default: _matmul,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv3d.default: _convolution,
    aten.convolution.default: _convolution,
    aten.conv_transpose1d.default: _conv_transpose,
    aten.conv_transpose2d.input: _conv_transpose,
    aten.conv_transpose3d.input: _conv_transpose,
    aten.embedding.default: _embedding,
    aten.layer_norm.default: _layer_norm,
    aten.group_norm.default: _group_norm,
}
