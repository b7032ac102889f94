"""The driver's guards: a pass that breaks its contract is caught, and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import pytest
import torch
from torch import fx, nn

from tdfx.errors import PassError, WeightError
from tdfx.passes.base import AnalysisPass, RewritePass, assemble, check, describe, fork, layer_at, set_submodule


class Net(nn.Module):
    """Two layers in a container, a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 2)
        self.register_buffer("scale", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.body(x)) * self.scale
        return y


@pytest.fixture
def graph_module() -> fx.GraphModule:
    net = Net().eval()
    return assemble(net, fx.Tracer().trace(net))


Edit = Callable[[fx.GraphModule], object]


@dataclass(frozen=True)
class Analyse(AnalysisPass[object]):
    edit: Edit

    def apply(self, graph_module: fx.GraphModule) -> object:
        return self.edit(graph_module)


@dataclass(frozen=True)
class Rewrite(RewritePass):
    edit: Edit

    def rewrite(self, graph_module: fx.GraphModule) -> None:
        self.edit(graph_module)


def node_of(graph_module: fx.GraphModule, target: str) -> fx.Node:
    (node,) = (node for node in graph_module.graph.nodes if node.target == target)
    return cast(fx.Node, node)


def erase_relu(graph_module: fx.GraphModule) -> None:
    relu = node_of(graph_module, "body.1")
    relu.replace_all_uses_with(relu.all_input_nodes[0])
    graph_module.graph.erase_node(relu)


def exchange_module(graph_module: fx.GraphModule) -> None:
    set_submodule(graph_module, "body.0", nn.Linear(3, 3))


def exchange_parameter(graph_module: fx.GraphModule) -> None:
    layer_at(graph_module, "head").weight = nn.Parameter(torch.zeros(2, 3))


def exchange_buffer(graph_module: fx.GraphModule) -> None:
    graph_module.get_submodule("body.2").running_mean = torch.ones(3)


@pytest.mark.parametrize("edit", [erase_relu, exchange_module, exchange_parameter, exchange_buffer])
def test_a_pass_that_edits_its_input_is_caught(graph_module: fx.GraphModule, edit: Edit) -> None:
    with pytest.raises(PassError, match="Analyse edited the graph it was given"):
        Analyse(edit).run(graph_module)


def test_an_analysis_pass_returns_its_result(graph_module: fx.GraphModule) -> None:
    assert Analyse(lambda graph: len(graph.graph.nodes)).run(graph_module) == 8
    assert Analyse(lambda graph: None).name == "Analyse"


def call_nowhere(graph_module: fx.GraphModule) -> None:
    head = node_of(graph_module, "head")
    head.target = "no.where"


def call_a_parameter(graph_module: fx.GraphModule) -> None:
    node_of(graph_module, "head").target = "head.weight"


def read_nowhere(graph_module: fx.GraphModule) -> None:
    node_of(graph_module, "scale").target = "nowhere"


def read_too_early(graph_module: fx.GraphModule) -> None:
    node_of(graph_module, "head").append(node_of(graph_module, "body.2"))


@pytest.mark.parametrize(
    ("edit", "node"),
    [(call_nowhere, "head"), (call_a_parameter, "head"), (read_nowhere, "scale"), (read_too_early, "body_2")],
)
def test_an_invalid_graph_is_caught_after_and_before_a_pass(
    graph_module: fx.GraphModule, edit: Edit, node: str
) -> None:
    with pytest.raises(PassError, match=f"after Rewrite: .*{node}"):
        Rewrite(edit).run(graph_module)
    check(graph_module, "untouched")
    edit(graph_module)
    with pytest.raises(PassError, match=f"before Analyse: .*{node}"):
        Analyse(lambda graph: None).run(graph_module)


def test_errors_name_the_pass(graph_module: fx.GraphModule) -> None:
    def fail(graph_module: fx.GraphModule) -> None:
        raise KeyError("x_1")

    with pytest.raises(PassError, match="pass Rewrite failed: KeyError: 'x_1'") as caught:
        Rewrite(fail).run(graph_module)
    assert isinstance(caught.value.__cause__, KeyError)


def test_errors_raised_on_purpose_stay_as_they_are(graph_module: fx.GraphModule) -> None:
    error = WeightError("layer head: ...")

    def fail(graph_module: fx.GraphModule) -> None:
        raise error

    with pytest.raises(WeightError) as caught:
        Analyse(fail).run(graph_module)
    assert caught.value is error


def test_a_rewrite_leaves_its_input_alone_and_is_compiled(graph_module: fx.GraphModule) -> None:
    x = torch.randn(4, 3)
    before, expected = describe(graph_module), graph_module(x)
    rewritten = Rewrite(erase_relu).run(graph_module)
    assert describe(graph_module) == before
    torch.testing.assert_close(graph_module(x), expected, rtol=0, atol=0)
    body = graph_module.get_submodule("body")
    linear, norm = body.get_submodule("0"), body.get_submodule("2")
    torch.testing.assert_close(rewritten(x), graph_module.head(norm(linear(x))), rtol=0, atol=0)  # type: ignore[operator]
    assert rewritten.get_submodule("body.0") is linear
    assert [name for name, _ in rewritten.named_modules()] == ["", "body", "body.0", "body.2", "head"]


def test_a_fork_has_the_modes_and_the_state_dict_of_its_source(graph_module: fx.GraphModule) -> None:
    assert not any(module.training for module in graph_module.modules())
    assert list(graph_module.state_dict()) == list(Net().state_dict())
    graph_module.get_submodule("body").training = True
    forked = fork(graph_module)
    modes = {name: module.training for name, module in forked.named_modules()}
    assert modes == {name: module.training for name, module in graph_module.named_modules()}
    assert [name for name, training in modes.items() if training] == ["body"]
