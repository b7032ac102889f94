"""Which layers share parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tdfx.passes.capture import isolate, symbolic_trace
from tdfx.passes.lift_layers import LiftLayers
from tdfx.passes.sharing import GRAPH, sharers, sharing_groups


class Sharing(nn.Module):
    """Weights shared by two, a bias that joins a third one, a pair of its own, and two that functions read."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.zeros(4))
        for name in ("a", "b", "c", "d", "e", "f", "g"):
            setattr(self, name, nn.Linear(4, 4))
        self.b.weight = self.a.weight
        self.c.bias = self.b.bias
        self.e.weight = self.d.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.b(self.a(x))) + self.e(self.d(x))
        return self.g(self.f(x)) * self.f.bias + self.g.bias + self.own


def test_groups_are_joined_by_what_they_share() -> None:
    model = Sharing().eval()
    groups = sharing_groups(symbolic_trace(isolate(model)[0], (torch.randn(2, 4),), {}))
    assert groups == (("a", "b", "c"), (GRAPH, "f"), (GRAPH, "g"), ("d", "e"))


class LowRankUpdate(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.down, self.up = nn.Linear(4, 1, bias=False), nn.Linear(1, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias) + self.up(self.down(x))


def test_layers_inside_a_layer_of_torch_are_no_sharers() -> None:
    model, x = nn.Sequential(LowRankUpdate()).eval(), torch.randn(2, 4)
    lifted = LiftLayers(model).run(symbolic_trace(isolate(model)[0], (x,), {}))
    assert sharing_groups(lifted) == ()
    assert len({node.target for node in lifted.graph.nodes if node.op == "call_module"}) == 3


def test_a_module_without_parameters_shares_none() -> None:
    traced = symbolic_trace(isolate(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))[0], (torch.randn(2, 4),), {})
    assert sharers(traced, "1") == ()


def test_nothing_shared_is_no_group() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)  # called whole: its parts are no readers
            self.scales = nn.ParameterDict({"one": nn.Parameter(torch.ones(4)), "two": nn.Parameter(torch.ones(4))})

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.attention(x * self.scales["one"], x, x)[0] * self.scales["two"]
            return found

    assert sharing_groups(symbolic_trace(isolate(Alone())[0], (torch.randn(2, 4),), {})) == ()
