"""Values inside a compressed network that stand for values inside the original: what each compressed layer puts out.

Matching them besides the outputs tells every layer what it should have computed, which the outputs alone tell only
through all layers behind it (Romero et al. 2015, section 2.2: hints).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, fx

from tdfx.divergence import variance
from tdfx.records.plan import Plan


def paired_nodes(original: fx.GraphModule, compressed: fx.GraphModule, plan: Plan) -> tuple[list[str], list[str]]:
    """Names of the nodes, in both graphs, that put out what the plan's layers do; those of layers called once."""
    wanted, found = _calls(original), _calls(compressed)
    pairs = []
    for candidate in plan.candidates:
        path = candidate.site if candidate.is_dense else f"{candidate.site}.{candidate.method}"
        # The last node of a chain, or the layer itself.
        inside = [name for target, names in found.items() if f"{target}.".startswith(f"{path}.") for name in names]
        steps = {target for target in found if f"{target}.".startswith(f"{path}.")}
        if len(wanted.get(candidate.site, ())) == 1 and len(inside) == len(steps) and inside:
            pairs.append((wanted[candidate.site][0], inside[-1]))
    return [name for name, _ in pairs], [name for _, name in pairs]


def observed(graph_module: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """The same network, sharing its modules, that returns its output and after it the values of these nodes."""
    graph = copy.deepcopy(graph_module.graph)
    by_name = {node.name: node for node in graph.nodes}
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = ((output.args[0], tuple(by_name[name] for name in names)),)
    seen = fx.GraphModule(graph_module, graph)
    return seen.train(graph_module.training)


def mismatch(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> Tensor:
    """Mean over values of half the mean squared error over the variance; differentiable in what was found."""
    errors = [F.mse_loss(got, value) / variance(value) for value, got in zip(wanted, found, strict=True)]
    return sum(errors[1:], start=errors[0]) / (2 * len(errors))


def _calls(graph_module: fx.GraphModule) -> dict[str, list[str]]:
    """Names of the nodes that call each module, in order."""
    calls: dict[str, list[str]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node.name)
    return calls
