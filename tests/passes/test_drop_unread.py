"""What nobody reads goes, unless it does something."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tdfx.passes.drop_unread import DropUnread

aten = torch.ops.aten
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def traced(function: Callable[[nn.Module, fx.Graph, fx.Node], Any]) -> fx.GraphModule:
    """A graph of x times 1, and of a function of it that is read by nobody."""
    root = nn.Module()
    root.weight = nn.Parameter(torch.ones(3, 4))
    root.layer = nn.Linear(4, 4)
    graph = fx.Graph()
    y = graph.call_function(torch.mul, (graph.placeholder("x"), 1))
    function(root, graph, y)
    graph.output(y)
    return fx.GraphModule(root, graph)


def left(graph_module: fx.GraphModule) -> list[str]:
    return [node.name for node in graph_module.graph.nodes if node.op not in ("placeholder", "output")]


PURE: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "operator": (aten.relu.default, ()),
    "attention weights": (aten.softmax.int, (-1,)),
    "function of torch": (torch.exp, ()),
    "functional": (F.gelu, ()),
    "arithmetic": (operator.add, (2,)),
    "item": (operator.getitem, (0,)),
    "attribute": (getattr, ("shape",)),
}


@pytest.mark.parametrize("name", PURE)
def test_values_that_nobody_reads_go(name: str) -> None:
    function, rest = PURE[name]
    model = traced(lambda root, graph, y: graph.call_function(function, (y, *rest)))
    found = DropUnread().run(model)
    assert left(found) == ["mul"]
    assert len(left(model)) == 2
    torch.testing.assert_close(found(X), X, rtol=0, atol=0)


def test_chains_methods_and_reads_of_parameters_go() -> None:
    def chain(root: nn.Module, graph: fx.Graph, y: fx.Node) -> None:
        weight = graph.get_attr("weight")
        graph.call_method("sum", (graph.call_function(math.floor, (graph.call_function(torch.add, (y, weight)),)),))

    found = DropUnread().run(traced(chain))
    assert left(found) == ["mul"]


EFFECTS: dict[str, tuple[Callable[[fx.Graph, fx.Node], Any], Callable[[Tensor], Tensor]]] = {
    "operator in place": (lambda graph, y: graph.call_function(aten.relu_.default, (y,)), torch.relu),
    "operator with out": (lambda graph, y: graph.call_function(aten.exp.out, (y,), {"out": y}), torch.exp),
    "function in place": (lambda graph, y: graph.call_function(torch.relu_, (y,)), torch.relu),
    "function with out": (lambda graph, y: graph.call_function(torch.exp, (y,), {"out": y}), torch.exp),
    "method in place": (lambda graph, y: graph.call_method("mul_", (y, 3)), lambda x: 3 * x),
    "setitem": (lambda graph, y: graph.call_function(operator.setitem, (y, 0, 5.0)), lambda x: first_row(x, 5.0)),
    "arithmetic in place": (lambda graph, y: graph.call_function(operator.isub, (y, 2)), lambda x: x - 2),
    "inplace by keyword": (lambda graph, y: graph.call_function(F.relu, (y,), {"inplace": True}), torch.relu),
    "inplace by position": (lambda graph, y: graph.call_function(F.relu, (y, True)), torch.relu),
    "view": (
        lambda graph, y: graph.call_function(aten.mul_.Tensor, (graph.call_function(aten.select.int, (y, 0, 0)), 0)),
        lambda x: first_row(x, 0.0),
    ),
}


def first_row(x: Tensor, value: float) -> Tensor:
    return torch.cat([torch.full_like(x[:1], value), x[1:]])


@pytest.mark.parametrize("name", EFFECTS)
def test_effects_on_other_values_stay(name: str) -> None:
    write, expected = EFFECTS[name]
    found = DropUnread().run(traced(lambda root, graph, y: write(graph, y)))
    torch.testing.assert_close(found(X), expected(X), rtol=0, atol=0)
    assert len(left(found)) >= 2


def note(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize("function", [note, print, torch._assert])
def test_functions_that_are_not_known_to_be_pure_stay(function: Callable[..., Any]) -> None:
    found = DropUnread().run(
        traced(lambda root, graph, y: graph.call_function(function, (y, "message")[: 1 + (function is torch._assert)]))
    )
    assert len(left(found)) == 2


def test_calls_of_modules_and_inputs_stay() -> None:
    def call(root: nn.Module, graph: fx.Graph, y: fx.Node) -> None:
        graph.call_module("layer", (y,))

    found = DropUnread().run(traced(call))
    assert left(found) == ["mul", "layer"]
    assert len(found.graph.find_nodes(op="placeholder")) == 1
