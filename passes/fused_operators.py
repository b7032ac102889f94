"""Which operators follow a layer and are fused with it by inference runtimes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F

from tdfx.passes.base import AnalysisPass
from tdfx.passes.fold_batch_norm import BatchNorm
from tdfx.passes.input_means import ADDITIONS
from tdfx.passes.shape_prop import TensorMeta
from tdfx.records.layer import Fused, Site

ATEN = torch.ops.aten
RELUS = (F.relu, torch.relu, torch.relu_, ATEN.relu.default, ATEN.relu_.default, "relu", "relu_")
SUMS = (*ADDITIONS, ATEN.add.Tensor, ATEN.add_.Tensor)


@dataclass(frozen=True)
class FusedOperators(AnalysisPass[dict[str, tuple[Fused, ...]]]):
    """What follows every call of a site's layers, by name of the layer.

    Attributes:
        sites: the layers of interest.
        metas: shapes by node name, as ``ShapeProp`` returns them.
    """

    sites: tuple[Site, ...]
    metas: dict[str, TensorMeta]

    def apply(self, graph_module: fx.GraphModule) -> dict[str, tuple[Fused, ...]]:
        found: dict[str, tuple[Fused, ...]] = {layer.name: () for site in self.sites for layer in site.layers}
        for node in graph_module.graph.nodes:
            if node.op == "call_module" and node.target in found:
                found[node.target] = (*found[node.target], self._follows(graph_module, node))
        # Inside Python code nothing is known of what follows.
        nothing: Fused = ""
        unknown = {site.name: (nothing,) * len(site.layer.calls) for site in self.sites}
        return unknown | {name: follows for name, follows in found.items() if follows}

    def _follows(self, graph_module: fx.GraphModule, call: fx.Node) -> Fused:
        user = _only_user(call)
        if user is not None and _is_batch_norm(graph_module, user):  # folded when the network is exported
            user = _only_user(user)
        if user is None:
            return ""
        if _is_relu(graph_module, user):
            return "relu"
        if not self._is_add(user) or self._later_term(graph_module, user) is not call:
            return ""
        after = _only_user(user)
        return "add_relu" if after is not None and _is_relu(graph_module, after) else "add"

    def _later_term(self, graph_module: fx.GraphModule, addition: fx.Node) -> fx.Node | None:
        """The last of the layers of interest that are added, which is the one that runtimes fuse the sum with."""
        names = {layer.name for site in self.sites for layer in site.layers}
        calls = [_behind_batch_norm(graph_module, term) for term in addition.all_input_nodes]
        found = [call for call in calls if call.op == "call_module" and call.target in names]
        return max(found, default=None)

    def _is_add(self, node: fx.Node) -> bool:
        """Whether it is a sum of two tensors of the same shape."""
        if node.op not in ("call_function", "call_method") or node.target not in SUMS:
            return False
        terms = [term for term in node.args if isinstance(term, fx.Node)]
        shapes = {self.metas[term.name].shape for term in terms if term.name in self.metas}
        return len(terms) == 2 and len(shapes) == 1


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _behind_batch_norm(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0] if _is_batch_norm(graph_module, node) else node


def _is_batch_norm(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(graph_module.get_submodule(str(node.target)), BatchNorm)


def _is_relu(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(graph_module.get_submodule(str(node.target)), nn.ReLU)
    return node.op in ("call_function", "call_method") and node.target in RELUS
