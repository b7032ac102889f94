"""Isolation from the caller's model, what tracing takes, what it refuses and how it says so."""

# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, build
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, prune

from tdfx.errors import CaptureError
from tdfx.passes.capture import has_stock_forward, isolate, symbolic_trace

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Conv(nn.Module):
    """A convolution called ``conv``, for networks that differ in their forward alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)


def trace(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> fx.GraphModule:
    return symbolic_trace(isolate(model)[0], args, kwargs)


def targets(graph_module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"]


def same(found: Any, expected: Any, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# Isolation


def old_weight_norm(layer: nn.Module) -> nn.Module:
    return torch.nn.utils.weight_norm(layer)


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", amount=0.5)  # type: ignore[no-untyped-call]


def pruned_twice(layer: nn.Module) -> nn.Module:
    return pruned(pruned(layer))


REPARAMETRIZATIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": old_weight_norm,
    "old spectral_norm": torch.nn.utils.spectral_norm,
    "pruned": pruned,
    "pruned twice": pruned_twice,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", REPARAMETRIZATIONS)
def test_reparametrizations_are_removed_from_the_copy_alone(name: str, trained: bool) -> None:
    model = nn.Sequential(REPARAMETRIZATIONS[name](nn.Conv2d(3, 4, 3)), nn.ReLU())
    if trained:
        model(X).sum().backward()
    model.eval()
    expected, state = model(X), copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    hooks = dict(model[0]._forward_pre_hooks)

    copied, notes = isolate(model)
    same(copied(X), expected, 1e-6)
    assert notes == ()
    assert type(copied[0]) is nn.Conv2d  # type: ignore[index]
    assert sorted(copied.state_dict()) == ["0.bias", "0.weight"]
    assert isinstance(copied[0].weight, nn.Parameter)  # type: ignore[index]
    copied.load_state_dict(dict(copied.state_dict()))

    assert [type(module) for module in model.modules()] == classes
    assert dict(model[0]._forward_pre_hooks) == hooks
    same(model.state_dict(), state)
    same(model(X), expected)
    model.train()(X).sum().backward()


HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("name", ["", "0"])
def test_hooks_stay_on_the_model_and_do_not_fire(register: str, name: str) -> None:
    model, fired = nn.Sequential(nn.Linear(3, 3)), []
    getattr(model.get_submodule(name), register)(lambda *args: fired.append(args))
    copied, notes = isolate(model)
    copied(torch.randn(2, 3)).sum().backward()
    assert notes == (f"hooks of {name or 'the model'} are not part of the result",)
    assert fired == []
    model(torch.randn(2, 3, requires_grad=True)).sum().backward()
    assert len(fired) == 1


def test_hooks_that_change_the_output_or_take_keywords_are_removed() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model.register_forward_hook(lambda module, args, kwargs, output: 2 * output, with_kwargs=True, always_call=True)
    x = torch.randn(2, 3)
    same(isolate(model)[0](x), model[0](x))
    same(model(x), 2 * model[0](x))


def test_the_copy_is_in_eval_mode_and_shares_no_memory() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3))).train()
    model[1].eval()
    copied, _ = isolate(model)
    assert [module.training for module in model.modules()] == [True, True, False, False]
    assert not any(module.training for module in copied.modules())
    kept = {value.data_ptr() for value in model.state_dict().values()}
    assert kept.isdisjoint(value.data_ptr() for value in copied.state_dict().values())


def test_activations_that_a_model_keeps_do_not_stand_in_the_way() -> None:
    class Keeping(Conv):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = self.conv(x)
            return self.kept

    model = Keeping()
    expected = model(X)
    assert not model.kept.is_leaf
    same(trace(model, X)(X), expected)
    assert model.kept is expected
    copied: Any = isolate(model)[0]
    same(copied.kept, expected)
    assert copied.kept.data_ptr() != expected.data_ptr()


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model.backend = torch  # type: ignore[assignment]
    with pytest.raises(CaptureError, match=r"Sequential cannot be deep-copied \(TypeError: .*make the model copyable"):
        isolate(model)


# What tracing refuses


class Branching(Conv):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.conv(x)
        return x


class Iterating(Conv):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.conv(image) for image in x])


class Measuring(Conv):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) / len(x)


class Unpacking(Conv):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.maximum(*x))


class Counting(Conv):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[0]):
            x = x + 1
        return self.conv(x)


class Inner(nn.Module):
    def __init__(self, network: type[nn.Module]) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


REFUSED: dict[type[nn.Module], tuple[str, str]] = {
    Branching: ("if x.sum() > 0:", "control flow"),
    Iterating: ("for image in x", "iterated"),
    Measuring: ("/ len(x)", "'len' is not supported"),
    Unpacking: ("torch.maximum(*x)", "iterated"),
    Counting: ("range(x.shape[0])", "integer"),
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("network", REFUSED)
def test_a_construct_that_cannot_be_traced_is_named(network: type[nn.Module], wrapped: bool) -> None:
    model = Inner(network) if wrapped else network()
    with pytest.raises(CaptureError) as caught:
        trace(model, X)
    message, line = str(caught.value), network.forward.__code__.co_firstlineno
    source, reason = REFUSED[network]
    assert message.startswith(f"{type(model).__name__} cannot be captured by symbolic tracing at test_capture.py:")
    assert int(message.split("test_capture.py:")[1].split()[0]) in range(line + 1, line + 3)
    assert source in message
    assert reason in message
    assert isinstance(caught.value.__cause__, Exception)


# Arguments


class Arguments(Conv):
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        double: bool = False,
        times: int = 1,
        mode: str = "relu",
        size: tuple[int, int] = (2, 2),
        function: Callable[[Tensor], Tensor] = torch.tanh,
        *,
        offset: Tensor | None = None,
        **others: Tensor,
    ) -> Tensor:
        y = F.adaptive_avg_pool2d(function(getattr(F, mode)(self.conv(x))) * times, size)
        y = 2 * y if double else y
        y = y if mask is None else y * mask
        return y if offset is None else y + offset


MASK, OFFSET = torch.tensor(3.0), torch.tensor(5.0)


@pytest.mark.parametrize(
    ("args", "kwargs", "names"),
    [
        ((X,), {}, ["x"]),
        ((), {"x": X}, ["x"]),
        ((X, MASK), {}, ["x", "mask"]),
        ((X,), {"offset": OFFSET}, ["x", "offset"]),
        ((), {"offset": OFFSET, "mask": MASK, "x": X}, ["x", "mask", "offset"]),
        ((X,), {"unused": OFFSET}, ["x", "unused"]),
    ],
)
def test_given_arguments_are_inputs_and_others_keep_their_defaults(
    args: tuple[Tensor, ...], kwargs: dict[str, Tensor], names: list[str]
) -> None:
    model = Arguments()
    traced = trace(model, *args, **kwargs)
    assert [node.target for node in traced.graph.nodes if node.op == "placeholder"] == names
    same(traced(*args, **kwargs), model(*args, **kwargs))
    with pytest.raises(TypeError, match="times"):
        traced(*args, times=2, **kwargs)


def test_an_input_that_forward_does_not_read_stays_an_input() -> None:
    class Labelled(Conv):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            return self.conv(x)

    model = Labelled()
    same(trace(model, X, MASK)(X, MASK), model(X))
    same(trace(model, X, labels=MASK)(X, labels=MASK), model(X))


def test_variadic_arguments_are_inputs_each() -> None:
    class Variadic(Conv):
        def forward(self, *images: Tensor, scale: Tensor, **more: Tensor) -> Tensor:
            return sum(self.conv(image) for image in (*images, *more.values())) * scale / len(images)

    model = Variadic()
    traced = trace(model, X, 2 * X, scale=MASK, last=3 * X)
    same(traced(X, 2 * X, scale=MASK, last=3 * X), model(X, 2 * X, scale=MASK, last=3 * X))


def test_outputs_keep_their_structure() -> None:
    class Outputs(Conv):
        def forward(self, x: Tensor) -> dict[str, Any]:
            y = self.conv(x)
            return {"y": y, "more": (x, [y + 1]), "none": None}

    model = Outputs()
    same(trace(model, X)(X), model(X))


# Leaves


class StockForward(nn.Conv2d):
    """A subclass that only adds to the layer."""

    def note(self) -> str:
        return "a method of its own"


class OwnForward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias) / 2


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight / 2, bias)


class OwnOutputPadding(nn.ConvTranspose2d):
    def _output_padding(self, input: Tensor, output_size: list[int] | None, *args: Any) -> list[int]:
        return [0, 0]


class OwnBatchNorm(nn.BatchNorm2d):
    """As written to change the defaults; its forward branches on the input's shape."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3)


class Chain(nn.Sequential):
    """A container whose forward is torch's own."""


@pytest.mark.parametrize(
    ("layer", "is_leaf", "is_stock"),
    [
        (nn.Conv2d(3, 3, 3), True, True),
        (StockForward(3, 3, 3), True, True),
        (OwnForward(3, 3, 3), False, False),
        (OwnConvolution(3, 3, 3), True, False),
        (OwnBatchNorm(3), True, False),
        (nn.ConvTranspose2d(3, 3, 3), True, True),
        (OwnOutputPadding(3, 3, 3), True, False),
    ],
)
def test_a_layer_with_torchs_own_forward_is_a_leaf(layer: nn.Module, is_leaf: bool, is_stock: bool) -> None:
    model = Chain(Chain(layer)).eval()
    traced = trace(model, X)
    assert targets(traced) == ["0.0"] * is_leaf
    assert has_stock_forward(layer) == is_stock
    same(traced(X), model(X))


def test_a_forward_put_on_the_instance_is_not_stock() -> None:
    layer = nn.Linear(3, 3)
    assert has_stock_forward(layer)
    vars(layer)["forward"] = lambda x: x
    assert not has_stock_forward(layer)


class DropPath(nn.Module):
    """Stochastic depth."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full((len(x), 1), 0.5)) if self.training else x


class Gate(nn.Module):
    """Asks for the mode and has state: a layer to look into."""

    def __init__(self, gate: Tensor) -> None:
        super().__init__()
        self.gate = nn.Parameter(gate)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else x * self.gate


def test_a_module_without_state_that_asks_for_the_mode_is_a_leaf() -> None:
    x = torch.ones(64, 3)
    model = nn.Sequential(nn.Linear(3, 3), DropPath())
    traced = trace(model, x)
    assert targets(traced) == ["0", "1"]
    same(traced(x), model.eval()(x))
    dropped = traced.train()(x).eq(0).all(1).sum()
    assert 0 < dropped < 64


@pytest.mark.parametrize("gate", [torch.zeros(()), torch.randn(3)])
def test_a_module_with_state_that_asks_for_the_mode_is_traced_through(gate: Tensor) -> None:
    x = torch.randn(2, 3)
    model = nn.Sequential(nn.Linear(3, 3), Gate(gate)).eval()
    traced = trace(model, x)
    assert targets(traced) == ["0"]
    same(traced(x), model(x))


# The graph module


ITERATING = ("vit", "language_model")  # over the chunks of their queries, keys and values


@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - ITERATING))
def test_networks_are_traced_under_their_own_names(name: str) -> None:
    model, args = build(name)
    traced = trace(model, *args)
    same(traced(*args), model(*args))
    called = targets(traced)
    assert set(called) <= {path for path, _ in model.named_modules()}
    assert traced.state_dict().keys() <= model.state_dict().keys()
    assert type(traced).__name__ == type(model).__name__


@pytest.mark.parametrize("name", ITERATING)
def test_networks_that_iterate_are_refused(name: str) -> None:
    model, args = build(name)
    with pytest.raises(CaptureError, match=r"at networks.py:\d+ in forward: `q, k, v = .*iterated"):
        trace(model, *args)


def test_a_graph_module_is_copied_pickled_and_captured_again() -> None:
    model, args = build("resnet")
    traced = trace(model, *args)
    again = pickle.loads(pickle.dumps(traced))
    for other in (copy.deepcopy(traced), again, trace(traced, *args), trace(again, *args)):
        same(other(*args), model(*args))
        assert targets(other) == targets(traced)


def test_modes_and_buffers_are_those_of_the_model() -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 3))
            self.register_buffer("cache", torch.ones(3), persistent=False)
            self.register_buffer("scale", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) * self.cache * self.scale

    model = Buffered()
    traced = trace(model, torch.randn(2, 3))
    assert not any(module.training for module in traced.modules())
    assert traced.state_dict().keys() == model.state_dict().keys()
