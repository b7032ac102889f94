"""Answers without a parameter what a graph asks about it: its shape, dtype and device.

Code such as ``x.to(self.fc.weight.dtype)`` reads a weight for what it is and not for its values. A layer whose weight
is read by nothing else can be replaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tdfx.passes.base import RewritePass
from tdfx.passes.layer_operators import parameter_read

FIXED = frozenset({"shape", "ndim", "size", "dim", "numel", "nelement", "stride", "is_floating_point", "is_complex"})
"""What is said of a parameter once and for all, by attributes and methods."""
MOVING = frozenset({"dtype", "device", "itemsize", "is_cpu", "is_cuda", "is_mps", "is_xpu", "is_meta", "get_device"})
"""What changes when a network is moved or converted."""
NEW = frozenset({"new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"})
"""Methods that make a tensor of the same dtype on the same device."""
LIKE = frozenset({"to", "type_as"})
"""Methods that convert another tensor to the same."""
_ARITHMETIC = ("_operator", "math")


@dataclass(frozen=True)
class DescribeParameters(RewritePass):
    """Shapes of parameters become constants; a buffer without elements that counts tells dtype and device.

    The buffer is the root's own, called after the parameter, in no state dict, and moves with the network.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> None:
        known: dict[fx.Node, Any] = {}
        for node in list(graph_module.graph.nodes):
            parameter = parameter_read(graph_module, node)
            if parameter is None:
                _fold(node, known)
                continue
            asking = {user: _asked(user, node) for user in node.users}
            for user in [user for user, name in asking.items() if name in FIXED]:
                known[user] = _call(user, (parameter, *user.args[1:]), dict(user.kwargs))
            moving = [user for user, name in asking.items() if name is not None and name not in FIXED]
            if moving:
                kind = _kind(graph_module, node, parameter)
                for user in moving:
                    if asking[user] in NEW:
                        user.args = (kind, *user.args[1:])  # what else it is given, it reads
                    else:
                        user.replace_input_with(node, kind)
        for node in reversed(graph_module.graph.nodes):
            if not node.users and (node in known or parameter_read(graph_module, node) is not None):
                graph_module.graph.erase_node(node)


def _asked(user: fx.Node, read: fx.Node) -> str | None:
    """What a node asks a parameter for, by name; None if it computes with it."""
    if user.op == "call_function" and user.target is getattr:
        name = str(user.args[1])
        return name if name in FIXED | MOVING else None
    if isinstance(user.target, torch._ops.OpOverload):
        name = user.target.overloadpacket.__name__
    elif user.op == "call_method":
        name = str(user.target)
    else:
        return None
    if user.args[:1] != (read,):
        return name if name in LIKE else None
    is_question = user.op == "call_method" and len(user.all_input_nodes) == 1 and name in FIXED | MOVING
    return name if name in NEW or is_question else None


def _fold(node: fx.Node, known: dict[fx.Node, Any]) -> None:
    """Arithmetic on answers is an answer; others get them as constants."""
    answered = [value in known for value in node.all_input_nodes]
    if not any(answered):
        return
    if all(answered) and (node.op == "call_method" or getattr(node.target, "__module__", None) in _ARITHMETIC):
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        known[node] = _call(node, args, kwargs)
        return
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _constant(known[n]) if n in known else n)
    node.args, node.kwargs = args, kwargs


def _call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _constant(value: Any) -> Any:
    return tuple(value) if isinstance(value, torch.Size) else value


def _kind(graph_module: fx.GraphModule, read: fx.Node, parameter: Tensor) -> fx.Node:
    """A read of an empty buffer of the parameter's dtype and device."""
    name = add_kind(graph_module, f"{str(read.target).replace('.', '_')}_kind", parameter)
    with graph_module.graph.inserting_before(read):
        return graph_module.graph.get_attr(name)


def add_kind(graph_module: fx.GraphModule, name: str, like: Tensor) -> str:
    """Gives a graph an empty buffer of a tensor's dtype and device, which moves with it; returns its name."""
    while hasattr(graph_module, name):
        name += "_"
    graph_module.register_buffer(name, like.detach().new_empty(0), persistent=False)
    return name
