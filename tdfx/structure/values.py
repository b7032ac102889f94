"""Constants of a graph as JSON and back.

JSON's own values stand for themselves and lists for lists; all else is an object of one key, which says what it is:
``{"tuple": [1, 2]}``, ``{"node": "conv1"}``, ``{"dtype": "float32"}``, ``{"float": "inf"}``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from tdfx.errors import InputError

DEEPEST = 20
_CONSTANTS: dict[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
_NAMED: dict[str, dict[str, Any]] = {
    kind: {name: value for name, value in vars(torch).items() if type(value) is constant}
    for kind, constant in _CONSTANTS.items()
}
_UNUSUAL = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
DTYPES: Mapping[str, torch.dtype] = _NAMED["dtype"]


def encode(value: Any) -> Any:
    """A constant, or a node reference, as a JSON value.

    Raises:
        InputError: JSON has no words for a value of this type.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [encode(entry) for entry in value]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return {"tuple": [encode(entry) for entry in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(entry)] for key, entry in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(value.start), encode(value.stop), encode(value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if type(value) is complex and math.isfinite(abs(value)):
        return {"complex": [value.real, value.imag]}
    for kind, constant in _CONSTANTS.items():
        if isinstance(value, constant):
            return {kind: str(value).removeprefix("torch.")}
    raise InputError(f"{value!r} of type {type(value).__name__} has no form in JSON")


def decode(value: Any, nodes: Mapping[str, fx.Node], depth: int = 0) -> Any:
    """What ``encode`` was given.

    Args:
        value: the JSON value.
        nodes: the nodes that come before, by name.
        depth: how many values this one lies in.

    Raises:
        InputError: ``encode`` writes no such thing.
    """
    if depth > DEEPEST:
        raise InputError(f"a constant is nested more than {DEEPEST} deep")

    def inner(entry: Any) -> Any:
        return decode(entry, nodes, depth + 1)

    if isinstance(value, list):
        return [inner(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise InputError(f"{value!r} is no constant; expected one key")
    ((kind, content),) = value.items()
    if kind == "node":
        return _named(nodes, content, "node before this one")
    if kind in _NAMED:
        return _named(_NAMED[kind], content, f"torch.{kind}")
    if kind == "float":
        return _named(_UNUSUAL, content, "float")
    if kind == "device" and isinstance(content, str):
        return torch.device(content)
    if kind == "ellipsis":
        return ...
    if kind in _CONTAINERS and isinstance(content, list):
        return _CONTAINERS[kind](content, inner)
    raise InputError(f"{kind!r} is no kind of constant")


def _dict(content: list[Any], inner: Callable[[Any], Any]) -> dict[Any, Any]:
    decoded = {inner(key): inner(entry) for key, entry in content}
    if not all(key is None or isinstance(key, str | int | float) for key in decoded):
        raise InputError("a dictionary's key is no string or number")
    return decoded


def _complex(content: list[Any], inner: Callable[[Any], Any]) -> complex:
    real, imaginary = content
    return complex(float(real), float(imaginary))


_CONTAINERS: dict[str, Callable[[list[Any], Callable[[Any], Any]], Any]] = {
    "tuple": lambda content, inner: tuple(inner(entry) for entry in content),
    "slice": lambda content, inner: slice(*(inner(entry) for entry in content)),
    "dict": _dict,
    "complex": _complex,
}


def _named(known: Mapping[str, Any], name: object, what: str) -> Any:
    if not isinstance(name, str) or name not in known:
        raise InputError(f"there is no {what} of the name {name!r}")
    return known[name]
