"""Calibration data in whatever form users hold it, as batches with one tensor for each input of the graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tdfx.errors import InputError, OptionError
from tdfx.signature import named_leaves

FORMS = (
    "expected a tensor, a tuple or dictionary of tensors of one length, or a list, loader or other iterable of batches"
)


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch.

    Attributes:
        index: its number, from 0.
        inputs: one tensor for each placeholder of the graph, in their order.
        labels: what the batch holds beyond the inputs: the entry if it is one, else all of them; None if nothing.
    """

    index: int
    inputs: tuple[Tensor, ...]
    labels: Any = None

    @property
    def samples(self) -> int:
        """Length of the first input's first dimension."""
        return int(next((value.shape[0] for value in self.inputs if value.dim()), 1))

    @property
    def is_divisible(self) -> bool:
        """Whether every input has one entry for each sample."""
        return all(value.dim() and len(value) == self.samples for value in self.inputs)

    def first(self, samples: int) -> Batch:
        """So many of its first samples; the batch itself if it has no more or is not divisible."""
        if samples >= self.samples or not self.is_divisible:
            return self

        def part(leaf: Any) -> Any:
            return leaf[:samples] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == self.samples else leaf

        return Batch(self.index, tuple(value[:samples] for value in self.inputs), pytree.tree_map(part, self.labels))


def batches(data: object, placeholders: Sequence[str], *, batch_size: int = 32, start: int = 0) -> Iterator[Batch]:
    """Reads data batch by batch.

    Args:
        data: a data set, which is split into batches: a tensor (n, ...), or tensors of one length n in a tuple
            (inputs in order, then labels) or in a dictionary (inputs by name, other keys are labels); or a list,
            loader or other iterable of batches. A batch is a tensor, a tuple or list (as above), a dictionary (as
            above), or a tuple whose first entry is one of these with all the inputs, the rest labels. Tensors in
            containers are found by the keys that name them, or in order.
        placeholders: names of the graph's inputs.
        batch_size: samples in a batch of a data set; iterables have batches of their own.
        start: index of the first batch to give; those before it are not read where data is a data set or a list.

    Raises:
        InputError: there is no batch, or one, which is named, has no sample, no tensors, another number of inputs
            than the graph, or NaN or Inf in an input.
        OptionError: the batch size is no positive integer.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise OptionError(f"batch_size is {batch_size!r}; expected a positive integer")
    return _batches(data, tuple(placeholders), batch_size, start)


def fitted(batch: Batch, placeholders: Sequence[str], example: Sequence[Tensor]) -> Batch:
    """The batch with floats in the precision of the example inputs.

    Raises:
        InputError: an input has not as many dimensions as the example's; names the batch.
    """
    for name, value, wanted in zip(placeholders, batch.inputs, example, strict=True):
        if value.dim() != wanted.dim():
            raise InputError(
                f"batch {batch.index} of the data: input {name} has shape {tuple(value.shape)}, the example's is "
                f"{tuple(wanted.shape)}; expected as many dimensions (in a list, each entry is a batch)"
            )
    inputs = (
        value.to(wanted.dtype) if value.is_floating_point() and wanted.is_floating_point() else value
        for value, wanted in zip(batch.inputs, example, strict=True)
    )
    return replace(batch, inputs=tuple(inputs))


def is_stored(data: object) -> bool:
    """Whether data can be read any number of times, in the same order: a data set or list."""
    return isinstance(data, Tensor | tuple | list | Mapping)


def _batches(data: object, placeholders: tuple[str, ...], batch_size: int, start: int) -> Iterator[Batch]:
    none = True
    for index, entry in enumerate(_entries(data, batch_size, start), start):
        none = False
        yield _batch(index, entry, placeholders)
    if none and not start:
        raise InputError("the data holds no batch; expected at least one sample")


def _entries(data: object, batch_size: int, start: int) -> Iterator[object]:
    if isinstance(data, list):
        return islice(data, start, None)
    if isinstance(data, Tensor | tuple | Mapping):
        return _split(dict(data) if isinstance(data, Mapping) else data, batch_size, start)
    if not isinstance(data, Iterable) or isinstance(data, str | bytes):
        raise InputError(f"the data is a {type(data).__name__}; {FORMS}")
    return islice(data, start, None)


def _split(data: Tensor | tuple[object, ...] | dict[Any, object], batch_size: int, start: int) -> Iterator[object]:
    leaves = pytree.tree_leaves(data)
    strange = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor) or not leaf.dim()]
    if strange:
        raise InputError(f"the data is one data set with a {strange[0]} that is no tensor (n, ...) in it; {FORMS}")
    lengths = {len(leaf): None for leaf in leaves}
    if len(lengths) > 1:
        raise InputError(
            f"the data is one data set of tensors of {' and '.join(map(str, lengths))} samples; expected one length "
            "(batches of their own go in a list)"
        )
    for first in range(start * batch_size, next(iter(lengths), 0), batch_size):
        yield pytree.tree_map(lambda leaf, first=first: leaf[first : first + batch_size], data)


def _batch(index: int, entry: object, placeholders: tuple[str, ...]) -> Batch:
    inputs, labels = _parts(index, entry, placeholders)
    for name, value in zip(placeholders, inputs, strict=True):
        if not isinstance(value, Tensor):
            raise InputError(f"batch {index} of the data: input {name} is a {type(value).__name__}; expected a tensor")
        if not value.numel():
            raise InputError(f"batch {index} of the data: input {name} is empty, of shape {tuple(value.shape)}")
        if not torch.isfinite(value).all():
            what = "NaN" if value.isnan().any() else "Inf"
            raise InputError(f"batch {index} of the data: input {name} holds {what}; expected finite numbers")
    if len(labels) == 1:
        return Batch(index, tuple(inputs), next(iter(labels.values() if isinstance(labels, dict) else labels)))
    return Batch(index, tuple(inputs), labels or None)


def _parts(
    index: int, entry: object, placeholders: tuple[str, ...]
) -> tuple[Sequence[Any], tuple[Any, ...] | dict[Any, Any]]:
    """Inputs in order and labels, not yet looked at."""
    if isinstance(entry, Tensor):
        entry = (entry,)
    if isinstance(entry, Mapping):
        if not all(name in entry for name in placeholders):
            entry = named_leaves(dict(entry))
        missing = [name for name in placeholders if name not in entry]
        if missing:
            raise InputError(
                f"batch {index} of the data holds {', '.join(map(str, entry)) or 'nothing'}; expected also "
                f"{', '.join(missing)}, as the network's inputs are called"
            )
        return [entry[name] for name in placeholders], {k: v for k, v in entry.items() if k not in placeholders}
    if not isinstance(entry, tuple | list):
        raise InputError(
            f"batch {index} of the data is a {type(entry).__name__}; expected a tensor, a tuple of tensors or a "
            "dictionary of tensors"
        )
    nested = [value for value in entry[: len(placeholders)] if isinstance(value, tuple | list | Mapping)]
    if nested and (nested[0] is not entry[0] or len(pytree.tree_leaves(entry[0])) < len(placeholders)):
        return _taken_apart(entry, placeholders)
    if entry and isinstance(entry[0], tuple | list | Mapping):
        inputs, labels = _parts(index, entry[0], placeholders)
        return inputs, (*(labels.values() if isinstance(labels, dict) else labels), *entry[1:])
    if len(entry) < len(placeholders):
        raise InputError(
            f"batch {index} of the data holds {len(entry)} tensors; the network has {len(placeholders)} inputs "
            f"({', '.join(placeholders)})"
        )
    return entry[: len(placeholders)], tuple(entry[len(placeholders) :])


def _taken_apart(entry: Sequence[object], placeholders: tuple[str, ...]) -> tuple[list[Any], tuple[Any, ...]]:
    """Inputs and labels of arguments with containers among them: by name from dictionaries, the others in order."""
    found: dict[str, Any] = {}
    for index, value in enumerate(entry):
        inner = named_leaves(value) if isinstance(value, Mapping) else dict(enumerate(pytree.tree_leaves(value)))
        found |= {key if key in placeholders else f"{index} {key}": leaf for key, leaf in inner.items()}
    others = iter([key for key in found if key not in placeholders])
    keys = [name if name in found else next(others, "") for name in placeholders]
    return [found.get(key) for key in keys], tuple(found[key] for key in others)
