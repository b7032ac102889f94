"""Splices factor chains into the graph in place of the layers they replace."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from tdfx.decompositions.base import Factors
from tdfx.errors import PassError
from tdfx.passes.base import RewritePass, exchange, set_submodule
from tdfx.passes.in_place import InPlace
from tdfx.passes.stand_in import StandIn


@dataclass(frozen=True)
class Replacement:
    """A chain for one layer.

    Attributes:
        method: name of the decomposition.
        chain: the layers, called in order.
        factors: what the chain was built from, for verification; None takes the chain's own weights for right.
        read: by the name of a factor, the qualified name of another chain's weight that is its own transposed: the
            graph multiplies by that one instead, so that there is one.
    """

    method: str
    chain: nn.Sequential
    factors: Factors | None = None
    read: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Factorize(RewritePass):
    """Every call of a layer becomes calls of ``{layer}.{method}.{factor}``, one node a factor.

    Inside Python code the chain takes the layer's place.

    Attributes:
        replacements: chains by the qualified name of the layer they replace.
    """

    replacements: Mapping[str, Replacement] = field(default_factory=dict)

    def rewrite(self, graph_module: fx.GraphModule) -> None:
        if isinstance(graph_module, InPlace):
            for name, replacement in self.replacements.items():
                stand_in = StandIn(graph_module.get_submodule(name), replacement.method, replacement.chain)
                exchange(graph_module, name, stand_in.train(graph_module.training))
            return
        known = {node.target for node in graph_module.graph.nodes if node.op == "call_module"}
        missing = [name for name in self.replacements if name not in known]
        if missing:
            raise PassError(f"Factorize: no node calls {', '.join(missing)}; the graph calls {len(known)} modules")
        for name, replacement in self.replacements.items():
            factors = dict(replacement.chain.named_children())
            called = nn.Sequential(OrderedDict((n, m) for n, m in factors.items() if n not in replacement.read))
            holder = nn.Sequential(OrderedDict({replacement.method: called}))
            set_submodule(graph_module, name, holder.train(graph_module.training))
        for node in list(graph_module.graph.nodes):
            if node.op == "call_module" and node.target in self.replacements:
                _splice(graph_module.graph, node, self.replacements[node.target])


def _splice(graph: fx.Graph, node: fx.Node, replacement: Replacement) -> None:
    args, kwargs = node.args, dict(node.kwargs)
    with graph.inserting_before(node):
        for factor, _ in replacement.chain.named_children():
            if factor in replacement.read:
                transposed = graph.get_attr(replacement.read[factor])
                value = graph.call_function(torch.matmul, (*args, *kwargs.values(), transposed))
            else:
                value = graph.call_module(f"{node.target}.{replacement.method}.{factor}", args, kwargs)
            args, kwargs = (value,), {}
    value.meta.update(node.meta)
    node.replace_all_uses_with(value)
    graph.erase_node(node)
