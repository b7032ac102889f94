"""Example inputs: checked once, carried as positional and keyword arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tdfx.errors import InputError
from tdfx.passes.in_place import InPlace
from tdfx.passes.opaque import taken_apart
from tdfx.signature import named_leaves

Inputs = Tensor | Sequence[Any]
CONSTANTS = (int, float, bool, str, type(None))
EXPECTED = "a tensor, a number, a string, None, or a tuple, list or dictionary of these"


def as_call(example_inputs: object, example_kwargs: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call; None for the former where there are the latter alone.

    Raises:
        InputError: as ``as_args`` and ``as_kwargs`` do.
    """
    kwargs = as_kwargs(example_kwargs)
    return as_args(() if example_inputs is None and kwargs else example_inputs), kwargs


def as_args(example_inputs: object) -> tuple[Any, ...]:
    """A tensor, or a sequence of arguments, as a tuple of positional arguments.

    Raises:
        InputError: naming the first value that a network cannot be called with here.
    """
    values = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    if not isinstance(values, tuple | list):
        raise InputError(
            f"example_inputs is a {type(values).__name__}; expected a tensor or a tuple of arguments, "
            "as the model's forward takes them (keyword arguments go to example_kwargs)"
        )
    return tuple(_checked(f"example_inputs[{index}]", value) for index, value in enumerate(values))


def as_kwargs(example_kwargs: object) -> dict[str, Any]:
    """A dictionary of keyword arguments, empty for None.

    Raises:
        InputError: naming the first value that a network cannot be called with here.
    """
    if example_kwargs is None:
        return {}
    if not isinstance(example_kwargs, Mapping):
        raise InputError(f"example_kwargs is a {type(example_kwargs).__name__}; expected a dictionary of arguments")
    return {name: _checked(f"example_kwargs[{name!r}]", value) for name, value in example_kwargs.items()}


def _checked(where: str, value: Any) -> Any:
    for path, leaf in pytree.tree_flatten_with_path(value)[0]:
        if not isinstance(leaf, (Tensor, *CONSTANTS)):
            raise InputError(f"{where}{pytree.keystr(path)} is a {type(leaf).__name__}; expected {EXPECTED}")
    return value


def run(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The module's output tensors, out of containers and dataclasses; it runs as for ``outcome``."""
    return list(tensors(outcome(module, args, kwargs)))


def outcome(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the module returns.

    It runs without gradients, with random numbers seeded and the caller's kept, on copies of the inputs, since a module
    may write into what it is given; where it runs in place, on one of the module too, which may write into itself.
    """
    if isinstance(module, InPlace):
        module = module.forked()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        copies = pytree.tree_map_only(Tensor, torch.clone, (tuple(args), dict(kwargs)))
        return module(*copies[0], **copies[1])


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a network's output, out of containers and dataclasses."""
    return (leaf for leaf in opened(value) if isinstance(leaf, Tensor))


def opened(value: Any) -> Iterator[Any]:
    """All that is in containers and dataclasses, such as torch does not know among them; of objects, the tensors."""
    yield from pytree.tree_leaves(_plain(value))


def named_outputs(value: Any) -> dict[str, Any]:
    """As ``opened``, by names: keys and fields, "output" for what has none, with its place in a tuple or list."""
    plain = _plain(value)
    if isinstance(plain, dict):
        plain = {f"output_{key}" if str(key).isdecimal() else key: inner for key, inner in plain.items()}
    return named_leaves(plain if isinstance(plain, dict) else {"output": plain})


def _plain(value: Any) -> Any:
    """The same leaves in lists and dictionaries alone."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        value = dict(zip(value._fields, value, strict=True))
    inner = entries(value)
    if inner is not None:
        return {key: _plain(part) for key, part in inner.items()}
    if isinstance(value, Tensor):
        return value
    leaves = list(value) if isinstance(value, tuple | list) else pytree.tree_leaves(value)
    if len(leaves) != 1 or leaves[0] is not value:
        return [_plain(leaf) for leaf in leaves]
    return parts[1] if (parts := taken_apart(value)) is not None else value


def entries(value: Any) -> dict[str, Any] | None:
    """Fields of a dataclass or entries of a mapping by name; None for anything else."""
    if isinstance(value, Mapping):
        return dict(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value) if field.init}
    return None
