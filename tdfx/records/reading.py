"""Reads JSON into frozen dataclasses, every field checked against its type annotation."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tdfx.errors import PlanError, TdfxError

T = TypeVar("T")
MAY_BE_MISSING = (
    "notes", "caveat", "measured", "quantization", "output_padding", "lookup", "tied", "peak_activation_bytes",
    "capture", "sizes", "coverage",
)  # fmt: skip
"""What a person who writes a plan may leave out, and what is seldom there."""


def parse(text: str, what: str, error: type[TdfxError] = PlanError) -> dict[str, Any]:
    """The JSON object that a text holds.

    Raises:
        PlanError (or ``error``): it is no JSON, or another value than an object.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as caught:
        raise error(f"{what} is no JSON: {caught}") from caught
    if not isinstance(values, dict):
        raise error(f"{what} is a JSON {type(values).__name__}; expected an object")
    return values


def read_text(record: type[T], text: str, name: str, version: int) -> T:
    """A frozen dataclass from the JSON text that ``to_text`` wrote or a person edited.

    Args:
        record: the dataclass.
        text: the JSON.
        name: what it is called in messages, e.g. "plan".
        version: the one that is understood.

    Raises:
        PlanError: naming the field that is missing, unknown or of the wrong type, or the version.
    """
    values = parse(text, f"the {name}")
    found = values.pop("version", None)
    if type(found) is not int or found != version:
        raise PlanError(f"the {name} has version {found!r}; this tdfx reads version {version}: make the {name} anew")
    return read(record, values, name)


def read(record: type[T], values: object, where: str, error: type[TdfxError] = PlanError) -> T:
    """A frozen dataclass from a JSON object; records inside records, tuples, dictionaries and unions are read too.

    Whole and floating-point numbers must be 0 or more, as all sizes, costs and errors are, and those of a ``Rank``
    positive. Fields of type ``Any`` are taken as they are.

    Args:
        record: the dataclass.
        values: what ``json.loads`` returned.
        where: name of the value, for messages.
        error: class of the errors raised.

    Raises:
        PlanError (or ``error``): naming the field that is missing, unknown or of the wrong type.
    """
    if not isinstance(values, dict):
        raise error(f"{where} is {values!r}; expected an object")
    hints = _hints(record)  # type: ignore[arg-type]  # mypy takes no class for hashable
    unknown = [name for name in values if name not in hints]
    missing = [name for name in hints if name not in values and name not in MAY_BE_MISSING]
    if unknown or missing:
        named = (("unknown", unknown), ("missing", missing))
        problems = "; ".join(f"{what} {', '.join(map(repr, names))}" for what, names in named if names)
        raise error(f"{where}: {problems}; expected are {', '.join(hints)}")
    return record(**{name: _value(hints[name], value, f"{where}.{name}", error) for name, value in values.items()})


def _value(hint: Any, value: object, where: str, error: type[TdfxError]) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _either(inner, value, where, error)
    if origin is tuple:
        if not isinstance(value, list):
            raise error(f"{where} is {value!r}; expected a list")
        return tuple(_value(inner[0], entry, f"{where}[{index}]", error) for index, entry in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise error(f"{where} is {value!r}; expected an object")
        return {key: _value(inner[1], entry, f"{where}[{key!r}]", error) for key, entry in value.items()}
    if origin is Literal:
        if value not in inner or type(value) not in map(type, inner):
            raise error(f"{where} is {value!r}; expected one of {', '.join(map(repr, inner))}")
        return value
    if isinstance(hint, type) and is_dataclass(hint):
        return read(hint, value, where, error)
    holds, expected = _SCALARS[hint]
    if not holds(value):
        raise error(f"{where} is {value!r}; expected {expected}")
    return value


def _either(kinds: tuple[Any, ...], value: object, where: str, error: type[TdfxError]) -> Any:
    if value is None and type(None) in kinds:
        return None
    failures = []
    for kind in (kind for kind in kinds if kind is not type(None)):
        try:
            return _value(kind, value, where, error)
        except error as failure:
            failures.append(failure)
    raise error("; or ".join(map(str, failures)))


@cache
def _hints(record: type) -> dict[str, Any]:
    hints = get_type_hints(record, localns={"Rank": tuple[_Positive, ...]}, include_extras=True)
    return {field.name: hints[field.name] for field in fields(record)}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    # JSON has no bounds and Python's reader takes NaN and Infinity.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


_Positive = Annotated[int, "positive"]
Signed = Annotated[float, "of any sign"]
_SCALARS: dict[Any, tuple[Callable[[object], bool], str]] = {
    str: (lambda value: isinstance(value, str), "a string"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
    int: (_is_int, "a whole number of 0 or more"),
    _Positive: (lambda value: _is_int(value) and value != 0, "a positive whole number"),
    float: (_is_number, "a finite number of 0 or more"),
    Signed: (lambda value: _is_number(abs(value) if isinstance(value, int | float) else value), "a finite number"),
}
