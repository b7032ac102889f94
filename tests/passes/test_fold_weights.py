"""Weights computed from parameters alone become parameters; what may differ from run to run does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tdfx.passes.fold_weights import FoldWeights
from tdfx.passes.verify import relative_difference
from tdfx.stages.capture import capture
from tdfx.stages.compress import compress

X = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
Weight = Callable[["Computed"], Tensor]


class Computed(nn.Module):
    """A convolution whose weight is computed in forward. Input (batch, 16, 8, 8)."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.gain = nn.Parameter(torch.rand(16, 1, 1, 1) + 0.5)
        self.computed = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.computed(self), self.conv.bias, padding=1)


def standardized(model: Computed) -> Tensor:
    weight = model.conv.weight
    return (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 1e-5)


def batch_normalized(model: Computed) -> Tensor:
    weight = model.conv.weight.reshape(1, 16, -1)
    scale = (model.gain * 0.3).view(-1)
    return F.batch_norm(weight, None, None, weight=scale, training=True, momentum=0.0).reshape_as(model.conv.weight)


def read_twice(model: Computed) -> Tensor:
    return model.conv.weight * model.conv.weight.mean()


def of_two(model: Computed) -> Tensor:
    return model.conv.weight + model.conv.weight.flip(0)


def in_many_steps(model: Computed) -> Tensor:
    """Each reads the one before it twice, so that there are 2**40 ways from the parameter to the weight."""
    weight: Tensor = model.conv.weight
    for _ in range(40):
        weight = weight - weight.mean() / 2
    return weight


@pytest.mark.parametrize("weight", [standardized, batch_normalized, read_twice, of_two, in_many_steps])
def test_a_computed_weight_is_a_layer_s(weight: Weight) -> None:
    model = Computed(weight).eval()
    captured = capture(model, X)
    layer = captured.module.get_submodule("conv")
    assert isinstance(layer, nn.Conv2d)
    torch.testing.assert_close(layer.weight, weight(model), rtol=1e-6, atol=1e-7)
    assert [node.op for node in captured.module.graph.nodes] == ["placeholder", "call_module", "output"]


def test_the_model_keeps_its_weight_and_the_result_computes_what_it_did() -> None:
    model = Computed(standardized).eval()
    kept = model.conv.weight.detach().clone()
    result = compress(model, X, budget="flops=60%", methods="tucker2", rank_multiple=1, target=None, verify="full")
    assert torch.equal(model.conv.weight, kept)
    assert [candidate.site for candidate in result.plan.candidates if not candidate.is_dense] == ["conv"]
    dense = compress(model, X, budget="flops=100%", methods="tucker2")
    with torch.no_grad():
        assert relative_difference(model(X), dense.module(X))[1] < 1e-5


def test_a_result_that_trains_keeps_computing_its_weight() -> None:
    captured = capture(Computed(standardized).eval(), X, trainable=True)
    assert "conv.weight" in dict(captured.module.named_parameters())
    assert not [node for node in captured.module.graph.nodes if node.op == "call_module"]


def noisy(model: Computed) -> Tensor:
    return model.conv.weight + 0.1 * torch.rand_like(model.conv.weight)


def shifted(model: Computed) -> Tensor:
    return model.conv.weight * model.gain


class AlsoRead(Computed):
    """A parameter that the output depends on besides."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.conv.weight.mean()


def grown_in_place(model: Computed) -> Tensor:
    return model.conv.weight.detach().mul_(1.1)


class OfTwoLayers(Computed):
    """A weight made of two parameters of its shape."""

    def __init__(self) -> None:
        super().__init__(lambda model: model.conv.weight * model.other.weight)  # type: ignore[operator, union-attr]
        self.other = nn.Conv2d(16, 16, 3)


class OfTheRoot(Computed):
    """A weight made of a parameter that no layer holds."""

    def __init__(self) -> None:
        super().__init__(lambda model: model.own * 2)  # type: ignore[operator, return-value]
        self.own = nn.Parameter(torch.rand(16, 16, 3, 3))


class WithLayers(nn.Module):
    """Layers inside the one that holds the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.block = _Holder()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)  # type: ignore[no-any-return]


class _Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16, 16, 3, 3))
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.weight * 2))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "model",
    [Computed(noisy), AlsoRead(shifted), Computed(grown_in_place), OfTwoLayers(), OfTheRoot(), WithLayers()],
    ids=["random", "read elsewhere", "changed", "of two layers", "of the root", "with layers"],
)
def test_what_is_no_constant_or_read_elsewhere_stays(model: nn.Module) -> None:
    graph_module = fx.symbolic_trace(model.eval())
    folded = FoldWeights().run(graph_module)
    assert [node.name for node in folded.graph.nodes] == [node.name for node in graph_module.graph.nodes]


def test_what_is_read_a_second_time_stays() -> None:
    graph_module = fx.symbolic_trace(AlsoRead(standardized).eval())
    *_, last = (node for node in graph_module.graph.nodes if node.target == "conv.weight")
    with graph_module.graph.inserting_after(last):
        again = graph_module.graph.get_attr("conv.weight")
    (mean,) = (user for user in last.users if user.target == "mean" and user.args == (last,))
    mean.args = (again,)
    graph_module.recompile()
    wanted = graph_module(X)
    folded = FoldWeights().run(graph_module)
    assert [node.name for node in folded.graph.nodes] == [node.name for node in graph_module.graph.nodes]
    assert torch.equal(folded(X), wanted)
