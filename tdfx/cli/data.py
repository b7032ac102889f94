"""Calibration data that the command line names: files of arrays, a folder of images, or Python that makes a loader.

Arrays are read without running code; Python is run only where the user names it.
"""

from __future__ import annotations

import pickle
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdfx.errors import InputError
from tdfx.loading import module_from_file, module_named, one_line

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
FORMS = "expected a file .npy, .npz or .pt, a folder of images, or package.module:function or file.py:function"


def load_data(
    text: str,
    placeholders: Sequence[str],
    example_shapes: Sequence[Sequence[int]],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> object:
    """Reads what ``--data`` names.

    Args:
        text: a ``.npy`` file (n, ...); a ``.npz`` file with arrays under the inputs' names (others are labels), or with
            arrays for the inputs in their order; a ``.pt`` file of ``torch.save`` with tensors; a folder of images, in
            any depth; or ``package.module:function`` or ``file.py:function``, which returns a loader or tensors.
        placeholders: names of the network's inputs.
        example_shapes: of the example inputs; images are resized to the first, (N, C, H, W), and scaled to 0..1.
        mean: of each channel, subtracted from images.
        std: of each channel, that images are divided by after it.

    Returns:
        Data as ``tdfx.data.batches`` takes it.

    Raises:
        InputError: nothing of this name can be read; names it.
    """
    path = Path(text)
    if path.is_dir():
        return _images(path, placeholders, example_shapes, mean, std)
    if mean is not None or std is not None:
        raise InputError(f"data {text}: mean and std are for folders of images; normalize other data beforehand")
    readers = {".npy": _read_npy, ".npz": _read_npz, ".pt": _read_pt}
    if path.suffix in readers:
        if not path.is_file():
            raise InputError(f"data {text}: there is no such file")
        return readers[path.suffix](path, placeholders)
    if ":" not in text:
        found = "is a file of another kind" if path.exists() else "there is no such file or folder"
        raise InputError(f"data {text}: {found}; {FORMS}")
    return _call(text)


@dataclass(frozen=True)
class ImageFolder:
    """Images in batches (n, C, H, W), float32, read as they are needed.

    Attributes:
        paths: in an order of their own, so that the first ones are of all folders.
        channels, height, width: of each.
        mean: by channel.
        std: by channel.
        batch_size: images in a batch.
    """

    paths: tuple[Path, ...]
    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_size: int = 32

    def __len__(self) -> int:
        return -(-len(self.paths) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        for first in range(0, len(self.paths), self.batch_size):
            images = [self._read(path) for path in self.paths[first : first + self.batch_size]]
            yield (torch.stack(images) - mean) / std

    def _read(self, path: Path) -> Tensor:
        from PIL import Image

        try:
            with Image.open(path) as image:
                resized = image.convert(MODES[self.channels]).resize(
                    (self.width, self.height), Image.Resampling.BILINEAR
                )
        except Exception as error:  # whatever a broken file makes Pillow raise
            raise InputError(f"data {path}: it cannot be read as an image ({one_line(error)}); remove it") from error
        pixels = torch.from_numpy(np.array(resized, dtype=np.float32) / 255)
        return pixels.reshape(self.height, self.width, self.channels).permute(2, 0, 1)


def _images(
    folder: Path,
    placeholders: Sequence[str],
    example_shapes: Sequence[Sequence[int]],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> ImageFolder:
    shape = tuple(example_shapes[0]) if example_shapes else ()
    if len(placeholders) != 1 or len(shape) != 4 or shape[1] not in MODES:
        raise InputError(
            f"data {folder}: images are for a network with one input (N, 1, 3 or 4 channels, H, W); this one takes "
            f"{', '.join(f'{n} {tuple(s)}' for n, s in zip(placeholders, example_shapes, strict=False))}"
        )
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise InputError(f"data {folder}: reading images takes Pillow; install it with pip install pillow") from error
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES and path.is_file())
    if not paths:
        raise InputError(f"data {folder}: the folder holds no image; expected {', '.join(IMAGES)}")
    random.Random(0).shuffle(paths)
    channels, height, width = shape[1:]
    return ImageFolder(
        tuple(paths),
        channels,
        height,
        width,
        _by_channel(folder, "mean", mean, channels, 0.0),
        _by_channel(folder, "std", std, channels, 1.0),
    )


def _by_channel(
    folder: Path, name: str, values: Sequence[float] | None, channels: int, default: float
) -> tuple[float, ...]:
    found = (default,) * channels if values is None else tuple(values)
    if len(found) != channels or (name == "std" and min(found) <= 0):
        positive = "positive " if name == "std" else ""
        raise InputError(
            f"data {folder}: {name} is {found}; expected a {positive}number for each of {channels} channels"
        )
    return found


def _read_npy(path: Path, placeholders: Sequence[str]) -> object:
    return _tensor(path, _load(path))


def _read_npz(path: Path, placeholders: Sequence[str]) -> object:
    with _load(path) as archive:
        arrays = {name: _tensor(path, _member(path, archive, name)) for name in archive.files}
    if all(name in arrays for name in placeholders):
        return arrays
    if len(arrays) < len(placeholders):
        raise InputError(
            f"data {path}: it holds {', '.join(arrays) or 'nothing'}; expected arrays for {', '.join(placeholders)}"
        )
    return next(iter(arrays.values())) if len(arrays) == 1 else tuple(arrays.values())


def _read_pt(path: Path, placeholders: Sequence[str]) -> object:
    wanted = "expected a tensor, a tuple or list of tensors, or a dictionary of tensors"
    try:
        with warnings.catch_warnings():  # torch warns of unknown pickles; what follows is an error anyway
            warnings.simplefilter("ignore")
            found: object = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"data {path}: refused, since reading it could run code; {wanted}") from error
    except Exception as error:
        raise InputError(f"data {path}: cannot be read ({one_line(error)}); {wanted}") from error
    if not isinstance(found, Tensor | tuple | list | Mapping):
        raise InputError(f"data {path}: found a {type(found).__name__}; {wanted}")
    return found


def _load(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except Exception as error:
        raise InputError(f"data {path}: cannot be read ({one_line(error)}); expected arrays of numbers") from error


def _member(path: Path, archive: Any, name: str) -> Any:
    try:
        return archive[name]
    except Exception as error:
        raise InputError(
            f"data {path}: {name} cannot be read ({one_line(error)}); expected arrays of numbers"
        ) from error


def _tensor(path: Path, array: Any) -> Tensor:
    if not isinstance(array, np.ndarray):
        raise InputError(f"data {path}: found a {type(array).__name__}; expected an array")
    try:
        return torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")))
    except TypeError as error:
        raise InputError(f"data {path}: found an array of {array.dtype}; expected numbers") from error


def _call(text: str) -> object:
    source, _, attribute = text.rpartition(":")
    if not source or not attribute:
        raise InputError(f"data {text!r}: {FORMS}")
    try:
        module = module_from_file(text, Path(source)) if source.endswith(".py") else module_named(text, source)
    except InputError as error:
        raise InputError(str(error).replace("model", "data", 1)) from error
    try:
        found = attrgetter(attribute)(module)
    except AttributeError as error:
        raise InputError(f"data {text!r}: {source} has no {attribute!r}") from error
    if not callable(found):
        return found
    try:
        return found()
    except (Exception, SystemExit) as error:
        raise InputError(f"data {text!r}: calling {attribute}() raised {one_line(error)}") from error
