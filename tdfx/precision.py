"""Networks in float16 or bfloat16, and the same in float32, in which small changes of weights are not lost."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

HALVES = (torch.float16, torch.bfloat16)


def is_half(module: nn.Module) -> bool:
    """Whether a weight has fewer bits than float32."""
    return any(weight.dtype in HALVES for weight in module.parameters())


def at_least_float32(value: Tensor) -> Tensor:
    """The same in float32 if it has fewer bits."""
    return value.float() if value.dtype in HALVES else value


def in_float32(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy that takes the same inputs and computes in float32 all that was computed in float16 or bfloat16.

    Args:
        graph_module: a network all of whose inputs are tensors.
    """
    wide = copy.deepcopy(graph_module)
    wide._apply(at_least_float32)  # type: ignore[no-untyped-call]
    for node in list(wide.graph.nodes):
        node.args, node.kwargs = map_aggregate(node.args, _wide), map_aggregate(node.kwargs, _wide)
        if node.op == "call_method" and node.target in ("half", "bfloat16"):
            node.target = "float"
        if node.op == "placeholder":
            with wide.graph.inserting_after(node):
                value = wide.graph.call_function(at_least_float32)
            node.replace_all_uses_with(value)
            value.args = (node,)
    wide.recompile()
    return wide


def _wide(argument: Any) -> Any:
    return torch.float32 if argument in HALVES else argument
