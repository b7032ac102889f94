"""Sizes of inputs that stay free, by the names of their dimensions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tdfx.contained import reason
from tdfx.errors import InputError, OptionError

BATCH = "batch"
Dynamic = str | Mapping[str, Mapping[int, str | None]] | None
Axes = dict[str, dict[int, str]]
"""Names of the free dimensions of each input that has some."""


def check_dynamic(dynamic: object) -> None:
    """Raises OptionError unless this is "batch", None, or names of dimensions by input."""
    if dynamic in (BATCH, None):
        return
    if not isinstance(dynamic, Mapping) or not all(isinstance(dims, Mapping) for dims in dynamic.values()):
        raise OptionError(
            f"dynamic is {dynamic!r}; expected 'batch' (any batch size), None (sizes as given) or names of dimensions "
            'by argument, as {"input_ids": {1: "sequence"}}'
        )
    for argument, dims in dynamic.items():
        for dim, name in dims.items():
            is_name = name is None or (isinstance(name, str) and name.isidentifier())
            if type(dim) is not int or not is_name or not isinstance(argument, str):
                raise OptionError(
                    f"dynamic[{argument!r}] has {dim!r}: {name!r}; expected a dimension and its name, an identifier, "
                    "or None for one that is fixed"
                )


def free_axes(dynamic: Dynamic, inputs: Mapping[str, Tensor]) -> Axes:
    """The free dimensions of inputs by name.

    Args:
        dynamic: "batch" is dimension 0 of the first input that has dimensions, and of those with the same size there;
            a mapping names more, or with None takes one of these out; None leaves no dimension free.
        inputs: tensors by name.

    Raises:
        OptionError: ``dynamic`` is not understood.
        InputError: there is no such input or dimension, or one name stands for two sizes.
    """
    check_dynamic(dynamic)
    if dynamic is None:
        return {}
    batch = next((len(value) for value in inputs.values() if value.dim()), None)
    axes = {name: {0: BATCH} for name, value in inputs.items() if value.dim() and len(value) == batch}
    asked = {} if isinstance(dynamic, str) else dynamic
    for argument, dims in asked.items():
        if argument not in inputs:
            raise InputError(f"dynamic names {argument!r}; the inputs are {', '.join(inputs) or 'none'}")
        shape = tuple(inputs[argument].shape)
        for dim, name in dims.items():
            if not -len(shape) <= dim < len(shape):
                raise InputError(f"dynamic names dimension {dim} of {argument}, which has shape {shape}")
            axes.setdefault(argument, {})[dim % len(shape)] = name  # type: ignore[assignment]
    axes = {name: {dim: text for dim, text in dims.items() if text is not None} for name, dims in axes.items()}
    sizes(axes, inputs)
    return {name: dims for name, dims in axes.items() if dims}


def sizes(axes: Axes, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """Sizes by name.

    Raises:
        InputError: one name stands for two sizes.
    """
    found: dict[str, int] = {}
    for argument, dims in axes.items():
        for dim, name in dims.items():
            size = inputs[argument].shape[dim]
            if found.setdefault(name, size) != size:
                raise InputError(
                    f"dynamic: {name} is {found[name]} and, as dimension {dim} of {argument}, {size}; give inputs "
                    "where it is one size, or dimensions of other sizes other names"
                )
    return found


def resized(axes: Axes, inputs: Mapping[str, Tensor], wanted: Mapping[str, int]) -> dict[str, Tensor]:
    """Copies of inputs with other sizes by name; further entries repeat the first ones.

    Repeats of floating-point entries shrink by 1/64 each time, to tell entries apart without leaving their range.
    """
    return {name: _resized(value, axes.get(name, {}), wanted) for name, value in inputs.items()}


def _resized(value: Tensor, dims: Mapping[int, str], wanted: Mapping[str, int]) -> Tensor:
    value = value.detach().clone()
    for dim, name in dims.items():
        before, after = value.shape[dim], wanted.get(name, value.shape[dim])
        if before == after:
            continue
        index = torch.arange(after, device=value.device)
        value = value.index_select(dim, index % before)
        if value.is_floating_point():
            scale = 1 - (index // before) / 64
            value = value * scale.to(value.dtype).reshape(-1, *[1] * (value.dim() - 1 - dim))
    return value


def other_sizes(axes: Axes, inputs: Mapping[str, Tensor], runs: Callable[[dict[str, Tensor]], Any]) -> dict[str, int]:
    """For each name but the batch's another size, found in turn, on which all of them together run.

    Raises:
        InputError: a name has none; says what happened at the first one tried.
    """
    given = sizes(axes, inputs)
    found: dict[str, int] = {}
    for name in given:
        if name == BATCH:
            continue
        failures = []
        for size in _others(given[name]):
            try:
                runs(resized(axes, inputs, {**found, name: size}))
            except Exception as error:
                failures.append(f"{size} ({reason(error)})")
                continue
            found[name] = size
            break
        else:
            raise InputError(
                f"dynamic: the network runs with {name} = {given[name]}, but not with {'; '.join(failures[:1])} or "
                "others near it; leave it out of dynamic, or give inputs from which its size can be doubled or halved"
            )
    return found


def _others(size: int) -> Iterator[int]:
    yield from dict.fromkeys(other for other in (2 * size, size // 2, size + 1, size - 1) if 0 < other != size)
