"""What a graph asks about parameters is answered without them, also after the network was moved."""

# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tdfx.passes.capture import isolate, symbolic_trace
from tdfx.passes.describe_parameters import DescribeParameters
from tdfx.passes.export_trace import export_trace
from tdfx.stages.compress import compress

X = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))


class Asking(nn.Module):
    """A linear layer, and a function of it that only asks what its weight is."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function, self.fc = function, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.fc.weight, self.fc(x))


FIXED: dict[str, Callable[..., Tensor]] = {
    "an entry of the shape": lambda weight, y: y * weight.shape[0] ** -0.5,
    "size": lambda weight, y: y.reshape(-1, weight.size(1)) / weight.size(-1),
    "shape as a whole": lambda weight, y: y[:, 0].sum(0).expand(weight.shape),
    "a method of the shape": lambda weight, y: y / weight.shape.numel(),
    "dimensions": lambda weight, y: y * (weight.dim() + weight.ndim),
    "a shape in a list": lambda weight, y: y.new_ones([2, weight.shape[1]]) * y[0, 0],
}
MOVING: dict[str, Callable[..., Tensor]] = {
    "dtype": lambda weight, y: y.to(weight.dtype),
    "device": lambda weight, y: y + torch.arange(8, device=weight.device),
    "to": lambda weight, y: y.sum().to(weight) + y,
    "type_as": lambda weight, y: (y > 0).type_as(weight) + y,
    "new_zeros": lambda weight, y: weight.new_zeros(8) + y,
    "both": lambda weight, y: weight.new_full((8,), 2.0) * y / weight.shape[1],
}


def reads_weight(module: torch.fx.GraphModule) -> bool:
    return bool([node for node in module.graph.nodes if node.op == "get_attr" and node.target == "fc.weight"])


@pytest.mark.parametrize("name", [*FIXED, *MOVING])
def test_a_weight_that_is_only_asked_what_it_is_is_not_read(name: str) -> None:
    model = isolate(Asking({**FIXED, **MOVING}[name]))[0]
    traced = symbolic_trace(model, (X,), {})
    described = DescribeParameters().run(traced)
    assert reads_weight(traced) and not reads_weight(described)
    torch.testing.assert_close(described(X), model(X), rtol=0, atol=0)
    assert described.state_dict().keys() <= model.state_dict().keys()
    assert {n for n, _ in described.named_buffers()} == ({"fc_weight_kind"} if name in MOVING else set())
    for moved, x in (
        (copy.deepcopy(described).double(), X.double()),
        (copy.deepcopy(described).to("meta"), X.to("meta")),
    ):
        expected = copy.deepcopy(model).to(x)(x)
        assert (moved(x).dtype, moved(x).device) == (expected.dtype, expected.device)


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
@pytest.mark.parametrize(
    "function",
    [
        lambda weight, y: y @ weight,
        lambda weight, y: y + weight.to(y.dtype).sum(),
        lambda weight, y: y * weight.shape[0] + weight.sum(0),
        lambda weight, y: y + torch.zeros_like(weight).sum(0),
        lambda weight, y: y + weight.new_tensor(weight).sum(0),
    ],
)
def test_a_weight_that_is_computed_with_is_read(function: Callable[..., Tensor]) -> None:
    model = isolate(Asking(function))[0]
    described = DescribeParameters().run(symbolic_trace(model, (X,), {}))
    assert reads_weight(described)
    torch.testing.assert_close(described(X), model(X), rtol=0, atol=0)


def test_names_of_others_are_kept() -> None:
    class Named(Asking):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.fc_weight_kind

    model = isolate(Named(MOVING["new_zeros"]))[0]
    model.register_buffer("fc_weight_kind", torch.ones(8))
    described = DescribeParameters().run(symbolic_trace(model, (X,), {}))
    assert "fc_weight_kind_" in dict(described.named_buffers())
    torch.testing.assert_close(described(X), model(X), rtol=0, atol=0)


def test_operators_of_exported_graphs_ask_too() -> None:
    model = isolate(Asking(lambda weight, y: weight.new_zeros(8) + y))[0]
    exported, _ = export_trace(model, (X,), {})
    reads = [node.target for node in DescribeParameters().run(exported).graph.nodes if node.op == "get_attr"]
    assert reads.count("fc.weight") == 1  # by the layer's own operator
    assert "fc_weight_kind" in reads


@pytest.mark.parametrize("tier", ["fx", "inplace"])
@pytest.mark.parametrize("name", [*FIXED, *MOVING])
def test_the_layer_is_compressed(name: str, tier: str) -> None:
    model = Asking({**FIXED, **MOVING}[name]).eval()
    result = compress(model, X, budget="params=80%", methods=["svd"], rank_multiple=1, capture=tier, target=None)
    assert [candidate.site for candidate in result.plan.candidates if candidate.method == "svd"] == ["fc"]
