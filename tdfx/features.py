"""Values inside a compressed network that stand for values inside the original: those that its blocks hand on.

Matching them besides the outputs tells every block what it should have computed, which the outputs alone tell only
through all blocks behind it (Romero et al. 2015, section 2.2: hints).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, fx, nn

from tdfx.passes.base import assemble
from tdfx.passes.shape_prop import ShapeProp, TensorMeta
from tdfx.records.plan import Plan


def paired_nodes(
    original: fx.GraphModule, compressed: fx.GraphModule, plan: Plan, inputs: Sequence[Tensor]
) -> tuple[list[str], list[str]]:
    """Names of the nodes, in both graphs, that hold what the blocks of the network hand on.

    What a layer of the plan puts out is followed through the activations and sums behind it, as long as its shape stays
    and up to where it is read by several nodes, by the next layer or by Dropout. Left out is what only a layer reads
    that something else is added to (the inside of a residual block), and what only the output reads. Layers called
    several times are skipped.

    Args:
        original: the network before.
        compressed: the one after; nodes that are no layers have the names that they have in the original.
        plan: what became of the layers.
        inputs: one value for each placeholder; the original runs on them.
    """
    names = {node.name for node in compressed.graph.nodes}
    metas = ShapeProp(tuple(inputs)).apply(original)
    wanted, found = _calls(original), _calls(compressed)
    stops = {node for candidate in plan.candidates for node in wanted.get(candidate.site, ())}
    stops |= {node for node in original.graph.nodes if node.op == "output" or node.name not in names}
    stops |= {node for target, nodes in wanted.items() if _is_dropout(original, target) for node in nodes}
    paths: dict[fx.Node, list[fx.Node]] = {}
    pairs: dict[fx.Node, str] = {}
    for candidate in plan.candidates:
        path = candidate.site if candidate.is_dense else f"{candidate.site}.{candidate.method}"
        # The last node of a chain, or the layer itself.
        steps = [nodes for target, nodes in found.items() if f"{target}.".startswith(f"{path}.")]
        calls = wanted.get(candidate.site, ())
        if len(calls) == 1 and steps and all(len(nodes) == 1 for nodes in steps):
            layer = calls[0]
            paths[layer] = _path(layer, stops, metas)
            end = paths[layer][-1]
            pairs[end] = steps[-1][0].name if end is layer else end.name
    inner = {node for path in paths.values() if _joins(path) for node in path[0].all_input_nodes}
    kept = [end for end in pairs if len(end.users) > 1 or not (end in inner or _is_output(end))]
    return [end.name for end in kept], [pairs[end] for end in kept]


def observed(graph_module: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """The same network, sharing its modules, that returns its output and after it the values of these nodes."""
    graph = copy.deepcopy(graph_module.graph)
    by_name = {node.name: node for node in graph.nodes}
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = ((output.args[0], tuple(by_name[name] for name in names)),)
    return assemble(graph_module, graph)


def mismatch(wanted: Sequence[Tensor], found: Sequence[Tensor], variances: Sequence[Tensor]) -> Tensor:
    """Mean over values of half the mean squared error over the variance; differentiable in what was found."""
    errors = [F.mse_loss(got, value) / spread for value, got, spread in zip(wanted, found, variances, strict=True)]
    return sum(errors[1:], start=errors[0]) / (2 * len(errors))


def _calls(graph_module: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """The nodes that call each module, in order."""
    calls: dict[str, list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    return calls


def _is_dropout(graph_module: fx.GraphModule, target: str) -> bool:
    return isinstance(graph_module.get_submodule(target), nn.modules.dropout._DropoutNd)


def _path(layer: fx.Node, stops: Collection[fx.Node], metas: Mapping[str, TensorMeta]) -> list[fx.Node]:
    """The layer and what follows, until several nodes read it, or one of these, or one that changes its shape."""
    path = [layer]
    while len(path[-1].users) == 1:
        reader = next(iter(path[-1].users))
        if reader in stops or metas.get(reader.name) != metas[layer.name]:
            break
        path.append(reader)
    return path


def _joins(path: Sequence[fx.Node]) -> bool:
    """Whether something else is added on the way."""
    return any(len(node.all_input_nodes) > 1 for node in path)


def _is_output(node: fx.Node) -> bool:
    return any(reader.op == "output" for reader in node.users)
