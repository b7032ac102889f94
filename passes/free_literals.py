"""Devices and dtypes that torch.export wrote down follow the network.

It writes the device that ``torch.arange(n, device=x.device)`` found, and the dtype of ``torch.ones(n, dtype=x.dtype)``;
a network that is moved or converted afterwards would go on making those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from tdfx.passes.base import RewritePass
from tdfx.passes.describe_parameters import add_kind
from tdfx.precision import HALVES


@dataclass(frozen=True)
class FreeLiterals(RewritePass):
    """Operators ask an empty buffer for their device, and in half precision for the dtype of that precision.

    float32 in a network of float32 may be meant so, as where a norm is computed in it for its range, and stays. A
    device that forward names itself cannot be told from the network's.
    """

    def rewrite(self, graph_module: fx.GraphModule) -> None:
        graph = graph_module.graph
        like = next((value for value in graph_module.parameters() if value.is_floating_point()), None)
        operators = [node for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        if like is None or not any(_asked(leaf, like) for node in operators for leaf in _leaves(node)):
            return
        name = add_kind(graph_module, "kind", like)
        with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
            kind = graph.get_attr(name)
            answers = {attribute: graph.call_function(getattr, (kind, attribute)) for attribute in ("device", "dtype")}
        for node in operators:
            node.args, node.kwargs = fx.node.map_aggregate(
                (node.args, node.kwargs), lambda leaf: answers.get(_asked(leaf, like), leaf)
            )
        for answer in answers.values():
            if not answer.users:
                graph.erase_node(answer)


def _asked(leaf: Any, like: Tensor) -> str:
    """The attribute of a network's parameter that an argument is the value of; "" for one that stays."""
    if isinstance(leaf, torch.device) and leaf.type == like.device.type:
        return "device"
    return "dtype" if isinstance(leaf, torch.dtype) and leaf is like.dtype and leaf in HALVES else ""


def _leaves(node: fx.Node) -> list[Any]:
    return pytree.tree_leaves((node.args, dict(node.kwargs)))
