"""Lifts operators on parameters to layers: ``linear(x, weight, bias)`` becomes a call of nn.Linear.

A graph from torch.export holds operators alone, and a model may call a functional convolution on a parameter of its
own. Each operator that amounts to a layer becomes a call of it under the qualified name that its weight has in the
model, so that later passes find layers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import fx, nn

from tdfx.passes.base import RewritePass
from tdfx.passes.layer_operators import LayerCall, is_transpose, layer_call, parameter_read


@dataclass(frozen=True)
class LiftLayers(RewritePass):
    """Operators on parameters become calls of layers; all others stay.

    A parameter that one operator reads as it is and another one transposed stays a parameter.

    Attributes:
        origin: the model, which says what a module that computes with a tied weight is called.
    """

    origin: nn.Module

    def rewrite(self, graph_module: fx.GraphModule) -> None:
        calls = {
            node: call for node in graph_module.graph.nodes if (call := layer_call(graph_module, node)) is not None
        }
        transposable = {call.weight for call in calls.values() if _is_read_transposed_alone(graph_module, call, calls)}
        layers: dict[str, LayerCall] = {}
        values: dict[fx.Node, fx.Node] = {}
        for node, call in calls.items():
            if not call.transposed or call.weight in transposable:
                name = self._name(graph_module, node, call, layers)
                inputs = tuple(values.get(value, value) for value in call.inputs)
                shift = values.get(call.shift, call.shift)  # type: ignore[arg-type]
                values[node] = _replace(graph_module.graph, node, name, inputs, shift)
        for other in dict.fromkeys(other for call in calls.values() for other in call.replaced):
            view = other.all_input_nodes[0]
            graph_module.graph.erase_node(other)
            if not view.users:
                graph_module.graph.erase_node(view)
        _erase_unread(graph_module.graph)
        for name, call in layers.items():
            make_way(graph_module, name, call.layer)
            graph_module.add_submodule(name, call.layer.train(graph_module.training))

    def _name(self, graph_module: fx.GraphModule, node: fx.Node, call: LayerCall, layers: dict[str, LayerCall]) -> str:
        """The name of an equal layer, or a new one, entered among the layers."""
        path, _, attribute = call.weight.rpartition(".")
        own = module_path(node)
        modules = dict(self.origin.named_modules(remove_duplicate=False))
        weight = graph_module.get_parameter(call.weight)
        if own in modules and modules[own] is not modules.get(path) and getattr(modules[own], "weight", None) is weight:
            path = own  # a tied weight has one name in a graph, and layers of several names
        is_layer = attribute == "weight" and path and not any(modules[path].children())
        first = path if is_layer else call.weight
        called = {n.target for n in graph_module.graph.nodes if n.op == "call_module"} - layers.keys()
        for name in (first, *(f"{first}_{number}" for number in range(1, len(layers) + len(called) + 1))):
            if name in layers and _same(layers[name], call):
                return name
            if name not in layers and name not in called:
                layers[name] = call
                return name
        raise AssertionError("there are more names than layers")


def module_path(node: fx.Node) -> str:
    """Qualified name of the module in whose forward torch.export met an operator; "" where it is not known."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return re.sub(r"@\d+$", "", stack[-1][0]) if stack else ""


def _same(one: LayerCall, other: LayerCall) -> bool:
    held = [
        [id(value) for value in vars(call.layer)["_parameters"].values()][call.transposed :] for call in (one, other)
    ]
    return (one.weight, repr(one.layer), held[0]) == (other.weight, repr(other.layer), held[1])


def _replace(graph: fx.Graph, node: fx.Node, name: str, inputs: tuple[fx.Node, ...], shift: fx.Node | None) -> fx.Node:
    with graph.inserting_before(node):
        # The module comes later, once it is known who else reads its parameters.
        value = graph.create_node("call_module", name, inputs)
        value.meta.update(node.meta)
        if shift is not None:
            value = graph.call_function(torch.add, (value, shift))
    node.replace_all_uses_with(value)
    graph.erase_node(node)
    return value


def _erase_unread(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if not node.users and (node.op == "get_attr" or is_transpose(node)):
            graph.erase_node(node)


def make_way(graph_module: fx.GraphModule, name: str, layer: nn.Module) -> None:
    """Values that lie at a layer's name, or beneath it without being the layer's own, are read elsewhere."""
    for node in graph_module.graph.nodes:
        if node.op != "get_attr" or not f"{node.target}.".startswith(f"{name}."):
            continue
        attribute = str(node.target)[len(name) + 1 :] or "weight"
        holder, _, old = str(node.target).rpartition(".")
        value = getattr(graph_module.get_submodule(holder), old)
        if getattr(layer, attribute, None) is value:
            node.target = f"{name}.{attribute}"
            continue
        path, _, new = f"{name}_{attribute.replace('.', '_')}".rpartition(".")
        parent = graph_module.get_submodule(path)
        while getattr(parent, new, value) is not value:
            new += "_"
        node.target = f"{path}.{new}" if path else new
        if old in graph_module.get_submodule(holder)._buffers:
            parent.register_buffer(new, value)
        else:
            setattr(parent, new, value)
    holder, _, attribute = name.rpartition(".")
    parent = graph_module.get_submodule(holder)
    if hasattr(parent, attribute):
        delattr(parent, attribute)


def _is_read_transposed_alone(graph_module: fx.GraphModule, call: LayerCall, calls: dict[fx.Node, LayerCall]) -> bool:
    """Whether all readers of a parameter hold it transposed, so that a copy can stand for it."""
    reads = [node for node in graph_module.graph.nodes if parameter_read(graph_module, node) is not None]
    (value,) = {id(parameter_read(graph_module, node)) for node in reads if node.target == call.weight}
    same = [node for node in reads if id(parameter_read(graph_module, node)) == value]
    readers = [end for node in same for end in _ends(node)]
    called = [node.target for node in graph_module.graph.nodes if node.op == "call_module"]
    if any(id(held) == value for name in called for held in graph_module.get_submodule(name).parameters()):
        return False  # as it is, by a layer
    return all(node.target == call.weight for node in same) and all(
        end in calls and calls[end].transposed for end in readers
    )


def _ends(node: fx.Node) -> list[fx.Node]:
    return [end for user in node.users for end in (_ends(user) if is_transpose(user) else [user])]
