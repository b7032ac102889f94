"""A captured network as a graph of its operators, to be looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import networkx as nx
from torch import fx

from tdfx.decompositions import method_for
from tdfx.errors import PlanError
from tdfx.passes.dependencies import Dependencies
from tdfx.passes.in_place import InPlace
from tdfx.passes.shape_prop import ShapeProp, Shapes, bind
from tdfx.passes.sharing import sharing_groups
from tdfx.passes.sites import FindSites
from tdfx.passes.unpack_recurrent import feeders
from tdfx.plan_check import check_fingerprints, planned_sites
from tdfx.records.candidate import DENSE, Candidate
from tdfx.records.capture import Capture
from tdfx.records.dependencies import OPERATION, Operation, operations
from tdfx.records.layer import LayerSpec, Site
from tdfx.records.network_graph import NetworkGraph
from tdfx.records.plan import Plan
from tdfx.targets import Target, find_target, layer_cost, site_cost


def graph(captured: Capture, plan: Plan | None = None, *, target: str | None = "ort-cpu") -> NetworkGraph:
    """Shows what a network's operators need of each other, and what a plan makes of its layers.

    Args:
        captured: what ``capture`` returned.
        plan: made for the same structure; None shows all layers as they are.
        target: runtime whose latency the critical path is estimated with, None for no estimate; that of the plan where
            there is one.

    Returns:
        Peak of the activations' memory, critical path, groups of layers that share parameters; ``draw`` draws it.

    Raises:
        OptionError: the target is not known.
        PlanError: the plan was made for another model, or was made with ``trainable`` where the capture was not.
    """
    runtime = find_target(target if plan is None else plan.target)
    module = captured.module
    inputs = bind(module, captured.args, captured.kwargs)
    dependencies = Dependencies(inputs, runtime).run(module)
    shapes = ShapeProp(inputs).run(module)
    found, skipped = FindSites(shapes).run(module)
    sites = {site.name: site for site in found}
    if plan is None:
        chosen = {name: Candidate(name, DENSE, (), site_cost(site, runtime), 0.0, "") for name, site in sites.items()}
    else:
        check_fingerprints(plan, captured, weights=False)
        if plan.trainable != captured.trainable:
            raise PlanError(
                f"the plan was made with trainable={plan.trainable}, the model captured with {captured.trainable}; "
                "capture it as the plan says"
            )
        sites = planned_sites(plan, found)
        chosen = {candidate.site: candidate for candidate in plan.candidates}
        skipped = (*skipped, *plan.skipped)
    layers = {layer.name: layer for site in sites.values() for layer in site.layers}
    macs = sum(operation.macs for operation in operations(dependencies).values())
    in_place = isinstance(module, InPlace)
    if in_place:
        dependencies = _in_order(module, shapes, layers)
    choices = {entry.site: entry for name, site in sites.items() for entry in _of_layers(site, chosen[name], runtime)}
    dependencies = _without_identities(dependencies, {core: layers.get(name) for core, name in feeders(module).items()})
    return NetworkGraph(
        name=type(captured.original).__name__,
        dependencies=_with_latencies(dependencies, choices),
        layers=layers,
        choices=choices,
        skipped=frozenset(entry.layer for entry in (*skipped, *captured.skipped)),
        sharing=sharing_groups(module, shapes.calls if in_place else None),
        macs=macs,
        has_data_flow=not in_place,
    )


def _in_order(module: fx.GraphModule, shapes: Shapes, layers: Mapping[str, LayerSpec]) -> nx.DiGraph:
    """The calls of layers inside Python code, each after the one before."""
    found = nx.DiGraph()
    for call, meta in shapes.items():
        name = call.rpartition("[")[0]
        if name not in shapes.calls:
            continue
        macs = layers[name].macs // len(shapes.calls[name]) if name in layers else 0
        kind = type(module.get_submodule(name)).__name__
        operation = Operation("call_module", name, kind, meta.shape, (), macs, 0.0)
        found.add_node(call, **{OPERATION: operation})
    nx.add_path(found, list(found))
    return found


def _of_layers(site: Site, choice: Candidate, target: Target | None) -> Iterator[Candidate]:
    """What becomes of each layer of a site."""
    if len(site.layers) == 1:
        yield choice
        return
    ones = ((layer,) for layer in site.layers)
    chains = ones if choice.is_dense else method_for(site, choice.method).chains(site, choice.rank)
    for layer, chain in zip(site.layers, chains, strict=True):
        first, *others = (layer_cost(part, target) for part in chain)
        yield replace(choice, site=layer.name, cost=sum(others, start=first))


def _without_identities(dependencies: nx.DiGraph, feeding: Mapping[str, LayerSpec | None]) -> nx.DiGraph:
    """The graph with recurrent layers as they are without the identity that they hold for input weights meanwhile."""
    changed = dependencies.copy()
    for node, operation in operations(dependencies).items():
        layer = feeding.get(operation.target)
        if layer is None or not operation.macs:
            continue
        (workload, *_) = layer.workloads
        macs = operation.macs - workload.positions * layer.out_channels**2
        latency_s = operation.latency_s * macs / operation.macs
        changed.nodes[node][OPERATION] = replace(operation, macs=macs, latency_s=latency_s)
    return changed


def _with_latencies(dependencies: nx.DiGraph, choices: dict[str, Candidate]) -> nx.DiGraph:
    """The graph with the latencies of the choices, spread over a layer's calls."""
    calls: dict[str, list[str]] = {}
    for node, operation in operations(dependencies).items():
        if operation.op == "call_module" and operation.target in choices:
            calls.setdefault(operation.target, []).append(node)
    changed = dependencies.copy()
    for name, nodes in calls.items():
        latency_s = choices[name].cost.latency_s
        if latency_s is None:
            continue
        for node in nodes:
            entry = changed.nodes[node]
            entry[OPERATION] = replace(entry[OPERATION], latency_s=latency_s / len(nodes))
    return changed
