"""Example inputs: checked once, carried as a tuple of tensors and a dictionary of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tdfx.errors import InputError

Inputs = Tensor | Sequence[Tensor]


def as_args(example_inputs: object) -> tuple[Tensor, ...]:
    """A tensor or sequence of tensors as a tuple.

    Raises:
        InputError: naming the first entry that is no tensor.
    """
    values = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    if not isinstance(values, tuple | list):
        raise InputError(
            f"example_inputs is a {type(values).__name__}; expected a tensor or a tuple of tensors, "
            "as the model's forward takes them (keyword arguments go to example_kwargs)"
        )
    for index, value in enumerate(values):
        if not isinstance(value, Tensor):
            raise InputError(f"example_inputs[{index}] is a {type(value).__name__}; expected a tensor")
    return tuple(values)


def as_kwargs(example_kwargs: object) -> dict[str, Tensor]:
    """A dictionary of tensors, empty for None.

    Raises:
        InputError: naming the first entry that is no tensor.
    """
    if example_kwargs is None:
        return {}
    if not isinstance(example_kwargs, Mapping):
        raise InputError(f"example_kwargs is a {type(example_kwargs).__name__}; expected a dictionary of tensors")
    for name, value in example_kwargs.items():
        if not isinstance(value, Tensor):
            raise InputError(f"example_kwargs[{name!r}] is a {type(value).__name__}; expected a tensor")
    return dict(example_kwargs)


def run(module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> list[Tensor]:
    """The module's output tensors, out of containers and dataclasses.

    It runs without gradients, with random numbers seeded and the caller's kept, on copies of the inputs, since a module
    may write into what it is given.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        copies = {name: value.clone() for name, value in kwargs.items()}
        output: Any = module(*(value.clone() for value in args), **copies)
    return list(tensors(output))


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a network's output, out of containers and dataclasses."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            for field in fields(leaf):
                yield from tensors(getattr(leaf, field.name))
