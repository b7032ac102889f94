"""Modules that train otherwise than they evaluate: what is lifted does in train mode what the model does."""

# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exported_networks import BatchNormAct, build
from torch import Tensor, fx, nn

from tdfx.passes.capture import isolate
from tdfx.passes.export_trace import export_trace
from tdfx.passes.lift_layers import LiftLayers
from tdfx.passes.lift_modules import LiftModules
from tdfx.passes.unpack_attention import unpack_attention


def lifted(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> fx.GraphModule:
    origin = unpack_attention(isolate(model)[0], trainable=True)
    return LiftModules(origin).run(LiftLayers(origin).run(export_trace(origin, args, kwargs)[0]))


@functools.cache
def network(name: str) -> fx.GraphModule:
    """A graph that is only copied."""
    model, args, kwargs = build(name)
    return lifted(model, *args, **kwargs)


def kinds(graph_module: fx.GraphModule) -> list[str]:
    return [
        type(graph_module.get_submodule(str(node.target))).__name__
        for node in graph_module.graph.nodes
        if node.op == "call_module"
    ]


def same(found: Any, expected: Any, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def check_training(module: fx.GraphModule, model: nn.Module, *args: Tensor, **kwargs: Tensor) -> None:
    """Same seed: same outputs, gradients and running statistics; outputs that eval mode does not have."""
    results: list[tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]] = []
    for trained in (copy.deepcopy(module), copy.deepcopy(model)):
        trained.train()
        torch.manual_seed(0)
        for _ in range(2):
            found = [y for y in torch.utils._pytree.tree_leaves(trained(*args, **kwargs)) if isinstance(y, Tensor)]
        loss: Any = sum(y.square().sum() for y in found)
        loss.backward()
        parameters = {name.replace("_scale", ".scale"): value for name, value in trained.named_parameters()}
        gradients = {name: value.grad for name, value in parameters.items() if value.grad is not None}
        assert gradients.keys() == parameters.keys()
        results.append((found, gradients, dict(trained.named_buffers())))
    (found, gradients, buffers), (expected, wanted, statistics) = results
    same(found, expected, 1e-6)
    same(gradients, wanted, 1e-5)
    same(buffers, {name: value for name, value in statistics.items() if name in buffers}, 1e-6)
    evaluated = [y for y in torch.utils._pytree.tree_leaves(model(*args, **kwargs)) if isinstance(y, Tensor)]
    assert not all(torch.allclose(y, z) for y, z in zip(expected, evaluated, strict=True))


class Functions(nn.Module):
    """A function of layers and an input; the loop over a shape is what symbolic tracing does not take."""

    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers, self.first = function, nn.ModuleList(layers), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.first(x), *self.layers)


FLAT, SEQUENCE, IMAGE, VIDEO = (8, 6), (3, 4, 6), (3, 4, 5, 6), (3, 4, 2, 5, 6)


class NamedDropout(nn.Dropout):
    """A subclass with torch's forward."""


class DoublingDropout(nn.Dropout):
    """A subclass that does more than drop."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def in_place(net: Functions, x: Tensor, drop: nn.Module) -> Tensor:
    drop(x)
    return x + 1


Case = tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]
DROPPING: dict[str, Case] = {
    "Dropout": (lambda: Functions(lambda net, x, drop: drop(x), nn.Dropout()), FLAT, ["Dropout"]),
    "Dropout1d": (lambda: Functions(lambda net, x, drop: drop(x), nn.Dropout1d()), SEQUENCE, ["Dropout1d"]),
    "Dropout2d": (lambda: Functions(lambda net, x, drop: drop(x), nn.Dropout2d()), IMAGE, ["Dropout2d"]),
    "Dropout3d": (lambda: Functions(lambda net, x, drop: drop(x), nn.Dropout3d()), VIDEO, ["Dropout3d"]),
    "AlphaDropout": (lambda: Functions(lambda net, x, drop: drop(x), nn.AlphaDropout()), FLAT, ["AlphaDropout"]),
    "FeatureAlphaDropout": (
        lambda: Functions(lambda net, x, drop: drop(x), nn.FeatureAlphaDropout()), IMAGE, ["FeatureAlphaDropout"],
    ),
    "in place": (lambda: Functions(in_place, nn.Dropout(inplace=True)), FLAT, ["Dropout"]),
    "a subclass": (lambda: Functions(lambda net, x, drop: drop(x), NamedDropout()), FLAT, ["NamedDropout"]),
    "a forward of its own": (lambda: Functions(lambda net, x, drop: drop(x), DoublingDropout()), FLAT, ["Dropout"]),
    "called twice": (lambda: Functions(lambda net, x, drop: drop(drop(x)), nn.Dropout()), FLAT, ["Dropout"] * 2),
    "beside its input": (lambda: Functions(lambda net, x, drop: drop(x) + 2 * x, nn.Dropout()), FLAT, ["Dropout"]),
    "Dropout2d beside its input": (
        lambda: Functions(lambda net, x, drop: drop(x) + 2 * x, nn.Dropout2d()), IMAGE, ["Dropout2d"],
    ),
    "AlphaDropout beside its input": (
        lambda: Functions(lambda net, x, drop: drop(x) + 2 * x, nn.AlphaDropout()), FLAT, ["AlphaDropout"],
    ),
    "functional": (
        lambda: Functions(lambda net, x: F.dropout(F.dropout(x, 0.3, net.training), 0.1, net.training)),
        FLAT, ["Dropout"] * 2,
    ),
    "functional in place": (
        lambda: Functions(lambda net, x: F.dropout(x, 0.3, net.training, inplace=True)), FLAT, ["Dropout"],
    ),
    "functional 1d": (lambda: Functions(lambda net, x: F.dropout1d(x, 0.3, net.training)), SEQUENCE, ["Dropout1d"]),
    "functional 2d": (lambda: Functions(lambda net, x: F.dropout2d(x, 0.3, net.training)), IMAGE, ["Dropout2d"]),
    "functional 3d": (lambda: Functions(lambda net, x: F.dropout3d(x, 0.3, net.training)), VIDEO, ["Dropout3d"]),
    "functional alpha": (
        lambda: Functions(lambda net, x: F.alpha_dropout(x, 0.3, net.training)), FLAT, ["AlphaDropout"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_drops_as_in_the_model(name: str) -> None:
    factory, shape, expected = DROPPING[name]
    model, x = factory().eval(), torch.randn(shape)
    found = lifted(model, x)
    assert kinds(found) == ["Linear", *expected]
    same(found(x), model(x))
    assert not any(module.training for module in found.modules())
    check_training(found, model, x)


def test_dropout_that_is_always_on_stays_on() -> None:
    model, x = Functions(lambda net, x: F.dropout(x, 0.5, training=True)).eval(), torch.ones(64, 6)
    found = lifted(model, x)
    assert kinds(found) == ["Linear"]
    torch.manual_seed(0)
    output = found(x)
    torch.manual_seed(0)
    same(output, model(x))
    assert 0 < int(output.eq(0).sum()) < output.numel()


class Statistics(nn.Module):
    """BatchNorm by hand, its statistics in buffers of this module or of the root."""

    def __init__(self, mean: str, computed: bool = False) -> None:
        super().__init__()
        self.conv, self.mean, self.computed = nn.Conv1d(4, 4, 1), mean, computed
        self.gain, self.shift = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.randn(4))
        self.register_buffer(mean, torch.randn(4))
        self.register_buffer("running_var", torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.gain.exp() if self.computed else self.gain
        return F.batch_norm(self.conv(x), getattr(self, self.mean), self.running_var, weight, self.shift, self.training)


class Outer(nn.Module):
    """A module around another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Doubling(nn.BatchNorm1d):
    """More than BatchNorm, with a layer and a parameter of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-2, momentum=0.2)
        self.scale, self.inner, self.drop = nn.Parameter(torch.rand(1)), nn.Conv1d(channels, channels, 1), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.inner(self.drop(x))) * self.scale


NORMS: dict[str, Case] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (8, 4), ["BatchNorm1d"]),
    "BatchNorm1d on sequences": (lambda: nn.BatchNorm1d(4, momentum=None), SEQUENCE, ["BatchNorm1d"]),
    "BatchNorm2d": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False)), IMAGE, ["Conv2d", "BatchNorm2d"],
    ),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4, eps=0.1), VIDEO, ["BatchNorm3d"]),
    "a forward of its own": (lambda: BatchNormAct(4), IMAGE, ["BatchNorm2d", "Dropout2d"]),
    "layers of its own": (lambda: Doubling(4), SEQUENCE, ["Dropout", "Conv1d", "BatchNorm1d"]),
    "called twice": (
        lambda: Functions(lambda net, x, norm: norm(norm(x)), nn.BatchNorm1d(4)),
        SEQUENCE, ["Linear", "BatchNorm1d", "BatchNorm1d"],
    ),
    "statistics in a block": (lambda: Statistics("running_mean"), SEQUENCE, ["Conv1d", "BatchNorm1d"]),
    "statistics of another name": (lambda: Statistics("average"), SEQUENCE, ["Conv1d", "BatchNorm1d"]),
}  # fmt: skip


def track(dims: int) -> nn.Module:
    kind = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d}[dims]
    return kind(4, affine=True, track_running_stats=True)


NORMS |= {
    "InstanceNorm1d": (lambda: track(1), SEQUENCE, ["InstanceNorm1d"]),
    "InstanceNorm2d": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), track(2)), IMAGE, ["Conv2d", "InstanceNorm2d"],
    ),
}  # fmt: skip


def prepared(model: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        x = torch.randn(shape)
        model.train()(2 * x + 1)
        return model.eval(), x


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("name", NORMS)
def test_batch_norm_normalizes_as_in_the_model(name: str, depth: int) -> None:
    factory, shape, expected = NORMS[name]
    model, x = prepared(Outer(factory()) if depth else factory(), shape)
    if depth == 0 and isinstance(model, nn.modules.batchnorm._NormBase):
        model = nn.Sequential(model).eval()  # a root is no layer
    found = lifted(model, x)
    assert kinds(found) == expected
    same(found(x), model(x))
    if "statistics" in name:  # under names of a BatchNorm's own
        found, model = copy.deepcopy(found).train(), copy.deepcopy(model).train()
        same(found(x), model(x))
        norm = next(part for part in found.modules() if isinstance(part, nn.BatchNorm1d))
        same(norm.running_var, dict(model.named_buffers())["inner.running_var" if depth else "running_var"])
        return
    check_training(found, model, x)


def test_batch_norm_with_a_computed_weight_or_of_the_batch_stays_an_operator() -> None:
    for inner in (Statistics("running_mean", computed=True), nn.BatchNorm1d(4, track_running_stats=False)):
        model, x = prepared(Outer(inner), SEQUENCE)
        found = lifted(model, x)
        assert "BatchNorm1d" not in kinds(found)
        same(found(x), model(x))


class Slopes(nn.RReLU):
    """More than RReLU."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


SLOPES: dict[str, Case] = {
    "RReLU": (lambda: Functions(lambda net, x, act: act(x), nn.RReLU(0.1, 0.9)), FLAT, ["RReLU"]),
    "in place": (lambda: Functions(lambda net, x, act: act(x) + 1, nn.RReLU(inplace=True)), FLAT, ["RReLU"]),
    "a forward of its own": (lambda: Functions(lambda net, x, act: act(x), Slopes()), FLAT, ["RReLU"]),
    "functional": (lambda: Functions(lambda net, x: F.rrelu(x, 0.2, 0.8, net.training)), FLAT, ["RReLU"]),
    "functional in place": (
        lambda: Functions(lambda net, x: F.rrelu(x, training=net.training, inplace=True)), FLAT, ["RReLU"],
    ),
    "of one slope": (lambda: Functions(lambda net, x: F.rrelu(x, 0.2, training=net.training)), FLAT, ["RReLU"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SLOPES)
def test_random_slopes_are_drawn_as_in_the_model(name: str) -> None:
    factory, shape, expected = SLOPES[name]
    model, x = factory().eval(), torch.randn(shape)
    found = lifted(model, x)
    assert kinds(found) == ["Linear", *expected]
    same(found(x), model(x))
    check_training(found, model, x)


def test_slopes_that_are_always_drawn_stay() -> None:
    model, x = Functions(lambda net, x: F.rrelu(x, training=True)).eval(), torch.randn(FLAT)
    assert kinds(lifted(model, x)) == ["Linear"]


def test_instance_norm_of_the_input_alone_stays_an_operator() -> None:
    model, x = nn.Sequential(nn.Conv1d(4, 4, 1), nn.InstanceNorm1d(4)).eval(), torch.randn(SEQUENCE)
    assert kinds(lifted(model, x)) == ["Conv1d"]


# Recurrent layers


class Outputs(nn.LSTM):
    """A subclass that returns its outputs alone."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


class Reading(nn.Module):
    """Everything that a recurrent layer returns."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Any:
        return self.rnn(x)


OPTIONS: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "dropout": 0.5}
RECURRENT: dict[str, Callable[..., nn.RNNBase]] = {
    "LSTM": lambda **more: nn.LSTM(6, 5, batch_first=True, **OPTIONS, **more),
    "LSTM, projected": lambda **more: nn.LSTM(6, 5, proj_size=3, **OPTIONS, **more),
    "GRU": lambda **more: nn.GRU(6, 5, **OPTIONS, **more),
    "RNN": lambda **more: nn.RNN(6, 5, batch_first=True, **OPTIONS, **more),
    "RNN, relu": lambda **more: nn.RNN(6, 5, nonlinearity="relu", **OPTIONS, **more),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_are_the_models_own(name: str) -> None:
    model, x = Reading(RECURRENT[name]()).eval(), torch.randn(3, 4, 6)
    found = lifted(model, x)
    assert kinds(found) == [name.partition(",")[0]]
    same(found(x), model(x))
    check_training(found, model, x)


def test_a_recurrent_layer_with_a_forward_of_its_own_becomes_torchs() -> None:
    model, x = Reading(Outputs(6, 5)).eval(), torch.randn(3, 4, 6)
    found = lifted(model, x)
    assert kinds(found) == ["LSTM"]
    assert type(found.get_submodule("rnn")) is nn.LSTM
    same(found(x), model(x))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_are_made_where_there_are_parameters_alone(name: str, bias: bool) -> None:
    rnn = RECURRENT[name](bias=bias)
    model, x = Reading(rnn).eval(), torch.randn(3, 4, 6)
    found = LiftModules(nn.Module()).run(export_trace(model, (x,), {})[0])
    assert repr(found.get_submodule("rnn")) == repr(rnn)
    same(found(x), model(x))


CELLS: dict[str, Callable[..., nn.RNNCellBase]] = {
    "LSTMCell": nn.LSTMCell,
    "GRUCell": nn.GRUCell,
    "RNNCell": nn.RNNCell,
    "RNNCell, relu": lambda *sizes, **options: nn.RNNCell(*sizes, nonlinearity="relu", **options),
}


class Twice(nn.Module):
    """A cell that goes two steps."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Any:
        return self.cell(x, self.cell(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_cells_are_lifted_once_for_all_calls(name: str, own: bool, bias: bool) -> None:
    model, x = Twice(CELLS[name](6, 5, bias=bias)).eval(), torch.randn(3, 6)
    found = LiftModules(model if own else nn.Module()).run(export_trace(model, (x,), {})[0])
    assert [str(node.target) for node in found.graph.nodes if node.op == "call_module"] == ["cell", "cell"]
    assert (found.get_submodule("cell") is model.cell) == own
    assert repr(found.get_submodule("cell")) == repr(model.cell)
    same(found(x), model(x))


# Whole networks


@pytest.mark.parametrize("name", ["regularized", "drop_residual"])
def test_networks_train_as_they_did(name: str) -> None:
    model, args, kwargs = build(name)
    check_training(network(name), model, *args, **kwargs)


def test_names_of_parameters_and_statistics_stay() -> None:
    model, _, _ = build("regularized")
    assert network("regularized").state_dict().keys() == model.state_dict().keys()


def test_batch_norm_of_unknown_dimensions_stays_an_operator() -> None:
    model, x = prepared(Outer(Statistics("running_mean")), SEQUENCE)
    exported, _ = export_trace(model, (x,), {})
    for node in exported.graph.nodes:
        node.meta.pop("val", None)
    found = LiftModules(model).run(exported)
    assert kinds(found) == []
    same(found(x), model(x))


class Gated(nn.Module):
    """A GRU as a function of parameters."""

    def __init__(self, scale: float, training: bool) -> None:
        super().__init__()
        self.rnn, self.scale, self.mode = nn.GRU(6, 5, num_layers=2), scale, training

    def forward(self, x: Tensor) -> Tensor:
        weights = [weight if self.scale == 1.0 else weight * self.scale for weight in self.rnn.parameters()]
        state = x.new_zeros(2, x.shape[1], 5)
        options = (True, 2, 0.5 if self.mode else 0.0, self.mode, False, False)
        return torch.gru(x, state, weights, *options)[0]


@pytest.mark.parametrize(("scale", "training", "expected"), [(1.0, False, ["GRU"]), (2.0, False, []), (1.0, True, [])])
def test_recurrence_with_computed_weights_or_dropout_that_is_on_stays(
    scale: float, training: bool, expected: list[str]
) -> None:
    model, x = Gated(scale, training).eval(), torch.randn(3, 4, 6)
    exported, _ = export_trace(model, (x,), {})
    found = LiftModules(model).run(exported)
    assert kinds(found) == expected
    for module in (found, model):
        torch.manual_seed(0)
        outputs = [module(x) for _ in range(2)]
        assert torch.equal(*outputs) is not training


class Bags(nn.EmbeddingBag):
    """More than a bag."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * super().forward(x)


class Counting(nn.Module):
    """A bag as a function, of which more than the sums are read."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(7, 4, mode="sum")

    def forward(self, x: Tensor) -> Any:
        offsets = torch.arange(0, x.numel(), x.shape[1])
        sums, _, sizes, _ = torch.embedding_bag(self.bag.weight, x.reshape(-1), offsets)
        return sums, sizes


@pytest.mark.parametrize("model", [nn.Sequential(Bags(7, 4, mode="sum")), Counting()])
def test_bags_with_more_to_them_stay_operators(model: nn.Module) -> None:
    x = torch.randint(7, (3, 4))
    found = lifted(model.eval(), x)
    assert kinds(found) == []
    same(found(x), model(x))


class SharedLSTM(nn.Module):
    """Two LSTMs with one input weight, and recurrent weights of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.LSTM(6, 6), nn.LSTM(6, 6), nn.Linear(6, 24, bias=False)
        self.second.weight_ih_l0 = self.head.weight = self.first.weight_ih_l0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)[0])[0])


class SharedBags(nn.Module):
    """Bags of two modes with one table."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.sum = nn.EmbeddingBag(7, 4, mode="mean"), nn.EmbeddingBag(7, 4, mode="sum")
        self.sum.weight = self.mean.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.mean(x) * self.sum(x)


class SharedStatistics(nn.Module):
    """BatchNorms with statistics in common, and weights of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
        nn.init.uniform_(self.second.weight)
        self.second.running_mean, self.second.running_var = self.first.running_mean, self.first.running_var

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


SHARED: dict[str, tuple[Callable[[], nn.Module], Tensor, list[str]]] = {
    "recurrent": (SharedLSTM, torch.randn(3, 4, 6), ["first", "second", "head"]),
    "bags": (SharedBags, torch.randint(7, (3, 4)), ["mean", "sum"]),
    "statistics": (SharedStatistics, torch.randn(8, 6), ["first", "second"]),
}


@pytest.mark.parametrize("name", SHARED)
def test_modules_that_share_tensors_are_told_apart(name: str) -> None:
    factory, x, expected = SHARED[name]
    model = factory().eval()
    found = lifted(model, x)
    assert [node.target for node in found.graph.nodes if node.op == "call_module"] == expected
    same(found(x), model(x))
    assert len(list(found.parameters())) == len(list(model.parameters()))


def test_a_bag_of_another_mode_with_the_same_table_is_not_called() -> None:
    model, x = SharedBags().eval(), torch.randint(7, (3, 4))
    exported, _ = export_trace(model, (x,), {})
    model.sum.mode = "max"
    found = LiftModules(model).run(exported)
    assert kinds(found) == ["EmbeddingBag"]
    model.sum.mode = "sum"
    same(found(x), model(x))


def test_recurrent_layers_start_in_the_dtype_that_they_have() -> None:
    for make in (nn.LSTM, nn.GRU):
        model, x = Reading(make(6, 5)).eval(), torch.randn(3, 4, 6)
        found = lifted(model, x)
        same(copy.deepcopy(found).double()(x.double()), copy.deepcopy(model).double()(x.double()))


class Started(nn.Module):
    """A GRU whose first state is written into zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(6, 5)

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        state = torch.zeros(1, x.shape[1], 5)
        state[0] = first
        return self.rnn(x, state)[0]


def test_a_state_that_is_written_into_is_kept() -> None:
    model, x, first = Started().eval(), torch.randn(3, 4, 6), torch.randn(4, 5)
    found = lifted(model, x, torch.zeros(4, 5))
    assert kinds(found) == ["GRU"]
    same(found(x, first), model(x, first))
