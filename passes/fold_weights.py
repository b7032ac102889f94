"""Folds weights that a network computes from its parameters alone, as standardized ones, into layers.

A convolution whose weight is standardized in forward (Qiao et al. 2019, section 3.1) computes the same weight in every
run in eval mode. That weight takes the place of the parameter, so that ``LiftLayers`` finds a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tdfx.passes.base import RewritePass, set_submodule
from tdfx.passes.drop_unread import may_have_effect
from tdfx.passes.layer_operators import arguments, attribute, parameter_read


@dataclass(frozen=True)
class FoldWeights(RewritePass):
    """Where a layer's operator takes a weight computed from a parameter of its shape, the parameter holds that weight.

    Parameters that other values are made from too, and those of the root, stay as they are.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> None:
        values = _constants(graph_module)
        for node in list(graph_module.graph.nodes):
            weight = (arguments(node) or {}).get("weight")
            if isinstance(weight, fx.Node) and weight in values and weight.op != "get_attr":
                source = _source(graph_module, weight, values)
                if source is not None:
                    _fold(graph_module, weight, source, values)


def _constants(graph_module: fx.GraphModule) -> dict[fx.Node, Tensor]:
    """Values of the nodes that depend on parameters and buffers alone."""
    values: dict[fx.Node, Tensor] = {}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for node in graph_module.graph.nodes:
            state = torch.get_rng_state()
            value = _value(graph_module, node, values)
            if isinstance(value, Tensor) and torch.equal(state, torch.get_rng_state()):
                values[node] = value
    return values


def _value(graph_module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Tensor]) -> object:
    if node.op == "get_attr":
        return attribute(graph_module, node)
    inputs = node.all_input_nodes
    if node.op not in ("call_function", "call_method") or not inputs or any(value not in values for value in inputs):
        return None
    if may_have_effect(node) and not _normalizes(node):
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _normalizes(node: fx.Node) -> bool:
    """Whether a node is a BatchNorm without running statistics, which has no effect even if it is told to train."""
    running = (*node.args[1:3], node.kwargs.get("running_mean"), node.kwargs.get("running_var"))
    return node.target is F.batch_norm and not any(isinstance(value, fx.Node) for value in running)


def _source(graph_module: fx.GraphModule, weight: fx.Node, values: dict[fx.Node, Tensor]) -> fx.Node | None:
    """The read of the only parameter of a computed weight's shape that it is made from, if nothing else is."""
    shape = values[weight].shape
    reads = {node: parameter for node in values if (parameter := parameter_read(graph_module, node)) is not None}
    sources = [node for node in _before(weight) if node in reads and reads[node].shape == shape]
    if len(sources) != 1:
        return None
    (source,) = sources
    path = str(source.target).rpartition(".")[0]
    if not path or any(graph_module.get_submodule(path).children()):
        return None
    same = [node for node in reads if reads[node] is reads[source]]
    return source if len(same) == 1 and _leads_to(source, weight) else None


def _before(node: fx.Node) -> dict[fx.Node, None]:
    """Everything that a node depends on."""
    found: dict[fx.Node, None] = {}
    left = [node]
    while left:
        new = [value for value in left.pop().all_input_nodes if value not in found]
        found |= dict.fromkeys(new)
        left += new
    return found


def _leads_to(node: fx.Node, end: fx.Node) -> bool:
    """Whether whatever is made from a node goes through another one."""
    seen, left = {node, end}, [node]
    while left:
        users = left.pop().users
        if not users:
            return False
        new = users.keys() - seen
        seen |= new
        left += new
    return True


def _fold(graph_module: fx.GraphModule, weight: fx.Node, source: fx.Node, values: dict[fx.Node, Tensor]) -> None:
    graph = graph_module.graph
    with graph.inserting_before(weight):
        read = graph.get_attr(str(source.target))
    weight.replace_all_uses_with(read)
    for node in sorted((weight, *_before(weight)), reverse=True):
        if not node.users:
            graph.erase_node(node)
    path, _, name = str(source.target).rpartition(".")
    owner, holder = graph_module.get_submodule(path), nn.Module()
    for key, parameter in owner.named_parameters(recurse=False):
        holder.register_parameter(key, parameter)
    for key, buffer in owner.named_buffers(recurse=False):
        holder.register_buffer(key, buffer)
    setattr(holder, name, nn.Parameter(values[weight].clone(), bool(getattr(owner, name).requires_grad)))
    set_submodule(graph_module, path, holder)
