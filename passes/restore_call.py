"""Makes a graph of tensors callable as the model is: with containers of tensors, and with its constants."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from tdfx.passes.base import RewritePass
from tdfx.passes.capture import LayerTracer
from tdfx.signature import Signature, Slot


@dataclass(frozen=True)
class RestoreCall(RewritePass):
    """Arguments take the place of the tensors in them; a call with another constant fails by an assertion.

    Attributes:
        signature: of the call; its names are those of the graph's inputs.
    """

    signature: Signature

    def rewrite(self, graph_module: fx.GraphModule) -> None:
        flat = {str(node.target): node for node in graph_module.graph.find_nodes(op="placeholder")}
        graph = fx.Graph(tracer_cls=LayerTracer)
        arguments = {**self.signature.args, **self.signature.kwargs}
        defaults = _defaults(arguments)
        values = {name: graph.create_node("placeholder", name, defaults.get(name, ()), name=name) for name in arguments}
        found: dict[fx.Node, Any] = {}
        for name, tree in arguments.items():
            found |= {flat[slot]: value for slot, value in _opened(graph, values[name], name, tree)}
        graph.output(graph.graph_copy(graph_module.graph, found))
        graph_module.graph = graph


def _defaults(arguments: Mapping[str, Any]) -> dict[str, tuple[Any]]:
    """Constants behind which no argument must be given."""
    found: dict[str, tuple[Any]] = {}
    for name, tree in reversed([*arguments.items()]):
        if isinstance(tree, Slot) or not pytree.tree_is_leaf(tree):
            break
        found[name] = (tree,)
    return found


def _opened(graph: fx.Graph, value: fx.Node, where: str, tree: Any) -> Iterator[tuple[str, fx.Node]]:
    """Tensors in an argument by name; constants in it are compared."""
    if isinstance(tree, Slot):
        yield tree.name, value
        return
    if pytree.tree_is_leaf(tree):
        same = graph.call_function(operator.eq, (value, tree))
        graph.call_function(torch._assert, (same, f"{where} was {tree!r} when the network was captured"))
        return
    entries, _ = pytree.tree_flatten_with_path(tree, is_leaf=lambda inner: inner is not tree)
    for (step,), inner in entries:
        read = (getattr, step.name) if isinstance(step, pytree.GetAttrKey) else (operator.getitem, _key(step))
        name = inner.name if isinstance(inner, Slot) else None
        entry = graph.create_node("call_function", read[0], (value, read[1]), name=name)
        yield from _opened(graph, entry, f"{where}{pytree.keystr((step,))}", inner)


def _key(step: Any) -> Any:
    return step.idx if isinstance(step, pytree.SequenceKey) else step.key
