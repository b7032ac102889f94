"""Recurrent layers of torch with their input weights apart: names of the weights, and layers made around them.

Every gate of an LSTM, a GRU or a simple RNN takes its input as W x + b (torch.nn.LSTM; Hochreiter and Schmidhuber 1997;
Cho et al. 2014), and nothing else of the layer sees x. So a Linear that computes W x + b for the gates of all
directions, and the same layer on the Linear's output with slices of the identity for W and zeros for b, are together
the layer. ``core`` makes the latter; ``with_input`` puts the Linear's weight back where the identity was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tdfx.passes.capture import has_torch_forward

Recurrent = nn.RNNBase | nn.RNNCellBase
KINDS: tuple[type[Recurrent], ...] = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
WEIGHT, BIAS = "weight_ih", "bias_ih"
_HELD = ("weight_hh", "bias_hh", "weight_hr")  # by the recurrence; the last one where states are projected


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module computes what a recurrent layer or cell of torch does."""
    return isinstance(module, KINDS) and has_torch_forward(module) and "forward" not in vars(module)


def is_core(module: nn.Module) -> bool:
    """Whether a module is what ``core`` made."""
    return is_recurrent(module) and any(name.startswith(WEIGHT) for name in module._non_persistent_buffers_set)


def suffixes(module: Recurrent, layer: int = 0) -> tuple[str, ...]:
    """What the names of a layer's weights end in, one entry a direction."""
    if isinstance(module, nn.RNNCellBase):
        return ("",)
    return (f"_l{layer}", f"_l{layer}_reverse") if module.bidirectional else (f"_l{layer}",)


def input_layer(module: Recurrent, layer: int = 0) -> nn.Linear:
    """The input weights and biases of one layer, (directions x gates x hidden, in), as a Linear."""
    weight = _stacked(module, WEIGHT, layer)
    linear = nn.Linear(weight.shape[1], len(weight), bool(module.bias), device="meta")
    linear.weight = weight
    if module.bias:
        linear.bias = _stacked(module, BIAS, layer)
    return linear.train(module.training)


def core(module: Recurrent, layer: int = 0) -> Recurrent:
    """One layer that takes for input what its ``input_layer`` returns; the identity is no parameter of it."""
    weights = [_tensor(module, f"{WEIGHT}{suffix}") for suffix in suffixes(module, layer)]
    identity = torch.eye(sum(map(len, weights)), dtype=weights[0].dtype, device=weights[0].device)
    given = torch.split(identity, [len(weight) for weight in weights])
    zeros = [weight.new_zeros(len(weight)) for weight in weights if module.bias]
    return _layer(module, layer, given, zeros)


def with_input(module: Recurrent, linear: nn.Linear) -> Recurrent:
    """A core as a plain layer that computes what ``module(linear(x))`` does."""
    parts = len(suffixes(module))
    biases = _parts(linear.bias, parts) if module.bias else []
    return _layer(module, 0, _parts(linear.weight, parts), biases)


def _stacked(module: Recurrent, kind: str, layer: int) -> nn.Parameter:
    """A parameter itself, or those of both directions as one."""
    parts = [module.get_parameter(f"{kind}{suffix}") for suffix in suffixes(module, layer)]
    if len(parts) == 1:
        return parts[0]
    return nn.Parameter(torch.cat([part.detach() for part in parts]), all(part.requires_grad for part in parts))


def _parts(value: Tensor, count: int) -> list[Tensor]:
    """A parameter itself, or those of both directions."""
    if count == 1:
        return [value]
    return [nn.Parameter(part.clone(), value.requires_grad) for part in value.detach().chunk(count)]


def _tensor(module: nn.Module, name: str) -> Tensor:
    value = getattr(module, name)
    assert isinstance(value, Tensor)
    return value


def _layer(module: Recurrent, layer: int, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Recurrent:
    """One layer with these input weights and biases, one a direction, and the recurrence of another one's layer."""
    made = bare(module, weights[0].shape[1])
    ends = suffixes(made)
    tensors = {f"{WEIGHT}{end}": weight for end, weight in zip(ends, weights, strict=True)}
    tensors |= {f"{BIAS}{end}": bias for end, bias in zip(ends, biases, strict=False)}
    for old, new in zip(suffixes(module, layer), ends, strict=True):
        held = {f"{kind}{new}": getattr(module, f"{kind}{old}", None) for kind in _HELD}
        tensors |= {name: value for name, value in held.items() if value is not None}
    return holding(made, tensors).train(module.training)


def bare(module: Recurrent, input_size: int) -> Recurrent:
    """One layer like another one, of another input size; its tensors are without values."""
    options: dict[str, Any] = {"device": "meta"}
    if isinstance(module, nn.RNN | nn.RNNCell):
        options["nonlinearity"] = module.nonlinearity
    if isinstance(module, nn.RNNBase):
        options |= {"batch_first": module.batch_first, "bidirectional": module.bidirectional}
    if isinstance(module, nn.LSTM):
        options["proj_size"] = module.proj_size
    kind = next(kind for kind in KINDS if isinstance(module, kind))
    made: Recurrent = cast(Any, kind)(input_size, module.hidden_size, bias=module.bias, **options)
    return made


def holding(module: Recurrent, tensors: Mapping[str, Tensor]) -> Recurrent:
    """The module, holding these: parameters as such, others as buffers that no state dict has."""
    for name, value in tensors.items():
        if isinstance(value, nn.Parameter):
            setattr(module, name, value)
        else:
            delattr(module, name)
            module.register_buffer(name, value, persistent=False)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
    return module
