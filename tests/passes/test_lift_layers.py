"""Layers from operators: every operator against the layer it becomes, names, ties, and what stays an operator."""

# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tdfx.passes.base import assemble
from tdfx.passes.capture import LayerTracer, isolate, symbolic_trace
from tdfx.passes.export_trace import export_trace, operators
from tdfx.passes.layer_operators import _RULES, _SYNONYMS, is_transpose, layer_call, parameter_read
from tdfx.passes.lift_layers import LiftLayers

aten = torch.ops.aten


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(drawn(*shape))


def lifted(model: nn.Module, *args: Tensor) -> fx.GraphModule:
    return LiftLayers(model).run(symbolic_trace(isolate(model)[0], args, {}))


def called(graph_module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"]


def same(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# Operators


class Holder(nn.Module):
    """A weight and a bias."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = parameter(*shapes[0])
        self.bias = parameter(*shapes[1]) if len(shapes) > 1 else None


Args = tuple[Any, ...]
W, B = "weight", "bias"  # stand for reads of them
OPERATORS: list[tuple[Any, Args, dict[str, Any], tuple[tuple[int, ...], ...], Tensor, type[nn.Module]]] = [
    (aten.linear.default, ("x", W, B), {}, ((5, 4), (5,)), drawn(2, 3, 4), nn.Linear),
    (aten.linear.default, ("x", W), {}, ((5, 4),), drawn(4), nn.Linear),
    (F.linear, ("x",), {"weight": W, "bias": B}, ((5, 4), (5,)), drawn(2, 4), nn.Linear),
    (aten.addmm.default, (B, "x", W), {}, ((4, 5), (5,)), drawn(2, 4), nn.Linear),
    (torch.addmm, (B, "x", W), {}, ((4, 5), (5,)), drawn(2, 4), nn.Linear),
    (aten.mm.default, ("x", W), {}, ((4, 5),), drawn(2, 4), nn.Linear),
    (torch.mm, ("x", W), {}, ((4, 5),), drawn(2, 4), nn.Linear),
    (aten.matmul.default, ("x", W), {}, ((4, 5),), drawn(2, 3, 4), nn.Linear),
    (torch.matmul, ("x", W), {}, ((4, 5),), drawn(4), nn.Linear),
    (operator.matmul, ("x", W), {}, ((4, 5),), drawn(2, 3, 4), nn.Linear),
    (aten.conv1d.default, ("x", W, B, [2], [1], [2]), {}, ((5, 4, 3), (5,)), drawn(2, 4, 9), nn.Conv1d),
    (aten.conv1d.padding, ("x", W, B, [1], "same"), {}, ((5, 4, 4), (5,)), drawn(2, 4, 9), nn.Conv1d),
    (F.conv1d, ("x", W), {"padding": "valid", "groups": 2}, ((6, 2, 3),), drawn(2, 4, 9), nn.Conv1d),
    (aten.conv2d.default, ("x", W, B, [2, 1], [1, 2], [1, 2], 2), {}, ((6, 2, 3, 2), (6,)), drawn(2, 4, 7, 9),
     nn.Conv2d),
    (aten.conv2d.default, ("x", W), {}, ((6, 4, 3, 2),), drawn(4, 7, 9), nn.Conv2d),
    (aten.conv2d.padding, ("x", W, B, [1, 1], "same", [2, 1]), {}, ((6, 4, 3, 2), (6,)), drawn(2, 4, 7, 9), nn.Conv2d),
    (aten.conv2d.padding, ("x", W), {}, ((6, 4, 3, 2),), drawn(2, 4, 7, 9), nn.Conv2d),
    (F.conv2d, ("x", W), {"stride": 2, "padding": (1, 0), "bias": B}, ((6, 4, 3, 3), (6,)), drawn(2, 4, 7, 9),
     nn.Conv2d),
    (aten.conv3d.default, ("x", W, B, [1, 2, 1], [1]), {}, ((5, 2, 1, 3, 2), (5,)), drawn(1, 2, 3, 5, 4), nn.Conv3d),
    (aten.conv3d.padding, ("x", W, None, [1], "same"), {}, ((5, 2, 1, 3, 2),), drawn(1, 2, 3, 5, 4), nn.Conv3d),
    (F.conv3d, ("x", W, B, (1, 2, 1)), {}, ((5, 2, 1, 3, 2), (5,)), drawn(1, 2, 3, 5, 4), nn.Conv3d),
    (aten.convolution.default, ("x", W, B, [2, 1], [1, 0], [1, 1], False, [0, 0], 2), {}, ((6, 2, 3, 2), (6,)),
     drawn(2, 4, 7, 9), nn.Conv2d),
    (aten.convolution.default, ("x", W, B, [2, 3], [1, 0], [1, 1], True, [1, 0], 2), {}, ((4, 3, 3, 2), (6,)),
     drawn(2, 4, 5, 6), nn.ConvTranspose2d),
    (aten.conv_transpose1d.default, ("x", W, B, [3], [1], [1], 2, [2]), {}, ((4, 3, 2), (6,)), drawn(2, 4, 5),
     nn.ConvTranspose1d),
    (aten.conv_transpose2d.input, ("x", W, B, [2, 2], [1, 0], [1, 0], 2), {}, ((4, 3, 3, 2), (6,)),
     drawn(2, 4, 5, 6), nn.ConvTranspose2d),
    (aten.conv_transpose3d.input, ("x", W), {}, ((2, 3, 1, 3, 2),), drawn(1, 2, 3, 5, 4), nn.ConvTranspose3d),
    (F.conv_transpose1d, ("x", W), {"stride": 2, "output_padding": 1}, ((4, 3, 3),), drawn(2, 4, 5),
     nn.ConvTranspose1d),
    (F.conv_transpose2d, ("x", W, B, 2, (1, 0), 1, 2), {}, ((4, 3, 3, 2), (6,)), drawn(2, 4, 5, 6),
     nn.ConvTranspose2d),
    (F.conv_transpose3d, ("x", W), {}, ((2, 3, 1, 3, 2),), drawn(1, 2, 3, 5, 4), nn.ConvTranspose3d),
    (aten.embedding.default, (W, "x"), {}, ((7, 3),), torch.tensor([[1, 6], [0, 1]]), nn.Embedding),
    (aten.embedding.default, (W, "x", 1), {}, ((7, 3),), torch.tensor([[1, 6], [0, 1]]), nn.Embedding),
    (F.embedding, ("x", W), {"scale_grad_by_freq": True}, ((7, 3),), torch.tensor([[1, 6], [0, 1]]), nn.Embedding),
    (F.embedding, ("x",), {"weight": W, "padding_idx": -1}, ((7, 3),), torch.tensor([[1, 6], [0, 1]]), nn.Embedding),
    (aten.layer_norm.default, ("x", [3, 4], W, B, 0.1), {}, ((3, 4), (3, 4)), drawn(2, 3, 4), nn.LayerNorm),
    (aten.layer_norm.default, ("x", [4], W), {}, ((4,),), drawn(2, 3, 4), nn.LayerNorm),
    (aten.group_norm.default, ("x", 2, W, B, 0.1), {}, ((4,), (4,)), drawn(2, 4, 3), nn.GroupNorm),
]  # fmt: skip


def graph_of(holder: nn.Module, function: Any, args: Args, kwargs: dict[str, Any]) -> fx.GraphModule:
    root = nn.Module()
    root.layer = holder
    graph = fx.Graph(tracer_cls=LayerTracer)
    nodes: dict[Any, fx.Node] = {"x": graph.placeholder("x")}
    nodes |= {name: graph.get_attr(f"layer.{name}") for name, _ in holder.named_parameters()}
    given = [nodes[value] if isinstance(value, str) and value in nodes else value for value in args]
    named = {
        name: nodes[value] if isinstance(value, str) and value in nodes else value for name, value in kwargs.items()
    }
    graph.output(graph.call_function(function, tuple(given), named))
    return assemble(root, graph)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize(
    "case", range(len(OPERATORS)), ids=[getattr(entry[0], "__name__", str(entry[0])) for entry in OPERATORS]
)
def test_an_operator_becomes_the_layer_that_computes_the_same(case: int) -> None:
    function, args, kwargs, shapes, x, kind = OPERATORS[case]
    graph_module = graph_of(Holder(*shapes), function, args, kwargs)
    found = LiftLayers(graph_module).run(graph_module)
    assert called(found) == ["layer"]
    assert type(found.get_submodule("layer")) is kind
    assert not any(node.op == "get_attr" for node in found.graph.nodes)
    same(found(x), graph_module(x))
    found(x).square().sum().backward()
    gradients = [value.grad.clone() for value in found.parameters() if value.grad is not None]
    graph_module.zero_grad()
    graph_module(x).square().sum().backward()
    for name, value in graph_module.named_parameters():
        assert value.grad is not None
        got = gradients[[name for name, _ in graph_module.named_parameters()].index(name)]
        same(got, value.grad if got.shape == value.grad.shape else value.grad.T)


def test_every_operator_of_the_table_is_tried() -> None:
    assert {entry[0] for entry in OPERATORS} == _RULES.keys() | _SYNONYMS.keys()


# What stays an operator


class Functions(nn.Module):
    """A function of a network's own parameters and an input."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.square, self.matrix, self.stack = parameter(4, 4), parameter(5, 4), parameter(2, 4, 4)
        self.kernel, self.bias, self.scalar = parameter(4, 4, 3), parameter(4), parameter(1)
        self.t, self.transpose = parameter(4, 4), nn.Linear(4, 4).double()
        self.register_buffer("buffer", drawn(4, 4))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


STAYING: dict[str, Callable[[Any, Tensor], Any]] = {
    "computed weight": lambda net, x: F.linear(x, net.square * 2),
    "buffer": lambda net, x: F.linear(x, net.buffer),
    "weights of a stack": lambda net, x: torch.matmul(x, net.stack),
    "weight on the left": lambda net, x: net.square @ x.transpose(0, 1),
    "two parameters": lambda net, x: x + net.square @ net.square,
    "scaled addmm": lambda net, x: torch.addmm(net.bias, x, net.square, beta=2),
    "scaled product": lambda net, x: torch.addmm(net.bias, x, net.square, alpha=0.5),
    "lookup that rescales": lambda net, x: F.embedding(x.argmax(1), net.square, max_norm=1.0).sum(1),
    "computed bias of a convolution": lambda net, x: F.conv1d(x.unsqueeze(0).mT, net.kernel, net.bias * 2, padding=1),
    "computed bias of a norm": lambda net, x: F.layer_norm(x, (4,), net.bias * 2, net.bias),
    "computed shift of a norm": lambda net, x: F.layer_norm(x, (4,), net.bias, net.bias * 2),
    "group norm without a bias": lambda net, x: F.group_norm(x, 2, net.bias),
    "computed padding": lambda net, x: F.conv1d(x.unsqueeze(0).mT, net.kernel, padding=x.shape[0] // 4),
    "product of values": lambda net, x: x @ x.transpose(0, 1),
    "values transposed by a layer": lambda net, x: x @ net.transpose(net.square),
}


@pytest.mark.parametrize("name", STAYING)
def test_what_is_no_call_of_a_layer_stays(name: str) -> None:
    model, x = Functions(STAYING[name]), drawn(4, 4)
    found = lifted(model, x)
    assert called(found) == (["transpose"] if name.endswith("layer") else [])
    same(found(x), model(x))


LIFTED: dict[str, tuple[Callable[[Any, Tensor], Any], list[str]]] = {
    "transposed twice": (lambda net, x: x @ net.square.t().transpose(0, 1), ["square"]),
    "transposed": (lambda net, x: x @ net.matrix.T, ["matrix"]),
    "by permute": (lambda net, x: torch.matmul(x, torch.permute(net.matrix, (1, 0))), ["matrix"]),
    "by negative dimensions": (lambda net, x: x @ net.matrix.transpose(-1, -2), ["matrix"]),
    "a parameter that is called t": (lambda net, x: F.linear(x, net.t), ["t"]),
    "computed bias": (lambda net, x: F.linear(x, net.square, net.bias.exp()), ["square"]),
    "broadcast bias": (lambda net, x: torch.addmm(net.scalar, x, net.square), ["square"]),
    "chained": (lambda net, x: F.linear(F.linear(x, net.square), net.matrix), ["square", "matrix"]),
    "bias from a layer": (lambda net, x: torch.addmm(x @ net.square.T, x, net.t), ["square", "t"]),
    "called twice": (lambda net, x: F.linear(F.linear(x, net.square), net.square), ["square", "square"]),
    "with and without bias": (
        lambda net, x: F.linear(F.linear(x, net.square, net.bias), net.square), ["square", "square_1"],
    ),
    "two paddings": (
        lambda net, x: F.conv1d(F.conv1d(x[None], net.kernel, padding=1), net.kernel), ["kernel", "kernel_1"],
    ),
    "read besides": (lambda net, x: F.linear(x, net.square) + net.square.sum(), ["square"]),
    "beside a layer": (
        lambda net, x: F.linear(net.transpose(x), net.transpose.weight, net.transpose.bias.exp()),
        ["transpose", "transpose_1"],
    ),
    "as a called layer": (
        lambda net, x: net.transpose(F.linear(x, net.transpose.weight)), ["transpose_1", "transpose"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIFTED)
def test_a_layer_takes_the_name_of_its_weight(name: str) -> None:
    function, names = LIFTED[name]
    model, x = Functions(function), drawn(4, 4)
    found = lifted(model, x)
    assert called(found) == names
    same(found(x), model(x))
    assert not any(module.training for module in found.modules())


def test_a_parameter_read_both_ways_stays_where_it_is_transposed() -> None:
    model, x = Functions(lambda net, x: F.linear(x, net.square) @ net.square), drawn(4, 4)
    found = lifted(model, x)
    assert called(found) == ["square"]
    assert [node.target for node in found.graph.nodes if node.op == "get_attr"] == ["square.weight"]
    same(found(x), model(x))
    assert sum(value.numel() for value in found.parameters()) == 16


def test_layers_of_one_weight_share_it() -> None:
    function, names = LIFTED["with and without bias"]
    found = lifted(Functions(function), drawn(4, 4))
    first, second = (found.get_parameter(f"{name}.weight") for name in names)
    assert first is second


def test_gradients_of_a_frozen_weight_stay_off() -> None:
    model = Functions(lambda net, x: F.linear(x, net.matrix) @ net.matrix2)
    model.matrix2 = parameter(5, 3)
    model.matrix2.requires_grad_(False)
    found = lifted(model, drawn(4, 4))
    assert {name: value.requires_grad for name, value in found.named_parameters()} == {
        "matrix.weight": True,
        "matrix2.weight": False,
    }


# Names


class Scaled(nn.Module):
    """A convolution with more of its own than a layer has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gain = parameter(4, 4, 3), parameter(1)
        self.register_buffer("offset", drawn(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight) * self.gain + self.offset


def test_values_beneath_a_layer_move_out_of_its_way() -> None:
    model, x = nn.Sequential(Scaled()), drawn(2, 4, 5)
    found = lifted(model, x)
    assert called(found) == ["0"]
    assert type(found.get_submodule("0")) is nn.Conv1d
    assert set(found.state_dict()) == {"0.weight", "0_gain", "0_offset"}
    same(found(x), model(x))


class Clashing(nn.Module):
    """A parameter of the name that a moved one would get."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv_gain = Scaled(), parameter(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.conv_gain


def test_values_that_move_take_the_place_of_no_others() -> None:
    model, x = Clashing(), drawn(2, 4, 5)
    found = lifted(model, x)
    assert set(found.state_dict()) == {"conv.weight", "conv_gain", "conv_gain_", "conv_offset"}
    same(found(x), model(x))


class Block(nn.Module):
    """A weight of its own beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.inner = parameter(4, 4), nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(F.linear(x, self.weight))


def test_a_weight_of_a_module_with_layers_keeps_its_own_name() -> None:
    model, x = nn.Sequential(Block()), drawn(2, 4)
    found = lifted(model, x)
    assert called(found) == ["0.weight", "0.inner"]
    same(found(x), model(x))


class Tied(nn.Module):
    """A head on the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4).double(), nn.Linear(4, 7, bias=False).double()
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x))


def exported(model: nn.Module, *args: Tensor) -> fx.GraphModule:
    return operators(torch.export.export(model, args, strict=False))


def test_a_tied_weight_has_a_layer_for_each_module_that_computes_with_it() -> None:
    model, x = Tied(), torch.tensor([[1, 2]])
    found = LiftLayers(model).run(exported(model, x))
    assert called(found) == ["embedding", "head"]
    assert found.get_parameter("head.weight") is found.get_parameter("embedding.weight")
    same(found(x), model(x))


def test_a_tied_weight_is_not_copied_for_a_transposed_read() -> None:
    class Transposed(Tied):
        def forward(self, x: Tensor) -> Tensor:
            return self.embedding(x) @ self.head.weight.t() @ self.embedding.weight

    model, x = Transposed(), torch.tensor([[1, 2]])
    found = LiftLayers(model).run(exported(model, x))
    same(found(x), model(x))
    assert len({id(value) for value in found.parameters()}) == 1


def test_a_weight_read_transposed_under_two_names_is_not_copied_twice() -> None:
    root = nn.Module()
    root.first = root.second = parameter(4, 4)
    graph = fx.Graph(tracer_cls=LayerTracer)
    y = graph.call_function(torch.mm, (graph.placeholder("x"), graph.get_attr("first")))
    graph.output(graph.call_function(torch.mm, (y, graph.get_attr("second"))))
    graph_module = assemble(root, graph)
    found = LiftLayers(root).run(graph_module)
    assert len({id(value) for value in found.parameters()}) == 1
    same(found(drawn(2, 4)), graph_module(drawn(2, 4)))


def test_a_weight_that_a_layer_holds_is_not_copied_for_a_transposed_read() -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(6, 4, bias=False, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.encoder(x), self.encoder.weight.t())

    model, x = Autoencoder(), drawn(2, 6)
    found = lifted(model, x)
    assert called(found) == ["encoder"]
    assert [value.shape for value in found.parameters()] == [(4, 6)]
    same(found(x), model(x))


def test_a_module_of_two_names_is_one_layer() -> None:
    class TwoNames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = nn.Linear(4, 4, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    model, x = TwoNames(), drawn(2, 4)
    found = LiftLayers(model).run(exported(model, x))
    assert len(set(called(found))) == 1 and len(called(found)) == 2
    same(found(x), model(x))


# Reading graphs


def test_parameters_and_transposes_are_told_by_what_nodes_do() -> None:
    root = nn.Module()
    root.t, root.buffer = parameter(2, 2), drawn(2, 2)
    graph = fx.Graph()
    x = graph.placeholder("t")
    read, plain = graph.get_attr("t"), graph.get_attr("buffer")
    yes = [
        graph.call_method("t", (read,)),
        graph.call_function(getattr, (read, "mT")),
        graph.call_function(aten.permute.default, (read, [1, 0])),
        graph.call_function(aten.numpy_T.default, (read,)),
        graph.call_function(aten.mT.default, (read,)),
        graph.call_method("permute", (read, 1, 0)),
        graph.call_method("permute", (read, (1, 0))),
    ]
    no = [
        x,
        read,
        graph.call_function(aten.permute.default, (read, [0, 1])),
        graph.call_method("permute", (read, 0, 1)),
        graph.call_function(aten.transpose.int, (read, 0, 0)),
        graph.call_function(getattr, (read, "shape")),
    ]
    graph.output(x)
    graph_module = fx.GraphModule(root, graph)
    assert all(is_transpose(node) for node in yes)
    assert not any(is_transpose(node) for node in no)
    assert parameter_read(graph_module, read) is root.t
    assert [parameter_read(graph_module, value) for value in (plain, x, None, 3)] == [None] * 4
    assert layer_call(graph_module, x) is None


class Rescaling(nn.Module):
    """An embedding that rescales the rows that it looks up. Input (batch, tokens)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, max_norm=1.5, norm_type=1.0)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.embedding(tokens) * self.embedding(tokens)
        return found


def test_an_embedding_that_rescales_is_lifted_whole() -> None:
    model, tokens = Rescaling().eval(), torch.tensor([[0, 3], [6, 3]])
    origin = isolate(model)[0]
    found = LiftLayers(origin).run(export_trace(origin, (tokens,), {})[0])
    kinds = [node.op for node in found.graph.nodes]
    assert kinds == ["placeholder", "call_module", "call_module", "call_function", "output"]
    layer = found.get_submodule("embedding")
    assert isinstance(layer, nn.Embedding)
    assert (layer.max_norm, layer.norm_type) == (1.5, 1.0)
    with torch.no_grad():
        same(found(tokens), model(tokens))
