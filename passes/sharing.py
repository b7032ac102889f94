"""Which layers hold or read the same parameters: a change of one would be a change of the others."""

from __future__ import annotations

from collections.abc import Collection

import networkx as nx
from torch import fx

from tdfx.passes.capture import has_stock_forward
from tdfx.passes.in_place import InPlace

GRAPH = "a function in forward"


def sharing_graph(graph_module: fx.GraphModule) -> nx.Graph:
    """Bipartite graph of readers (module names, or ``GRAPH`` for a direct read) and parameters (by identity)."""
    sharing = nx.Graph()
    parameters = dict(graph_module.named_parameters(remove_duplicate=False))
    for name, module in graph_module.named_modules():
        reader = GRAPH if isinstance(module, InPlace) else name  # whose forward may read what it holds itself
        sharing.add_edges_from((reader, id(parameter)) for parameter in module.parameters(recurse=False))
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node.target in parameters:
            sharing.add_edge(GRAPH, id(parameters[node.target]))
        elif node.op == "call_module":
            module = graph_module.get_submodule(node.target)
            # Others than torch's layers may read what modules inside them hold.
            for parameter in module.parameters(recurse=not has_stock_forward(module)):
                sharing.add_edge(node.target, id(parameter))
    return sharing


def sharers(graph_module: fx.GraphModule, layer: str) -> tuple[str, ...]:
    """Names of the other readers of a layer's own parameters, sorted."""
    sharing = sharing_graph(graph_module)
    if layer not in sharing:
        return ()
    readers = {reader for parameter in sharing[layer] for reader in sharing[parameter]}
    return tuple(sorted(readers - {layer, ""}))  # the root's own parameters are read by GRAPH


def sharing_groups(graph_module: fx.GraphModule, called: Collection[str] | None = None) -> tuple[tuple[str, ...], ...]:
    """Layers that are called and share parameters, directly or through others; ``GRAPH`` with those that it reads.

    Groups and their layers are sorted.

    Args:
        graph_module: the graph.
        called: names of the layers that are called; None for those of the graph's nodes.
    """
    sharing = sharing_graph(graph_module)
    nodes = (node.target for node in graph_module.graph.nodes if node.op == "call_module")
    called = set(nodes if called is None else called)
    read = set(sharing[GRAPH]) if GRAPH in sharing else set()
    # What functions read has nothing in common but that, so that GRAPH joins no groups.
    between = sharing.subgraph(node for node in sharing if node in called or not isinstance(node, str))
    groups = []
    for component in nx.connected_components(between):
        layers = component & called
        groups.append(sorted(layers | {GRAPH} if layers and component & read else layers))
    return tuple(sorted(tuple(group) for group in groups if len(group) > 1))
