"""Which operators are recurrent layers: from an operator on parameters to torch's module that computes the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from tdfx.passes.layer_operators import parameter_read
from tdfx.passes.recurrent import Recurrent, holding

aten = torch.ops.aten
_TANH, _RELU = {"nonlinearity": "tanh"}, {"nonlinearity": "relu"}
# Kind, gates and options by operator.
_LAYERS: dict[Any, tuple[type[nn.RNNBase], int, dict[str, str]]] = {
    aten.lstm.input: (nn.LSTM, 4, {}),
    aten.gru.input: (nn.GRU, 3, {}),
    aten.rnn_tanh.input: (nn.RNN, 1, _TANH),
    aten.rnn_relu.input: (nn.RNN, 1, _RELU),
}
_CELLS: dict[Any, tuple[type[nn.RNNCellBase], dict[str, str]]] = {
    aten.lstm_cell.default: (nn.LSTMCell, {}),
    aten.gru_cell.default: (nn.GRUCell, {}),
    aten.rnn_tanh_cell.default: (nn.RNNCell, _TANH),
    aten.rnn_relu_cell.default: (nn.RNNCell, _RELU),
}


@dataclass(frozen=True)
class RecurrentCall:
    """A call of a recurrent layer or cell that an operator amounts to.

    Attributes:
        weight: qualified name of the first layer's input weight.
        module: the layer; its parameters are those of the graph.
        arguments: what it is called with.
    """

    weight: str
    module: Recurrent
    arguments: tuple[Any, ...]


def recurrent_call(graph_module: fx.GraphModule, node: fx.Node) -> RecurrentCall | None:
    """The call that a node amounts to; None where it is none, trains or has a weight that is no parameter."""
    given: Any = node.args
    if node.target in _CELLS:
        x, state, *held = given
        held = [read for read in held if read is not None]
        options: tuple[Any, ...] = ()
    elif node.target in _LAYERS:
        x, state, held, *options = given
    else:
        return None
    parameters = [parameter_read(graph_module, read) for read in held]
    found = [parameter for parameter in parameters if parameter is not None]
    if len(found) < len(held) or node.kwargs:
        return None
    made = _layer(node.target, found, *options) if options else _cell(node.target, found)
    if made is None:
        return None
    names = [name for name, _ in made.named_parameters()]
    states = tuple(state) if isinstance(state, list | tuple) else (state,)
    # A state of zeros is what the layer starts with itself, in the dtype that it has then.
    arguments = (x,) if all(map(_is_zero, states)) else (x, state)
    layer = holding(made, dict(zip(names, found, strict=True))).eval()
    return RecurrentCall(str(held[0].target), layer, arguments)


def _is_zero(state: Any) -> bool:
    """Whether a state is zeros that nobody but recurrent layers sees, and so could write into."""
    is_made = isinstance(state, fx.Node) and state.target is aten.zeros.default
    return is_made and all(user.target in _LAYERS or user.target in _CELLS for user in state.users)


def _layer(
    target: Any,
    parameters: list[nn.Parameter],
    biases: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> nn.RNNBase | None:
    if training and dropout:
        return None
    kind, gates, options = _LAYERS[target]
    first, hidden = parameters[0], len(parameters[0]) // gates
    more: dict[str, Any] = {**options, "device": "meta"}
    if len(parameters) // (layers * (1 + bidirectional)) % 2:
        more["proj_size"] = parameters[1].shape[1]
    return kind(
        first.shape[1],  # type: ignore[arg-type]
        hidden,
        num_layers=layers,
        bias=biases,
        batch_first=batch_first,
        dropout=dropout if layers > 1 else 0.0,
        bidirectional=bidirectional,
        **more,
    )


def _cell(target: Any, parameters: list[nn.Parameter]) -> nn.RNNCellBase:
    kind, options = _CELLS[target]
    weight, recurrent, *biases = parameters
    make: Any = kind
    made: nn.RNNCellBase = make(weight.shape[1], recurrent.shape[1], bool(biases), **options, device="meta")
    return made
