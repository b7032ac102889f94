"""Tensors that a graph of operators makes are made where its inputs are.

torch.export writes down the device that ``torch.arange(n, device=x.device)`` found; a network that is moved afterwards
would go on making them there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch.utils import _pytree as pytree

from tdfx.passes.base import RewritePass


@dataclass(frozen=True)
class FreeDevices(RewritePass):
    """In operators of aten a device becomes that of the first input."""

    def rewrite(self, graph_module: fx.GraphModule) -> None:
        graph = graph_module.graph
        named = [node for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload) and _names_device(node)]
        inputs = graph.find_nodes(op="placeholder")
        if not named or not inputs:
            return
        with graph.inserting_after(inputs[-1]):
            device = graph.call_function(getattr, (inputs[0], "device"))
        for node in named:
            node.args, node.kwargs = fx.node.map_aggregate(
                (node.args, node.kwargs), lambda value: device if isinstance(value, torch.device) else value
            )


def _names_device(node: fx.Node) -> bool:
    values = pytree.tree_leaves((node.args, node.kwargs))
    return any(isinstance(value, torch.device) for value in values)
