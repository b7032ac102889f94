# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from tdfx.decompositions import registry
from tdfx.errors import PassError
from tdfx.passes.capture import symbolic_trace
from tdfx.passes.factorize import Factorize, Replacement
from tdfx.passes.recurrent import Recurrent, core, input_layer, is_core, with_input
from tdfx.passes.shape_prop import ShapeProp
from tdfx.passes.sites import FindSites
from tdfx.passes.unpack_recurrent import (
    RECURRENCE,
    PackRecurrent,
    UnpackableLayers,
    UnpackRecurrent,
    obstacle,
    packed_name,
    unpacked_state,
)
from tdfx.stages.capture import capture

IN, HIDDEN, LENGTH, BATCH = 7, 5, 4, 3
KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "RNN": nn.RNN,
    "RNN, relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
    "LSTM, projected": lambda *sizes, **options: nn.LSTM(*sizes, proj_size=2, **options),
}
LAYOUTS = {"batch first": (BATCH, LENGTH, IN), "time first": (LENGTH, BATCH, IN), "unbatched": (LENGTH, IN)}
CELLS: dict[str, Callable[[bool], nn.RNNCellBase]] = {
    "LSTMCell": lambda bias: nn.LSTMCell(IN, HIDDEN, bias),
    "GRUCell": lambda bias: nn.GRUCell(IN, HIDDEN, bias),
    "RNNCell": lambda bias: nn.RNNCell(IN, HIDDEN, bias),
    "RNNCell, relu": lambda bias: nn.RNNCell(IN, HIDDEN, bias, nonlinearity="relu"),
}


class Holding(nn.Module):
    """Returns all that a recurrent layer does, with its states given as further inputs or not."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, *state: Tensor) -> Any:
        if not state:
            return self.rnn(x)
        return self.rnn(x, state if len(state) > 1 else state[0])


class Stepping(nn.Module):
    """A cell, step by step."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> list[Any]:
        states: list[Any] = [None]
        for step in range(LENGTH):
            states.append(self.cell(x[step], states[-1]))
        return states[1:]


def traced(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    return symbolic_trace(model.eval(), inputs, {})


def unpacked(graph_module: fx.GraphModule, *inputs: Tensor, trainable: bool = False) -> fx.GraphModule:
    names = UnpackableLayers(ShapeProp(inputs).run(graph_module)).run(graph_module)
    return UnpackRecurrent(names, trainable).run(graph_module)


def at_full_rank(graph_module: fx.GraphModule, *inputs: Tensor) -> fx.GraphModule:
    """With an exact chain for every site, packed."""
    svd, replacements = registry()["svd"], {}
    for site in FindSites(ShapeProp(inputs).run(graph_module)).run(graph_module)[0]:
        layer = graph_module.get_submodule(site.name)
        assert isinstance(layer, nn.Linear)
        factors = svd.decompose(layer.weight.detach(), svd.full_rank(site))
        replacements[site.name] = Replacement("svd", svd.build(site, svd.full_rank(site), factors, layer.bias))
    return PackRecurrent().run(Factorize(replacements).run(graph_module))


def modules_of(graph_module: fx.GraphModule) -> list[nn.Module]:
    return [graph_module.get_submodule(str(n.target)) for n in graph_module.graph.nodes if n.op == "call_module"]


def same(found: Any, expected: Any, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)


def states_of(rnn: nn.RNNBase, unbatched: bool) -> tuple[Tensor, ...]:
    count = rnn.num_layers * (1 + rnn.bidirectional)
    sizes = [rnn.proj_size or HIDDEN, HIDDEN] if isinstance(rnn, nn.LSTM) else [HIDDEN]
    return tuple(torch.randn(count, *(() if unbatched else (BATCH,)), size).double() for size in sizes)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize(
    ("layers", "bias", "given"), [(1, True, False), (1, False, True), (2, True, True), (3, False, False)]
)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_unpacked_and_at_full_rank_the_outputs_and_states_are_the_same(
    kind: str, layout: str, layers: int, bidirectional: bool, bias: bool, given: bool
) -> None:
    options = {"num_layers": layers, "bidirectional": bidirectional, "bias": bias}
    model = Holding(KINDS[kind](IN, HIDDEN, batch_first=layout == "batch first", **options)).double()
    rnn = model.rnn
    assert isinstance(rnn, nn.RNNBase)
    inputs = (torch.randn(LAYOUTS[layout]).double(), *(states_of(rnn, layout == "unbatched") if given else ()))
    found = unpacked(traced(model, *inputs), *inputs)
    expected = model(*inputs)
    same(found(*inputs), expected)
    result = at_full_rank(found, *inputs)
    same(result(*inputs), expected, rtol=1e-9)
    assert [type(module) for module in modules_of(result)] == [nn.Linear, type(rnn)] * layers
    assert not any(is_core(module) for module in modules_of(result))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_cells_too(name: str, bias: bool) -> None:
    model, x = Stepping(CELLS[name](bias)).double(), torch.randn(LENGTH, BATCH, IN).double()
    found = unpacked(traced(model, x), x)
    same(found(x), model(x))
    result = at_full_rank(found, x)
    same(result(x), model(x), rtol=1e-9)
    assert {type(module) for module in modules_of(result)} == {nn.Linear, type(model.cell)}


def test_dense_layers_packed_again_have_the_weights_that_they_had() -> None:
    model, x = Holding(nn.LSTM(IN, HIDDEN, 2, bidirectional=True)), torch.randn(LENGTH, BATCH, IN)
    given = traced(model, x)
    packed = PackRecurrent().run(unpacked(given, x))
    tensors = dict(model.rnn.named_parameters())
    for name, value in packed.named_parameters():
        _, layer, weight = name.split(".")
        torch.testing.assert_close(value, tensors[weight.replace("l0", layer)], rtol=0, atol=0)
    assert sum(map(Tensor.numel, packed.parameters())) == sum(map(Tensor.numel, model.parameters()))
    assert all(n.op != "call_module" or n.target == "rnn" for n in given.graph.nodes)  # left as it was


def test_the_identity_is_no_weight() -> None:
    rnn = nn.GRU(IN, HIDDEN, bidirectional=True)
    made = core(rnn)
    assert sorted(made.state_dict()) == sorted(
        f"{kind}_hh_l0{end}" for kind in ("weight", "bias") for end in ("", "_reverse")
    )
    assert sum(map(Tensor.numel, (*made.parameters(), *input_layer(rnn).parameters()))) == sum(
        map(Tensor.numel, rnn.parameters())
    )


def test_gradients_at_the_gates_are_those_of_the_layer() -> None:
    model, x = Holding(nn.GRU(IN, HIDDEN, 2)).double(), torch.randn(LENGTH, BATCH, IN).double()
    found = unpacked(traced(model, x), x)
    for network in (model, found):
        sum(output.pow(3).sum() for output in network(x)).backward()
    rnn = model.rnn
    # Both hold the parameters of one direction, so that gradients add up.
    for layer in (0, 1):
        parameter = found.get_parameter(f"rnn.ih_l{layer}.weight")
        assert parameter is rnn.get_parameter(f"weight_ih_l{layer}")
        (alone,) = torch.autograd.grad(sum(output.pow(3).sum() for output in model(x)), [parameter])
        same(parameter.grad, 2 * alone)


@pytest.mark.parametrize("seed", [0, 1])
def test_dropout_between_layers_trains_as_it_did(seed: int) -> None:
    model, x = Holding(nn.LSTM(IN, HIDDEN, 3, dropout=0.4, bidirectional=True)), torch.randn(LENGTH, BATCH, IN)
    found = unpacked(traced(model, x), x, trainable=True).train()
    model.train()
    outputs = []
    for network in (model, found):
        torch.manual_seed(seed)
        outputs.append(network(x))
    same(outputs[1], outputs[0], rtol=1e-5)
    assert not torch.allclose(model.eval()(x)[0], outputs[0][0])
    assert not any(isinstance(module, nn.Dropout) for module in unpacked(traced(model, x), x).modules())


def test_a_layer_called_twice_is_one_site() -> None:
    class Twice(Holding):
        def forward(self, x: Tensor, *state: Tensor) -> Any:
            y, last = self.rnn(x)
            return self.rnn(x.flip(0), last)[0] + y

    model, x = Twice(nn.LSTM(IN, HIDDEN, 2)).double(), torch.randn(LENGTH, BATCH, IN).double()
    found = unpacked(traced(model, x), x)
    same(found(x), model(x))
    sites, _ = FindSites(ShapeProp((x,)).run(found)).run(found)
    assert [(site.name, len(site.layer.calls)) for site in sites] == [("rnn.ih_l0", 2), ("rnn.ih_l1", 2)]
    same(at_full_rank(found, x)(x), model(x), rtol=1e-9)


def test_states_that_go_on_whole_or_in_parts() -> None:
    class Chained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.LSTM(IN, HIDDEN, 2), nn.LSTM(HIDDEN, HIDDEN, 2)

        def forward(self, x: Tensor) -> dict[str, Any]:
            y, state = self.first(x)
            whole = self.second(y, hx=state)
            return {"whole": whole, "part": whole[-1][0][-1], "state": state[1], "sum": self.second(input=y)[0]}

    model, x = Chained().double(), torch.randn(LENGTH, BATCH, IN).double()
    found = unpacked(traced(model, x), x)
    same(found(x), model(x))
    same(at_full_rank(found, x)(x), model(x), rtol=1e-9)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_state_dict_after_packing_is_one_before(bidirectional: bool) -> None:
    model, x = Holding(nn.GRU(IN, HIDDEN, 2, bidirectional=bidirectional)), torch.randn(LENGTH, BATCH, IN)
    before = unpacked(traced(model, x), x)
    after = PackRecurrent().run(before)
    found = unpacked_state(before, after.state_dict())
    assert found.keys() == before.state_dict().keys()
    same(found, dict(before.state_dict()), rtol=0)


# What stays


def reason(model: nn.Module, *inputs: Tensor) -> dict[str, str]:
    graph_module = unpacked(traced(model, *inputs), *inputs)
    skipped = FindSites(ShapeProp(inputs).run(graph_module)).run(graph_module)[1]
    return {entry.layer: entry.reason for entry in skipped}


def tied_layers() -> nn.Module:
    rnn = nn.GRU(HIDDEN, HIDDEN, 2)
    rnn.weight_hh_l1 = rnn.weight_hh_l0
    return rnn


def frozen_in_a_buffer() -> nn.Module:
    rnn = nn.GRU(HIDDEN, HIDDEN)
    weight = rnn.weight_ih_l0.detach()
    del rnn.weight_ih_l0
    rnn.register_buffer("weight_ih_l0", weight)
    rnn._init_flat_weights()
    return rnn


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (tied_layers, "layers or directions of this GRU share parameters; a chain for one of them would break the tie"),
        (frozen_in_a_buffer, "weight_ih_l0 of this GRU are buffers; expected parameters"),
    ],
)
def test_layers_that_stay_say_why(make: Callable[[], nn.Module], expected: str) -> None:
    assert reason(Holding(make()), torch.randn(LENGTH, BATCH, HIDDEN)) == {"rnn": expected}


def test_a_layer_of_several_dtypes_stays() -> None:
    x = torch.randn(LENGTH, BATCH, IN)
    graph_module = traced(Holding(nn.GRU(IN, HIDDEN)), x)
    shapes = ShapeProp((x,)).run(graph_module)
    assert obstacle(graph_module, "rnn", shapes) is None
    graph_module.rnn.bias_hh_l0 = nn.Parameter(torch.zeros(3 * HIDDEN).double())
    assert obstacle(graph_module, "rnn", shapes) == "the parameters of this GRU are of several dtypes or devices"


def test_layers_that_share_parameters_stay() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.GRU(HIDDEN, HIDDEN), nn.GRU(HIDDEN, HIDDEN)
            self.second.weight_ih_l0 = self.first.weight_ih_l0

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)[0])[0]

    end = "; a chain for one of them would break the tie; give it a copy of its own"
    expected = {"first": f"it shares parameters with second{end}", "second": f"it shares parameters with first{end}"}
    assert reason(Tied(), torch.randn(LENGTH, BATCH, HIDDEN)) == expected


@fx.wrap
def packed(x: Tensor) -> PackedSequence:
    return pack_padded_sequence(x, torch.tensor([4, 3, 1]))


@fx.wrap
def padded(sequence: PackedSequence) -> Tensor:
    return pad_packed_sequence(sequence)[0]


def test_layers_called_on_packed_sequences_stay_and_compute_what_they_did() -> None:
    class Packing(Holding):
        def forward(self, x: Tensor, *state: Tensor) -> Tensor:
            return padded(self.rnn(packed(x))[0])

    model, x = Packing(nn.LSTM(IN, HIDDEN)), torch.randn(LENGTH, BATCH, IN)
    assert reason(model, x) == {"rnn": "this LSTM is called on a packed sequence; call it on tensors"}
    same(capture(model, x).module(x), model(x))


def test_recurrent_weights_are_skipped_with_a_reason() -> None:
    assert reason(Holding(nn.LSTM(IN, HIDDEN)), torch.randn(LENGTH, BATCH, IN)) == {"rnn.l0": RECURRENCE}


def test_names_lead_back_to_the_layer() -> None:
    assert [packed_name(site) for site in ("a.lstm.ih_l0", "head", "")] == ["a.lstm", "", ""]


@pytest.mark.parametrize("bias", [True, False])
def test_a_core_after_anything_else_than_its_linear_layer_is_an_error(bias: bool) -> None:
    model, x = Holding(nn.LSTM(IN, HIDDEN, bias=bias)), torch.randn(LENGTH, BATCH, IN)
    found = unpacked(traced(model, x), x)
    wrong = nn.Linear(IN, 4 * HIDDEN, bias=not bias)
    found.rnn.ih_l0 = wrong
    with pytest.raises(
        PassError, match=f"rnn.l0 is not called on what one linear layer with {'a' if bias else 'no'} bias"
    ):
        PackRecurrent().run(found)
    found.rnn.ih_l0 = nn.Linear(IN, 4 * HIDDEN, bias=bias)
    (called,) = [node for node in found.graph.nodes if node.target == "rnn.ih_l0"]
    with found.graph.inserting_after(called):
        read = found.graph.call_function(operator.neg, (called,))
    for user in [user for user in called.users if user is not read]:
        user.replace_input_with(called, read)
    found.recompile()
    with pytest.raises(PassError, match=r"rnn\.l0 is not called on"):
        PackRecurrent().run(found)


def test_a_subclass_without_a_forward_of_its_own_becomes_torchs_layer() -> None:
    class Mine(nn.LSTM):
        pass

    rnn: Recurrent = Mine(IN, HIDDEN)
    x = torch.randn(LENGTH, BATCH, IN)
    linear = input_layer(rnn)
    made = with_input(core(rnn), linear)
    assert type(made) is nn.LSTM
    assert made.weight_ih_l0 is linear.weight
    same(made(x), rnn(x), rtol=0)
