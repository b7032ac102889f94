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
            passed_on = _passed_on(graph_module, node)
            if isinstance(passed_on, fx.Node):
                node.replace_all_uses_with(passed_on)
                graph_module.graph.erase_node(node)


def _passed_on(graph_module: fx.GraphModule, node: fx.Node) -> object:
    """The argument that an inactive node returns as it is, None for other nodes."""
    if node.op == "call_module":
        inactive = type(graph_module.get_submodule(str(node.target))) in INACTIVE_MODULES
        return (*node.args, *node.kwargs.values())[0] if inactive else None
    if node.op != "call_function" or node.target not in INACTIVE_FUNCTIONS:
        return None
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments["input"] if bound.arguments["training"] is False else None
