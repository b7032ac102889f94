"""Removes what does nothing in eval mode: Dropout, functional dropout and Identity."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import fx, nn
from torch.nn import functional as F

from tdfx.passes.base import RewritePass

INACTIVE_MODULES = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
INACTIVE_FUNCTIONS = (
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
)


@dataclass(frozen=True)
class DropInactive(RewritePass):
    """Users of a dropped node read its input instead."""

    def rewrite(self, graph_module: fx.GraphModule) -> None:
        for node in list(graph_module.graph.nodes):
            if _is_inactive(graph_module, node):
                node.replace_all_uses_with(node.all_input_nodes[0])
                graph_module.graph.erase_node(node)


def _is_inactive(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        return type(module) in INACTIVE_MODULES and len(node.all_input_nodes) == 1
    if node.op != "call_function" or node.target not in INACTIVE_FUNCTIONS:
        return False
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments["training"] is False
