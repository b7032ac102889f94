"""What nodes need of each other: memory against a run that frees values, the longest path against all paths."""

# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import build
from strategies import reproducible
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from tdfx.passes.capture import isolate, symbolic_trace
from tdfx.passes.count import network_cost
from tdfx.passes.dependencies import Dependencies
from tdfx.records.dependencies import OPERATION, Operation, critical_path, operations, peak_activation_bytes
from tdfx.targets import ORT_CPU

KB = 4 * 250  # a row of X


class Freeing(fx.Interpreter):
    """Counts down the users of every value, and after each node adds up the memory of those that have users left."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)  # so that no address is used twice
        self.left = {node: len(node.users) for node in graph_module.graph.nodes}
        self.alive: dict[fx.Node, Any] = {}
        self.peak = 0
        self.weights = {value.data_ptr() for value in (*graph_module.parameters(), *graph_module.buffers())}

    def run_node(self, n: fx.Node) -> Any:
        self.alive[n] = super().run_node(n)
        storages = [t.untyped_storage() for t in pytree.tree_leaves(self.alive) if isinstance(t, Tensor)]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self.peak = max(self.peak, sum(size for address, size in sizes.items() if address not in self.weights))
        result = self.alive[n]
        for source in n.all_input_nodes:
            self.left[source] -= 1
        for node in [node for node in self.alive if self.left[node] == 0]:
            del self.alive[node]
        return result


def traced(model: nn.Module, *args: Tensor) -> fx.GraphModule:
    return symbolic_trace(isolate(model)[0], args, {})


def measured(module: fx.GraphModule, *args: Tensor) -> int:
    reference = Freeing(module)
    with torch.no_grad():
        reference.run(*(value.clone() for value in args))
    return reference.peak


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "unet", "densenet", "siamese", "functional", "recurrent"])
def test_the_peak_is_what_a_run_that_frees_values_holds(name: str) -> None:
    model, args = build(name)
    module = traced(model, *args)
    found = peak_activation_bytes(Dependencies(args).run(module))
    assert found == measured(module, *args)


class Calling(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(2, 250))
        self.register_buffer("table", torch.randn(2, 250))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def writing(net: Any, x: Tensor) -> Tensor:
    y = x * 2
    y.mul_(3)
    y += x
    return net.relu(y)


def split(net: Any, x: Tensor) -> Tensor:
    left, right = (x * 2).chunk(2, 1)
    return (left.exp() + right.exp()).sum()


def kept(net: Any, x: Tensor) -> Tensor:
    small = (x + 1)[:, :1]
    return x.exp().exp().sum() + small.sum()


FUNCTIONS: dict[str, tuple[Callable[[Any, Tensor], Any], int]] = {
    "one out of place": (lambda net, x: x.relu(), 4 * KB),
    "a chain": (lambda net, x: x.relu().exp().relu().exp(), 4 * KB),
    "in place": (lambda net, x: net.relu(x), 2 * KB),
    "writes": (writing, 4 * KB),
    "views": (lambda net, x: x.view(-1).reshape(5, 100).flatten().unsqueeze(0).transpose(0, 1), 2 * KB),
    "a reshape that copies": (lambda net, x: x.t().reshape(-1), 4 * KB),
    "expanded": (lambda net, x: x.unsqueeze(0).expand(8, -1, -1), 2 * KB),
    "both results": (lambda net, x: (x.exp(), {"log": x.log1p()}), 6 * KB),
    "parts of one": (split, 2 * KB + 2 * KB),
    "a part keeps the whole": (kept, 6 * KB),
    "weights and buffers": (lambda net, x: net.weight.t() @ net.table, 250 * KB),
    "views of weights": (lambda net, x: (x.sum(), net.weight.view(-1)), 2 * KB + 4),
    "the input is read late": (lambda net, x: x.exp().exp() + x, 6 * KB),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_shares_memory_counts_once(name: str) -> None:
    function, expected = FUNCTIONS[name]
    x = torch.rand(2, 250)
    module = traced(Calling(function), x)
    found = peak_activation_bytes(Dependencies((x,)).run(module))
    assert found == measured(module, x)
    # The last small numbers: scalars.
    assert expected <= found <= expected + 16


def test_an_unused_value_is_freed_at_once() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_method("exp", (x,))
    graph.output(graph.call_method("sin", (graph.call_method("cos", (x,)),)))
    module, value = fx.GraphModule(nn.Module(), graph), torch.rand(2, 250)
    assert peak_activation_bytes(Dependencies((value,)).run(module)) == 4 * KB == measured(module, value)


def test_operations_say_what_a_node_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten())
    x = torch.randn(2, 3, 6, 6)
    module = traced(nn.Sequential(model, Calling(lambda net, x: torch.add(x, 1).relu())), x)
    found = Dependencies((x,)).run(module)
    about = [(entry.op, entry.target, entry.kind, entry.shape) for entry in operations(found).values()]
    assert about == [
        ("placeholder", "input", "placeholder", (2, 3, 6, 6)),
        ("call_module", "0.0", "Conv2d", (2, 4, 4, 4)),
        ("call_module", "0.1", "Flatten", (2, 64)),
        ("call_function", "add", "add", (2, 64)),
        ("call_method", "relu", "relu", (2, 64)),
        ("output", "output", "output", (2, 64)),
    ]
    assert list(found) == [node.name for node in module.graph.nodes]
    assert list(found.edges) == list(pairwise(found))


@pytest.mark.parametrize("name", ["resnet", "siamese", "recurrent"])
def test_costs_add_up_to_the_networks(name: str) -> None:
    model, args = build(name)
    module = traced(model, *args)
    entries = operations(Dependencies(args, ORT_CPU).run(module)).values()
    cost = network_cost(module, args, {}, ORT_CPU)
    assert sum(entry.macs for entry in entries) == cost.macs
    assert sum(entry.latency_s for entry in entries) == pytest.approx(cost.latency_s, rel=1e-12)
    assert all(entry.latency_s == 0.0 for entry in operations(Dependencies(args).run(module)).values())


def with_seconds(edges: list[tuple[int, int]], seconds: list[int]) -> nx.DiGraph:
    """Nodes 0 and on, the first with no input and no time."""
    graph = nx.DiGraph()
    for node, latency_s in enumerate(seconds):
        operation = Operation("call_function", "f", "f", None, (), 0, float(latency_s))
        graph.add_node(str(node), **{OPERATION: operation})
    graph.add_edges_from((str(source), str(user)) for source, user in edges)
    return graph


@st.composite
def dependencies(draw: st.DrawFn) -> nx.DiGraph:
    """Every node but the first needs an earlier one, or several."""
    count = draw(st.integers(1, 9))
    sources = {node: draw(st.sets(st.integers(0, node - 1), min_size=1)) for node in range(1, count)}
    edges = [(source, node) for node in sources for source in sorted(sources[node])]
    return with_seconds(edges, [0, *(draw(st.integers(0, 5)) for _ in range(count - 1))])


@reproducible(100)
@given(dependencies())
def test_the_critical_path_is_the_longest_of_all(graph: nx.DiGraph) -> None:
    seconds = {node: entry.latency_s for node, entry in operations(graph).items()}

    def longest(node: str) -> float:
        return seconds[node] + max((longest(user) for user in graph.successors(node)), default=0.0)

    found = critical_path(graph)
    assert found.latency_s == longest("0") == sum(seconds[node] for node in found.nodes)
    assert found.total_s == sum(seconds.values())
    assert all(edge in graph.edges for edge in pairwise(found.nodes))


def test_of_two_branches_the_slower_one_counts() -> None:
    graph = with_seconds([(0, 1), (1, 2), (0, 3), (2, 4), (3, 4)], [0, 1, 1, 5, 1])
    found = critical_path(graph)
    assert (found.nodes, found.latency_s, found.total_s) == (("0", "3", "4"), 6.0, 8.0)
