"""Layers of torch.nn as their class and the arguments of its constructor, and back.

Arguments are read back from the attributes of the same name, which torch's layers keep. What this rule gets wrong
shows before anything is written: a layer is saved only when the one rebuilt has the same attributes and tensors.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from tdfx.errors import InputError
from tdfx.structure.functions import find_function, function_name
from tdfx.structure.values import decode, encode

HOLDERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NO_LAYERS = (*HOLDERS, nn.ParameterList, nn.ParameterDict, nn.Container, nn.RNNBase, nn.SyncBatchNorm)
_RECURRENT = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
_NO_ARGUMENTS = ("args", "kwargs", "device", "dtype")
# What every module has, and what a layer derives from its tensors.
_GENERAL = frozenset({*vars(nn.Module()), "_flat_weights", "_flat_weight_refs"})
_FREE = ("__init__", "__module__", "__doc__", "__annotations__", "__constants__", "__firstlineno__", "extra_repr",
         "reset_parameters", "__static_attributes__", "__parameters__", "__orig_bases__")  # fmt: skip
MOST_LAYERS = 10_000


def _is_set(name: str) -> Callable[[nn.Module], bool]:
    return lambda module: attrgetter(name)(module) is not None


# Arguments kept under other names, by class and argument.
_READERS: dict[type[nn.Module], dict[str, Callable[[Any], Any]]] = {
    nn.MultiheadAttention: {"bias": _is_set("in_proj_bias"), "add_bias_kv": _is_set("bias_k")},
    nn.AdaptiveLogSoftmaxWithLoss: {"cutoffs": lambda module: module.cutoffs[:-1]},
    nn.TransformerEncoder: {"encoder_layer": lambda module: module.layers[0]},
    nn.TransformerDecoder: {"decoder_layer": lambda module: module.layers[0]},
}
for _layer in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
    _READERS[_layer] = {
        "d_model": attrgetter("self_attn.embed_dim"),
        "nhead": attrgetter("self_attn.num_heads"),
        "batch_first": attrgetter("self_attn.batch_first"),
        "dim_feedforward": attrgetter("linear1.out_features"),
        "dropout": attrgetter("dropout.p"),
        "layer_norm_eps": attrgetter("norm1.eps"),
        "bias": _is_set("linear1.bias"),
    }


def encode_layer(module: nn.Module) -> dict[str, Any]:
    """A layer's class and arguments as JSON values.

    Raises:
        InputError: it is no layer of torch.nn, or one that its constructor does not make again.
    """
    layer = _torch_class(module)
    readers = _READERS.get(layer, {})
    arguments = {}
    for name, default in _parameters(layer).items():
        value = readers[name](module) if name in readers else getattr(module, name, default)
        if name == "bias" and not isinstance(value, bool):
            value = value is not None
        arguments[name] = _encode_argument(value)
    encoded = {"class": layer.__name__, "arguments": arguments}
    _check_same(module, decode_layer(encoded, MOST_LAYERS))
    return encoded


def decode_layer(encoded: Any, most_layers: int) -> nn.Module:
    """The layer, its tensors without values on the meta device.

    Args:
        encoded: what ``encode_layer`` returned.
        most_layers: most that a stack of layers may have, those inside others multiplied.

    Raises:
        InputError: there is no such class, or it does not take these arguments.
    """
    if not isinstance(encoded, dict) or encoded.keys() != {"class", "arguments"}:
        raise InputError(f"a layer is {encoded!r}; expected its class and arguments")
    name, given = encoded["class"], encoded["arguments"]
    if not isinstance(name, str) or name not in _classes():
        raise InputError(f"{name!r} is no layer of torch.nn")
    layer = _classes()[name]
    if not isinstance(given, dict) or given.keys() - _parameters(layer).keys():
        raise InputError(f"the arguments of a {name} are {given!r}; expected {', '.join(_parameters(layer))}")
    stacked = [value for key, value in given.items() if key.endswith("_layers")]
    if any(not isinstance(count, int) or count > most_layers for count in stacked):
        raise InputError(f"a {name} has {stacked} layers; expected at most {most_layers}")
    inside = most_layers // max([1, *stacked])
    arguments = {key: _decode_argument(value, inside) for key, value in given.items()}
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice about the arguments, which whoever built the model had
            return layer(**arguments)
    except Exception as error:
        raise InputError(f"{name} does not take the arguments {given!r}: {type(error).__name__}: {error}") from error


@cache
def _classes() -> dict[str, type[nn.Module]]:
    known = {
        name: value
        for name, value in vars(nn.modules).items()
        if isinstance(value, type) and issubclass(value, nn.Module) and not name.startswith("Lazy")
    }
    known |= {layer.__name__: layer for layer in (nn.modules.linear.NonDynamicallyQuantizableLinear,)}
    return {name: value for name, value in known.items() if value not in _NO_LAYERS}


def _torch_class(module: nn.Module) -> type[nn.Module]:
    """The class of torch.nn that a module is of; a subclass that computes nothing of its own counts as that."""
    for kind in type(module).__mro__:
        if _classes().get(kind.__name__) is kind:
            return kind
        if set(vars(kind)) - {*_FREE}:
            break
    kind = type(module)
    raise InputError(f"{kind.__module__}.{kind.__qualname__} is no layer of torch.nn")


def _parameters(layer: type[nn.Module]) -> dict[str, Any]:
    """Names of the constructor's arguments, and their defaults."""
    if issubclass(layer, nn.RNNBase):
        more = {nn.LSTM: ("proj_size",), nn.RNN: ("nonlinearity",)}.get(layer, ())
        return dict.fromkeys((*_RECURRENT, *more))
    parameters = inspect.signature(layer).parameters
    return {name: entry.default for name, entry in parameters.items() if name not in _NO_ARGUMENTS}


def _encode_argument(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return {"layer": encode_layer(value)}
    if callable(value) and not isinstance(value, type):
        return {"function": function_name(value)}
    return encode(value)


def _decode_argument(value: Any, most_layers: int) -> Any:
    if isinstance(value, dict) and value.keys() == {"layer"}:
        return decode_layer(value["layer"], most_layers)
    if isinstance(value, dict) and value.keys() == {"function"}:
        return find_function(value["function"])
    return decode(value, {})


def _check_same(module: nn.Module, rebuilt: nn.Module) -> None:
    wanted, found = dict(module.named_modules()), dict(rebuilt.named_modules())
    different = sorted(wanted.keys() ^ found.keys()) or sorted(
        f"{name}.{what}".lstrip(".") for name in wanted for what in _differences(wanted[name], found[name])
    )
    if different:
        raise InputError(
            f"a {type(module).__name__} cannot be rebuilt by its constructor: {', '.join(different)} differ"
        )


def _differences(module: nn.Module, rebuilt: nn.Module) -> Iterator[str]:
    kind = type(module)
    if not isinstance(module, type(rebuilt)):
        yield "class"
    for name, value in vars(rebuilt).items():
        if name not in _GENERAL and not _equal(getattr(module, name, None), value):
            yield name
    # What the constructor does not set means nothing to the layer, unless it stands in for a method.
    yield from (name for name in vars(module) if name not in vars(rebuilt) and hasattr(kind, name))
    for held, expected in ((module._parameters, rebuilt._parameters), (module._buffers, rebuilt._buffers)):
        if {name: _shape(value) for name, value in held.items()} != {n: _shape(v) for n, v in expected.items()}:
            yield "shapes of tensors"
    if module._non_persistent_buffers_set != rebuilt._non_persistent_buffers_set:
        yield "buffers"


def _equal(left: Any, right: Any) -> bool:
    return left is right or (type(left) is type(right) and bool(left == right))


def _shape(value: Tensor | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value.shape)
