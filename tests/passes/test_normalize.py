"""Folding BatchNorm and dropping what is inactive: nothing is computed differently, and what cannot be folded stays."""

# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tdfx.passes.base import describe, fork
from tdfx.passes.capture import isolate, symbolic_trace
from tdfx.passes.drop_inactive import DropInactive
from tdfx.passes.fold_batch_norm import RemainingBatchNorms
from tdfx.passes.shape_prop import ShapeProp
from tdfx.stages.capture import normalize

Shape = tuple[int, ...]


def prepared(model: nn.Module) -> nn.Module:
    """In float64 and eval mode, its BatchNorms with statistics and parameters as after training."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.weight, module.bias):
                if tensor is not None:
                    nn.init.normal_(tensor)
            if module.running_var is not None:
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.double().eval()


def normalized(model: nn.Module, x: Tensor) -> fx.GraphModule:
    """The normalized graph, which computes what the model does; neither model nor traced graph is edited."""
    traced = symbolic_trace(isolate(model)[0], (x,), {})
    before, state = describe(traced), copy.deepcopy(traced.state_dict())
    found = normalize(traced, (x,))
    assert describe(traced) == before
    torch.testing.assert_close(traced.state_dict(), state, rtol=0, atol=0)
    torch.testing.assert_close(found(x), model(x), rtol=1e-12, atol=1e-12)
    return found


def kinds(graph_module: fx.GraphModule) -> list[str]:
    """What the graph calls, in order, by the name of its class or function."""
    return [
        type(graph_module.get_submodule(str(node.target))).__name__ if node.op == "call_module" else node.name
        for node in graph_module.graph.nodes
        if node.op not in ("placeholder", "output")
    ]


class Then(nn.Module):
    """A layer, a BatchNorm and a function that calls them."""

    def __init__(
        self, layer: nn.Module, function: Callable[[Any, Tensor], Tensor], norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.norm = nn.BatchNorm2d(4) if norm is None else norm
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Dropping(nn.Module):
    """Functional dropout in eval mode, by position and by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.layer(x), 0.3, self.training)
        return F.alpha_dropout(input=self.norm(x), training=self.training)


class SubclassedConv(nn.Conv2d):
    """A stock forward in a class of the user's."""


class SubclassedNorm(nn.BatchNorm2d):
    """The same."""


def without_bias(norm: Any) -> nn.Module:
    norm.bias = None
    return norm


def shared_norm() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    return nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.ReLU(), nn.Conv2d(4, 4, 3), norm)


FOLDED: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3, dilation=2), nn.BatchNorm1d(4)), (2, 3, 8)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)), (2, 3, 7, 8)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4)), (2, 3, 4, 5, 6)),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6)), (2, 4, 5, 5)),
    "circular": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(4)),
        (2, 3, 5, 5),
    ),
    "transposed 1-d": (lambda: nn.Sequential(nn.ConvTranspose1d(3, 4, 3, 2), nn.BatchNorm1d(4)), (2, 3, 5)),
    "transposed 2-d": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2, 1, output_padding=1, bias=False), nn.BatchNorm2d(4)),
        (2, 3, 5, 5),
    ),
    "transposed 3-d": (lambda: nn.Sequential(nn.ConvTranspose3d(3, 4, 2), nn.BatchNorm3d(4)), (2, 3, 3, 4, 5)),
    "transposed in groups": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, (3, 2), groups=2), nn.BatchNorm2d(6)),
        (2, 4, 3, 5),
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), (2, 3)),
    "linear without bias": (lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)), (2, 3)),
    "not affine": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), (2, 3, 5, 5)),
    "norm without bias": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), without_bias(nn.BatchNorm2d(4))), (2, 3, 5, 5)),
    "eps": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.5)), (2, 3, 5, 5)),
    "eps of a linear layer": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, eps=0.5)), (2, 3)),
    "sync": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4)), (2, 3, 5, 5)),
    "subclasses": (lambda: nn.Sequential(SubclassedConv(3, 4, 3), SubclassedNorm(4)), (2, 3, 5, 5)),
    "two norms": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), (2, 3, 5, 5)),
    "shared norm": (shared_norm, (2, 3, 5, 5)),
    "identity": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.BatchNorm2d(4)), (2, 3, 5, 5)),
    "dropout": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout2d(), nn.BatchNorm2d(4)), (2, 3, 5, 5)),
    "functional dropout": (Dropping, (2, 3, 5, 5)),
    "at the ends": (
        lambda: nn.Sequential(nn.Identity(), nn.Dropout(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AlphaDropout()),
        (2, 3, 5, 5),
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_batch_norms_are_folded(name: str) -> None:
    factory, shape = FOLDED[name]
    model = prepared(factory())
    found = normalized(model, torch.randn(shape, dtype=torch.float64))
    assert not any("Norm" in kind or "dropout" in kind.lower() or kind == "Identity" for kind in kinds(found))
    layers = [node for node in found.graph.nodes if "batch_norm" in node.meta]
    assert len(layers) == sum(kind != "ReLU" for kind in kinds(found))


def test_the_affine_parameters_of_a_folded_batch_norm_are_kept() -> None:
    model = prepared(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False))
    )
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    traced = symbolic_trace(model, (x,), {})
    found = fork(normalize(traced, (x,)))
    first, second = (node.meta["batch_norm"] for node in found.graph.nodes if node.op == "call_module")
    norm: Any = traced.get_submodule("1")
    torch.testing.assert_close(first, {"weight": norm.weight.data, "bias": norm.bias.data}, rtol=0, atol=0)
    assert first["weight"].data_ptr() != norm.weight.data_ptr()
    assert second == {"weight": None, "bias": None}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_folding_keeps_the_dtype_and_rounds_once(dtype: torch.dtype) -> None:
    exact = prepared(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).to(dtype)
    x = torch.randn(2, 3, 5, 5, dtype=dtype)
    folded = normalize(symbolic_trace(isolate(exact)[0], (x,), {}), (x,)).get_submodule("0")
    wide = normalized(copy.deepcopy(exact).double(), x.double()).get_submodule("0")
    for name, value in folded.named_parameters():
        assert value.dtype == dtype
        torch.testing.assert_close(value, wide.get_parameter(name).to(dtype), rtol=0, atol=0)


def twice(net: Any, x: Tensor) -> Tensor:
    return net.norm(net.layer(x)) + net.layer(x)


def twice_with_norms(net: Any, x: Tensor) -> Tensor:
    return net.norm(net.layer(net.norm(net.layer(x))))


def residual(net: Any, x: Tensor) -> Tensor:
    y = net.layer(x)
    return y + net.norm(y)


def reading(net: Any, x: Tensor) -> Tensor:
    return net.norm(net.layer(x)) * net.layer.weight.sum()


def reading_bias(net: Any, x: Tensor) -> Tensor:
    return net.norm(net.layer(x)) + net.layer.bias[:, None, None]


def inside(net: Any, x: Tensor) -> Tensor:
    return net.norm(net.layer.out_proj(x)) + net.layer(x, x, x)[0]


def tied() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    model[2].weight = model[0].weight
    return model


def after(layer: nn.Module, channels: int = 4) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(layer, nn.BatchNorm2d(channels))


def conv() -> nn.Module:
    return nn.Conv2d(4, 4, 3, padding=1)


STAYING: dict[str, tuple[Callable[[], nn.Module], Shape, str]] = {
    "called twice": (lambda: Then(conv(), twice), (2, 4, 5, 5), "layer is called more than once"),
    "called and normalised twice": (lambda: Then(conv(), twice_with_norms), (2, 4, 5, 5), "called more than once"),
    "residual": (lambda: Then(conv(), residual), (2, 4, 5, 5), "the output of layer has other users"),
    "weight read": (lambda: Then(conv(), reading), (2, 4, 5, 5), "layer shares parameters with a function in forward"),
    "bias read": (lambda: Then(conv(), reading_bias), (2, 4, 5, 5), "layer shares parameters with a function"),
    "tied": (tied, (2, 4, 7, 7), "0 shares parameters with 2"),
    "inside a layer": (
        lambda: Then(nn.MultiheadAttention(4, 2), inside, nn.BatchNorm1d(4)),
        (5, 4),
        "layer.out_proj shares parameters with layer",
    ),
    "linear on 3-d": (
        lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(4)),
        (2, 4, 3),
        "normalises dimension 1 of the output of 0, which does not hold its channels",
    ),
    "unbatched": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)),
        (3, 4),
        "normalises dimension 1 of the output of 0, which does not hold its channels",
    ),
    "first": (lambda: nn.Sequential(nn.BatchNorm2d(4), conv()), (2, 4, 5, 5), "does not follow a convolution"),
    "after an activation": (after(nn.PReLU(4)), (2, 4, 5, 5), "it follows PReLU, not a convolution"),
    "after a function": (
        lambda: Then(conv(), lambda n, x: n.norm(F.relu(n.layer(x)))),
        (2, 4, 5, 5),
        "does not follow",
    ),
    "no statistics": (
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)),
        (2, 4, 5, 5),
        "it keeps no running statistics and normalises with those of the batch in eval mode too",
    ),
}


@pytest.mark.parametrize("name", STAYING)
def test_batch_norms_that_cannot_be_folded_stay_with_a_reason(name: str) -> None:
    factory, shape, reason = STAYING[name]
    x = torch.randn(shape, dtype=torch.float64)
    found = normalized(prepared(factory()), x)
    (skipped,) = RemainingBatchNorms(ShapeProp((x,)).run(found)).run(found)
    assert isinstance(found.get_submodule(skipped.layer), nn.modules.batchnorm._BatchNorm)
    assert skipped.reason.startswith("BatchNorm is not folded: ")
    assert reason in skipped.reason
    assert not any("batch_norm" in node.meta for node in found.graph.nodes)


@pytest.mark.parametrize(
    ("module", "dims"),
    [
        (nn.Identity(), 1),
        (nn.Dropout(), 1),
        (nn.Dropout(inplace=True), 1),
        (nn.Dropout1d(), 3),
        (nn.Dropout2d(), 4),
        (nn.Dropout3d(), 5),
        (nn.AlphaDropout(), 1),
        (nn.FeatureAlphaDropout(), 3),
    ],
)
def test_inactive_modules_are_dropped(module: nn.Module, dims: int) -> None:
    assert kinds(normalized(nn.Sequential(module).eval(), torch.randn(dims * (3,)))) == []


class Functional(nn.Module):
    def __init__(self, dropout: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self, x) + 1


@pytest.mark.parametrize(
    ("dropout", "left"),
    [
        (lambda net, x: F.dropout(x, training=net.training), []),
        (lambda net, x: F.dropout1d(x[0, 0], 0.5, False), ["getitem"]),
        (lambda net, x: F.dropout2d(x[0], training=net.training), ["getitem"]),
        (lambda net, x: F.dropout3d(input=x, training=net.training), []),
        (lambda net, x: F.feature_alpha_dropout(x), []),
        (lambda net, x: F.dropout(x, 0.0), ["dropout"]),
        (lambda net, x: F.dropout(x, 0.0, training=True), ["dropout"]),
    ],
)
def test_functional_dropout_is_dropped_where_it_is_inactive(
    dropout: Callable[[Any, Tensor], Tensor], left: list[str]
) -> None:
    found = normalized(Functional(dropout).eval(), torch.randn(2, 3, 4, 4, 4, dtype=torch.float64))
    assert kinds(found) == [*left, "add"]


def test_functional_dropout_is_active_unless_a_graph_says_otherwise() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(F.dropout, (x,)), graph.call_function(F.alpha_dropout, (x,))))
    assert kinds(DropInactive().run(fx.GraphModule(nn.Module(), graph))) == ["dropout"]


def test_a_batch_norm_with_a_forward_of_its_own_is_not_folded() -> None:
    class Halving(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    graph = fx.Graph()
    graph.output(graph.call_module("1", (graph.call_module("0", (graph.placeholder("x"),)),)))
    module, x = fx.GraphModule(nn.Sequential(conv(), Halving(4)).eval(), graph), torch.randn(2, 4, 5, 5)
    assert kinds(normalize(module, (x,))) == ["Conv2d", "Halving"]


def test_an_identity_of_several_values_stays() -> None:
    class Tupled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.identity = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.identity((x, 2 * x))[1] + self.identity((3 * x,))[0]

    assert kinds(normalized(Tupled(), torch.randn(2))).count("Identity") == 2


def test_an_identity_called_by_keyword_is_dropped() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.identity = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.identity(input=x)

    assert kinds(normalized(Named(), torch.randn(2))) == []


def test_dropping_leaves_the_input_graph_alone() -> None:
    traced = symbolic_trace(nn.Sequential(nn.Dropout(), nn.ReLU()).eval(), (torch.randn(2),), {})
    assert kinds(DropInactive().run(traced)) == ["ReLU"]
    assert kinds(traced) == ["Dropout", "ReLU"]
