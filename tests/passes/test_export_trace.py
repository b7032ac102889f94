"""Graphs from torch.export: signatures, containers, the batch, blocks, writes into buffers, refusals."""

# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import copy
import operator
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from exported_networks import LastOutput, Prediction, build
from torch import Tensor, fx, nn
from torch.export import Dim

from tdfx.contained import quiet
from tdfx.errors import CaptureError
from tdfx.passes.capture import isolate
from tdfx.passes.drop_unread import DropUnread
from tdfx.passes.export_trace import ASSERTIONS, export_trace, operators

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


class Functions(nn.Module):
    """A function of a linear layer, a buffer and inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.linear = function, nn.Linear(6, 6)
        self.register_buffer("count", torch.zeros(6))

    def forward(self, *xs: Tensor, **named: Tensor) -> Any:
        return self.function(self, *xs, **named)


def exported(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> tuple[fx.GraphModule, tuple[str, ...]]:
    return export_trace(isolate(model)[0], args, kwargs)


def graph_of(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> fx.GraphModule:
    graph_module, notes = exported(model, *args, **kwargs)
    assert notes == ()
    return graph_module


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def targets(graph_module: fx.GraphModule) -> set[str]:
    return {str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"}


# Signatures


class Signature(nn.Module):
    """Arguments of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(
        self, x: Tensor, *more: Tensor, scale: Tensor | None = None, flip: bool = False, **rest: Tensor
    ) -> Tensor:
        y = self.linear(x) + sum(more) + sum(rest.values())
        y = y if scale is None else y * scale
        return y.flip(0) if flip else y


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X,), {}),
        ((X, 2 * X, 3 * X), {}),
        ((), {"x": X}),
        ((X,), {"last": X + 1, "scale": torch.tensor(3.0)}),
        ((), {"scale": X[:, :1], "x": X}),
        ((X,), {"input": X, "self_": X, "len": X}),
    ],
)
def test_graphs_are_called_as_the_model_is(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
    model = Signature()
    graph_module = graph_of(model, *args, **kwargs)
    same(graph_module(*args, **kwargs), model(*args, **kwargs))
    names = [node.target for node in graph_module.graph.nodes if node.op == "placeholder"]
    assert names[len(args) :] == list(kwargs)
    same(graph_module(*args, **dict(reversed(kwargs.items()))), model(*args, **kwargs))


def test_weights_are_the_models_under_their_own_names() -> None:
    model = isolate(Signature())[0]
    graph_module, _ = export_trace(model, (X,), {})
    assert {name: id(value) for name, value in graph_module.named_parameters()} == {
        name: id(value) for name, value in model.named_parameters()
    }
    assert not any(module.training for module in graph_module.modules())


# Containers


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


CONTAINERS: dict[str, tuple[Callable[..., Any], type]] = {
    "tensor": (lambda net, x: net.linear(x), Tensor),
    "tuple of one": (lambda net, x: (net.linear(x),), tuple),
    "list": (lambda net, x: [net.linear(x), None, 3, (x + 1, [x * 2])], list),
    "dict": (lambda net, x: {"a": net.linear(x), 2: {"b": x + 1}, "c": []}, dict),
    "ordered": (lambda net, x: OrderedDict(z=net.linear(x), a=(x + 1,)), OrderedDict),
    "mapping": (lambda net, x: LastOutput(logits=net.linear(x), states=(x + 1,)), LastOutput),
    "dataclass": (lambda net, x: Prediction(logits=net.linear(x), features=x + 1), Prediction),
    "dataclass with nothing": (lambda net, x: Prediction(logits=net.linear(x), features=None), Prediction),  # type: ignore[arg-type]
    "named tuple": (lambda net, x: Pair(net.linear(x), x + 1), Pair),
    "default dictionary": (lambda net, x: defaultdict(list, a=net.linear(x)), tuple),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_outputs_come_in_the_models_containers(name: str) -> None:
    function, kind = CONTAINERS[name]
    model = Functions(function)
    found, expected = graph_of(model, X)(X), model(X)
    assert type(found) is kind
    leaves = torch.utils._pytree.tree_leaves
    assert [type(leaf) for leaf in leaves(found)] == [type(leaf) for leaf in leaves(expected)]
    same([y for y in leaves(found) if isinstance(y, Tensor)], [y for y in leaves(expected) if isinstance(y, Tensor)])


def test_an_input_and_a_parameter_are_returned_as_they_are() -> None:
    model = Functions(lambda net, x: (x, net.linear.weight, net.linear(x)))
    same(graph_of(model, X)(X), model(X))


# The batch


def test_the_batch_is_free_in_all_inputs_that_have_it_and_other_sizes_are_not() -> None:
    model = Functions(lambda net, x, y, other: net.linear(x) + y.sum(1, keepdim=True) + other.sum())
    graph_module = graph_of(model, X, torch.ones(2, 3), torch.ones(4))
    nodes = {node.target: node.meta["val"].shape for node in graph_module.graph.nodes if node.op == "placeholder"}
    sizes = [tuple(isinstance(size, torch.SymInt) for size in shape) for shape in nodes.values()]
    assert sizes == [(True, False), (True, False), (False,)]
    given = torch.randn(5, 6), torch.ones(5, 3), torch.ones(4)
    same(graph_module(*given), model(*given))


def test_a_batch_of_1_is_repeated_with_what_has_it() -> None:
    model = Functions(lambda net, x, y, table: net.linear(x) * y + table.sum(0))
    given = X[:1], torch.ones(1, 1), torch.randn(2, 6)
    graph_module = graph_of(model, *given)
    shapes = [node.meta["val"].shape for node in graph_module.graph.nodes if node.op == "placeholder"]
    assert [isinstance(shape[0], torch.SymInt) for shape in shapes] == [True, True, False]
    for batch in (1, 3):
        given = torch.randn(batch, 6), torch.randn(batch, 1), torch.randn(2, 6)
        same(graph_module(*given), model(*given))


def test_inputs_without_dimensions_have_no_batch() -> None:
    model = Functions(lambda net, factor, x: factor * net.linear(x))
    given = torch.tensor(2.0), torch.randn(5, 6)
    graph_module = graph_of(model, torch.tensor(3.0), X)
    same(graph_module(*given), model(*given))
    scalar = Functions(lambda net, factor: net.linear(factor * torch.ones(6)))
    same(graph_of(scalar, torch.tensor(3.0))(torch.tensor(2.0)), scalar(torch.tensor(2.0)))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_batch_that_cannot_be_free_is_that_of_the_example(batch: int) -> None:
    model = Functions(lambda net, x: net.linear(x) + torch.ones(len(x), 6))
    x = torch.randn(batch, 6)
    graph_module, (note,) = exported(model, x)
    assert note.startswith("the batch size is fixed: with a free one torch.export says UserError: ")
    same(graph_module(x), model(x))


def test_inputs_are_left_as_they_are() -> None:
    def write(net: Functions, x: Tensor) -> Tensor:
        x += 1
        return net.linear(x)

    x, model = X.clone(), Functions(write)
    graph_module = graph_of(model, x)
    same(x, X)
    assert vars(x) == {}
    given = X.clone()
    graph_module(given)
    same(given, X + 1)


def test_what_torch_export_refuses_is_named() -> None:
    with pytest.raises(CaptureError, match=r"Functions cannot be captured by torch.export \(GuardOnDataDependent"):
        exported(Functions(lambda net, x: net.linear(x) if x.sum() > 0 else x), X)


# Operators


def test_a_graph_holds_no_assertions_and_no_second_names() -> None:
    model = Functions(lambda net, x: torch.dropout(net.linear(x.to(torch.float32)), 0.5, net.training))
    graph_module = graph_of(model.eval(), X)
    names = targets(graph_module)
    assert not any(assertion in name for name in names for assertion in ASSERTIONS)
    assert "aten.alias.default" not in names
    double = copy.deepcopy(graph_module).double()
    assert double.get_parameter("linear.weight").dtype == torch.float64


def without_gradients(net: Functions, x: Tensor) -> Tensor:
    with torch.no_grad():
        y, z = net.linear(x), x * 2
        with torch.enable_grad():
            y = y * net.linear(z)
    return net.linear(y) + z


def without_autocast(net: Functions, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        parts = net.linear(x).split(3, 1)
    return torch.cat([parts[1], parts[0]], 1)


@pytest.mark.parametrize("function", [without_gradients, without_autocast])
def test_blocks_are_part_of_the_graph(function: Callable[..., Any]) -> None:
    model = Functions(function)
    graph_module = DropUnread().run(graph_of(model, X))
    names = targets(graph_module)
    assert "aten.linear.default" in names
    assert not any("wrap_with" in name for name in names)
    assert not any(isinstance(module, fx.GraphModule) for module in list(graph_module.modules())[1:])
    x = torch.randn(5, 6)
    same(graph_module(x), model(x))


def test_a_block_with_autocast_is_refused() -> None:
    def lowered(net: Functions, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net.linear(x)

    with pytest.raises(CaptureError, match=r"cannot be captured by torch.export .*autocast inside forward"):
        graph_of(Functions(lowered), X)


def counted(net: Any, x: Tensor) -> Tensor:
    net.count += 1
    return net.linear(x)


def counted_and_read(net: Any, x: Tensor) -> Tensor:
    net.count.add_(x.sum(0))
    return net.linear(x) + net.count


def copied_and_read(net: Any, x: Tensor) -> Tensor:
    net.count.copy_(x.mean(0))
    return net.linear(x) + 2 * net.count


def row_written(net: Any, x: Tensor) -> Tensor:
    before = net.count * 1
    net.count[2:4] = x[0, :2]
    return net.linear(x) + net.count - before


@pytest.mark.parametrize("function", [counted, counted_and_read, copied_and_read, row_written])
def test_writes_into_buffers_do_not_outlast_a_call(function: Callable[..., Any]) -> None:
    model = Functions(function)
    graph_module = graph_of(model, X)
    expected = copy.deepcopy(model)(X)
    for _ in range(2):
        same(graph_module(X), expected)
    assert not any(bool(buffer.any()) for buffer in graph_module.buffers())
    assert ("aten.clone.default" in targets(graph_module)) == (function is not counted)
    if function is counted:
        assert targets(graph_module) == {"aten.linear.default"}


def test_a_mask_of_torchs_transformer_is_not_looked_into() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerDecoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
            self.decoder = nn.TransformerDecoder(layer, 1)
            self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(x, x, tgt_mask=self.mask)

    model, x = Decoder().eval(), torch.randn(3, 4, 6)
    detect = nn.modules.transformer._detect_is_causal_mask
    torch.testing.assert_close(graph_of(model, x)(x), model(x), rtol=1e-5, atol=1e-6)
    assert nn.modules.transformer._detect_is_causal_mask is detect


# Programs


def test_a_programs_graph_is_of_the_program_and_leaves_it_alone() -> None:
    model, args, _ = build("shape_dependent")
    program = torch.export.export(model, args, dynamic_shapes=({0: Dim.DYNAMIC},), strict=False)
    before = str(program.graph)
    graph_module = operators(program)
    same(graph_module(*args), model(*args))
    assert str(program.graph) == before
    with quiet():
        decomposed = operators(program.run_decompositions())
    same(decomposed(*args), model(*args))
    assert operator.getitem not in targets(graph_module)


def test_a_program_that_takes_containers_is_refused() -> None:
    class Listed(nn.Module):
        def forward(self, xs: list[Tensor]) -> Tensor:
            return xs[0] + xs[1]

    with pytest.raises(CaptureError, match="the exported program takes 2 values as 1 arguments; expected tensors"):
        operators(torch.export.export(Listed(), ([X, X],), strict=False))


class Positions(nn.Module):
    """A batch and a table with as many rows as it, by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        result: Tensor = self.linear(x + table)
        return result


def test_another_input_of_the_batchs_size_does_not_fix_it() -> None:
    model = Positions().eval()
    table = torch.randn(5, 6)
    graph_module, notes = export_trace(model, (torch.randn(5, 5, 6), table), {})
    assert notes == ()
    x = torch.randn(3, 5, 6)
    torch.testing.assert_close(graph_module(x, table), model(x, table), rtol=0, atol=0)


def test_maps_over_the_batch_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"torch.vmap and the like inside forward are not part of a graph"):
        exported(Functions(lambda net, x: torch.vmap(net.linear)(x)), X)


def test_a_table_in_a_buffer_that_is_rescaled_is_copied() -> None:
    def look_up(net: Any, x: Tensor) -> Tensor:
        table = F.embedding(torch.arange(3), net.count.reshape(3, 2), max_norm=1.0)
        return table + net.linear(x)[:1, :2]

    model = Functions(look_up)
    model.count += 5
    graph_module = graph_of(model, X)
    graph_module(X)
    same(graph_module.get_buffer("count"), torch.full((6,), 5.0))


def test_nothing_is_left_of_how_decisions_are_watched() -> None:
    answer = torch.SymBool.__bool__
    with pytest.raises(CaptureError, match="data-dependent"):
        exported(Functions(lambda net, x: net.linear(x) if x.sum() > 0 else x), X)
    assert torch.SymBool.__bool__ is answer
