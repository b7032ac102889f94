"""Data that is read more than once: the same batches in the same order each time, known by their digests."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import safe_open
from torch import Tensor

from tdfx.data import Batch, batches, is_stored
from tdfx.errors import InputError
from tdfx.files import replacing
from tdfx.fingerprint import tensor_digest


class Replay:
    """Batches by number.

    Loaders and other iterables may give their batches once only, or in another order each time. They are read once,
    and their batches are kept as safetensors files where a folder is given; without one, only the batch that comes
    next (and the first one, until then) can be read.

    Args:
        data: as for ``batches``.
        placeholders: as for ``batches``.
        batch_size: as for ``batches``.
        samples: how many to read at most; None for all.
        with_labels: whether labels are kept, and count in the digests.
    """

    def __init__(
        self, data: object, placeholders: Sequence[str], *, batch_size: int, samples: int | None, with_labels: bool
    ) -> None:
        self.data, self.placeholders, self.batch_size = data, tuple(placeholders), batch_size
        self.samples, self.with_labels = samples, with_labels
        self.stored = is_stored(data)
        self._live = iter(()) if self.stored else batches(data, placeholders, batch_size=batch_size)
        self._sizes: list[int] = []  # of the batches met so far
        self._digests: list[str] = []
        self._digesting = False
        self._folder: Path | None = None
        self._first: Batch | None = None

    def keep_in(self, folder: Path) -> None:
        """Keeps batches in files from here on, unless the data can be read again as it is."""
        if self.stored:
            return
        self._folder = folder
        if self._first is not None:
            _write(folder, self._first)
            self._first = None

    def touch(self) -> None:
        """Marks the folder as in use, which reading from it does not."""
        if self._folder is not None and self._folder.exists():
            os.utime(self._folder)

    def read(self, start: int = 0) -> Iterator[Batch]:
        """The batches from this number on.

        Raises:
            InputError: as for ``batches``; or labels cannot be kept.
        """
        while (batch := self._get(start)) is not None:
            yield batch
            start += 1

    def digests(self, count: int | None = None) -> list[str]:
        """Hashes of the first ``count`` batches, fewer if there are no more; of all for None."""
        self._digesting = True
        while count is None or len(self._digests) < count:
            batch = self._get(len(self._digests))
            if batch is None:
                break
            if len(self._digests) == batch.index:
                self._digests.append(_digest(batch))
        return self._digests[:count]

    def _get(self, index: int) -> Batch | None:
        if index < len(self._sizes):
            return self._again(index)
        left = None if self.samples is None else self.samples - sum(self._sizes)
        batch = next(self._stored(index) if self.stored else self._live, None) if left != 0 else None
        if batch is None:
            return None
        batch = batch if left is None else batch.first(left)
        batch = batch if self.with_labels else Batch(batch.index, batch.inputs)
        self._sizes.append(batch.samples if left is None else min(left, batch.samples))
        if self._digesting and len(self._digests) == index:  # now, rather than from its file
            self._digests.append(_digest(batch))
        if self._folder is not None:
            _write(self._folder, batch)
        elif not self.stored and index == 0:
            self._first = batch
        return batch

    def _again(self, index: int) -> Batch:
        if self.stored:
            batch = next(self._stored(index)).first(self._sizes[index])
            return batch if self.with_labels else Batch(batch.index, batch.inputs)
        if self._folder is not None:
            return _read(self._folder, index)
        assert self._first is not None and index == 0
        return self._first

    def _stored(self, index: int) -> Iterator[Batch]:
        return batches(self.data, self.placeholders, batch_size=self.batch_size, start=index)


def _path(folder: Path, index: int) -> Path:
    return folder / f"batch-{index:08}.safetensors"


def _write(folder: Path, batch: Batch) -> None:
    labels = _named_labels(batch)
    tensors = {f"input:{index}": value for index, value in enumerate(batch.inputs)}
    tensors |= {f"label:{name}": value for name, value in labels.items()}
    about = {"labels": type(batch.labels).__name__, "names": [str(name) for name in labels]}
    with replacing(_path(folder, batch.index)) as staged:
        owned = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        safetensors.torch.save_file(owned, staged, {"about": json.dumps(about)})


def _read(folder: Path, index: int) -> Batch:
    with safe_open(_path(folder, index), "pt") as archive:
        about = json.loads(archive.metadata()["about"])
        tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
    labels = {name: tensors.pop(f"label:{name}") for name in about["names"]}
    inputs = tuple(tensors[f"input:{number}"] for number in range(len(tensors)))
    if about["labels"] == "dict":
        return Batch(index, inputs, labels)
    values = tuple(labels.values())
    forms: dict[str, Any] = {"tuple": values, "list": list(values), "NoneType": None}
    return Batch(index, inputs, forms.get(about["labels"], next(iter(values), None)))


def _named_labels(batch: Batch) -> dict[Any, Tensor]:
    labels = batch.labels
    if labels is None:
        return {}
    if isinstance(labels, tuple | list):
        named: dict[Any, Any] = dict(enumerate(labels))
    else:
        named = dict(labels) if isinstance(labels, dict) else {"": labels}
    strange = [type(value).__name__ for value in named.values() if not isinstance(value, Tensor)]
    if strange:
        raise InputError(
            f"batch {batch.index} of the data: a label is a {strange[0]}; a loader's labels are kept in files, which "
            "takes tensors: give tensors, or the data as a list of batches"
        )
    return named


def _digest(batch: Batch) -> str:
    digest = hashlib.sha256()
    for value in batch.inputs:
        digest.update(tensor_digest(value).encode())
    for name, value in _named_labels(batch).items():
        digest.update(f"{name} {tensor_digest(value)}".encode())
    return digest.hexdigest()[:32]
