"""What the nodes of a network's graph need of each other, and what follows from that alone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import networkx as nx

from tdfx.records.layer import Shape

OPERATION = "operation"
"""Key of a node's ``Operation``."""


@dataclass(frozen=True)
class Storage:
    """Memory that one value lies in, or several.

    Attributes:
        number: counts the storages of a run.
        nbytes: its bytes.
    """

    number: int
    nbytes: int


@dataclass(frozen=True)
class Operation:
    """What is known of one node.

    Attributes:
        op: torch.fx's kind of node, e.g. "call_module".
        target: qualified name of the module or parameter, or name of the function, method or argument.
        kind: class of the module or name of the function, e.g. "Conv2d" or "add"; torch.fx's kind for all else.
        shape: of its value; None unless that is a tensor.
        storages: that its value lies in; those of parameters and buffers are left out.
        macs: multiply-accumulates of its convolutions and matrix products.
        latency_s: estimated seconds of these; 0 without a target.
    """

    op: str
    target: str
    kind: str
    shape: Shape | None
    storages: tuple[Storage, ...]
    macs: int
    latency_s: float


@dataclass(frozen=True)
class CriticalPath:
    """The nodes that a run takes at least as long as, however many others run beside them.

    Attributes:
        nodes: in order, those between that have no estimate among them.
        latency_s: seconds of these.
        total_s: seconds of all nodes, one after another.
    """

    nodes: tuple[str, ...]
    latency_s: float
    total_s: float


def operations(graph: nx.DiGraph) -> dict[str, Operation]:
    """By node name, in the order of execution."""
    return dict(graph.nodes(data=OPERATION))


def peak_activation_bytes(graph: nx.DiGraph) -> int:
    """Most bytes of activations that are alive at once when the nodes run one by one in their order.

    A storage lives from the node whose value first lies in it until the last user of any value in it has run; so a
    value that is computed in place, or a view, keeps the storage of its input alive and takes nothing itself. The
    network's inputs and outputs count; parameters, buffers and what an operator needs while it runs do not.

    Args:
        graph: as ``Dependencies`` returns it.
    """
    step = {node: index for index, node in enumerate(graph)}
    first: dict[Storage, int] = {}
    last: dict[Storage, int] = {}
    for node, operation in operations(graph).items():
        end = max((step[user] for user in graph.successors(node)), default=step[node])
        for storage in operation.storages:
            first.setdefault(storage, step[node])
            last[storage] = max(end, last.get(storage, 0))
    change = [0] * (len(step) + 1)
    for storage, start in first.items():
        change[start] += storage.nbytes
        change[last[storage] + 1] -= storage.nbytes
    return max(accumulate(change))


def critical_path(graph: nx.DiGraph) -> CriticalPath:
    """The path of dependencies that takes longest: what is left of the latency if branches run in parallel.

    Args:
        graph: as ``Dependencies`` returns it, with a target.
    """
    seconds = {node: operation.latency_s for node, operation in operations(graph).items()}
    # Weights lie on edges; what takes time has an input, hence an edge that ends there.
    weighted = nx.DiGraph()
    weighted.add_nodes_from(graph)
    weighted.add_weighted_edges_from((source, user, seconds[user]) for source, user in graph.edges)
    path = tuple(nx.dag_longest_path(weighted))
    return CriticalPath(path, sum(seconds[node] for node in path), sum(seconds.values()))
