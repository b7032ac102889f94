"""ONNX files side by side: how fast each runs, and how far its outputs are from the first file's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from tdfx.contained import reason
from tdfx.errors import InputError, OptionError
from tdfx.inputs import Inputs, as_args, as_kwargs
from tdfx.latency import runner
from tdfx.loading import DTYPES, draw_inputs
from tdfx.parity import differences
from tdfx.records.inputs import InputSpec
from tdfx.tables import align, seconds
from tdfx.timing import interleaved_times, open_session

DRAWN = [dtype for dtype in runner.DTYPES.values() if dtype in DTYPES]


@dataclass(frozen=True)
class BenchRow:
    """One file, compared with the first.

    Attributes:
        path: the file, as given.
        median_s: median seconds of one run.
        speed: median over the rounds of the first file's seconds divided by this one's; above 1 is faster.
        speed_quartiles: lower and upper quartile of the same.
        max_rel_diff: largest difference of an output divided by the largest magnitude of the first file's; None
            where the outputs cannot be compared.
        mismatch: why not, "" where they can.
    """

    path: str
    median_s: float
    speed: float
    speed_quartiles: tuple[float, float]
    max_rel_diff: float | None
    mismatch: str


@dataclass(frozen=True)
class Bench:
    """Files that took turns on the same inputs; prints as a table.

    Attributes:
        rows: one for each file, in the order given.
        inputs: names, shapes and dtypes of what they ran on; names as in the first file.
        threads: of ONNX Runtime, within operators.
        rounds: timed runs of each file.
        onnxruntime: its version.
    """

    rows: tuple[BenchRow, ...]
    inputs: tuple[InputSpec, ...]
    threads: int
    rounds: int
    onnxruntime: str

    def __str__(self) -> str:
        lines = [
            (
                row.path,
                seconds(row.median_s),
                f"{row.speed:.2f}x",
                "{:.2f} to {:.2f}".format(*row.speed_quartiles),
                row.mismatch if row.max_rel_diff is None else f"{row.max_rel_diff:.2g}",
            )
            for row in self.rows
        ]
        inputs = ", ".join(f"{entry.name} {'x'.join(map(str, entry.shape))}:{entry.dtype}" for entry in self.inputs)
        return (
            f"{align(('file', 'median', 'speed', 'quartiles', 'difference'), lines, right=range(1, 5))}\n"
            f"{self.rounds} rounds on {inputs or 'no input'}; ONNX Runtime {self.onnxruntime}, threads: {self.threads}"
        )


@dataclass(frozen=True)
class _Declared:
    """An input as a file declares it; open sizes are names or None, an unknown dtype is ONNX Runtime's name."""

    name: str
    dtype: str
    sizes: tuple[int | str | None, ...]

    def __str__(self) -> str:
        sizes = "x".join("?" if size is None else str(size) for size in self.sizes)
        return f"{self.name} {sizes or 'scalar'}:{self.dtype}"

    def agrees(self, other: _Declared) -> bool:
        """Whether there are tensors that both take; names do not count."""
        return (self.dtype, len(self.sizes)) == (other.dtype, len(other.sizes)) and all(
            a == b or not isinstance(a, int) or not isinstance(b, int)
            for a, b in zip(self.sizes, other.sizes, strict=True)
        )

    def filled(self, other: _Declared) -> _Declared:
        """With open sizes that the other fixes."""
        sizes = (b if isinstance(b, int) else a for a, b in zip(self.sizes, other.sizes, strict=True))
        return replace(self, sizes=tuple(sizes))


def bench(
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    inputs: Inputs | Mapping[str, Tensor] | None = None,
    *,
    batch: int = 1,
    threads: int = 1,
    rounds: int = 200,
    seed: int = 0,
) -> Bench:
    """Times ONNX files against each other on the CPU and compares what they compute.

    The files take turns in one process: in every round each runs once, so that whatever slows the machine down meets
    all alike, and speeds are ratios within a round. All run on the same inputs, matched by name where all files name
    theirs alike, by position otherwise; outputs are matched by name where a file names them as the first does.

    Args:
        files: the ONNX files; the first is what the others are compared with.
        inputs: a tensor or tuple of tensors, in the order of the first file's inputs; or a dictionary by their names,
            in which those left out are drawn, as all are for None: floats standard normal, integers zeros and ones.
        batch: size of an open dimension 0 of inputs that are drawn; other open dimensions of that name take it too.
        threads: of ONNX Runtime, within operators.
        rounds: timed runs of each file.
        seed: of the inputs.

    Raises:
        InputError: a file is missing or ONNX Runtime cannot run it, the inputs of two files differ, or the inputs
            given do not fit them.
        OptionError: an option is no positive integer, or there is no file or something else than a path.
    """
    for name, value in (("batch", batch), ("threads", threads), ("rounds", rounds)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} is {value!r}; expected a positive integer")
    given = [files] if isinstance(files, str | os.PathLike) or not isinstance(files, Iterable) else list(files)
    strange = [file for file in given if not isinstance(file, str | os.PathLike)]
    if strange:
        raise OptionError(f"files holds {strange[0]!r}, a {type(strange[0]).__name__}; expected paths of ONNX files")
    paths = [Path(file) for file in given]
    if not paths:
        raise OptionError("there is no file to time; name ONNX files")
    sessions = [_open(path, threads) for path in paths]
    declared = _aligned([_declarations(session) for session in sessions])
    wanted = _merged(paths, declared)
    values = _values(wanted, inputs, batch, seed)
    arrays = [value.detach().cpu().numpy() for value in values]
    feeds = [dict(zip((value.name for value in row), arrays, strict=True)) for row in declared]
    names = _output_names(sessions)
    outputs = [
        _run(path, session, name, feed) for path, session, name, feed in zip(paths, sessions, names, feeds, strict=True)
    ]
    runs = [partial(session.run, None, feed) for session, feed in zip(sessions, feeds, strict=True)]
    times = interleaved_times(runs, rounds=rounds)
    specs = (
        InputSpec(entry.name, tuple(value.shape), str(value.dtype).removeprefix("torch."))
        for entry, value in zip(wanted, values, strict=True)
    )
    rows = (_row(path, times[:, i], times[:, 0], outputs[i], outputs[0]) for i, path in enumerate(paths))
    return Bench(tuple(rows), tuple(specs), threads, rounds, ort.__version__)


def _open(path: Path, threads: int) -> Any:
    if not path.is_file():
        raise InputError(f"cannot time {path}: there is no such file")
    try:
        return open_session(path, threads)
    except Exception as error:
        raise InputError(f"cannot time {path}: {reason(error)}; expected an ONNX file of known operators") from error


def _output_names(sessions: Sequence[Any]) -> list[list[str]]:
    """Of every file, in the order of the first if it names its own alike."""
    names = [[value.name for value in session.get_outputs()] for session in sessions]
    return [names[0] if sorted(row) == sorted(names[0]) else row for row in names]


def _run(path: Path, session: Any, names: list[str], feed: Mapping[str, NDArray[Any]]) -> list[Any]:
    try:
        return list(session.run(names, feed))
    except Exception as error:
        raise InputError(f"cannot time {path}: {reason(error)}; other inputs may do") from error


def _declarations(session: Any) -> list[_Declared]:
    return [
        _Declared(value.name, runner.DTYPES.get(value.type, value.type), tuple(value.shape))
        for value in session.get_inputs()
    ]


def _aligned(declared: list[list[_Declared]]) -> list[list[_Declared]]:
    """The inputs of all files in the order of the first, if all name theirs alike."""
    order = {value.name: index for index, value in enumerate(declared[0])}
    if any({value.name for value in row} != order.keys() for row in declared):
        return declared
    return [sorted(row, key=lambda value: order[value.name]) for row in declared]


def _merged(paths: Sequence[Path], declared: Sequence[Sequence[_Declared]]) -> list[_Declared]:
    """The first file's inputs, open sizes filled in by any file that fixes them."""
    merged = list(declared[0])
    for path, row in zip(paths[1:], declared[1:], strict=True):
        if len(row) != len(merged) or not all(a.agrees(b) for a, b in zip(merged, row, strict=True)):
            found, wanted = (", ".join(map(str, values)) or "none" for values in (row, merged))
            raise InputError(f"{path} takes the inputs {found}, {paths[0]} {wanted}; compare files of like inputs")
        merged = [a.filled(b) for a, b in zip(merged, row, strict=True)]
    return merged


def _values(
    declared: Sequence[_Declared], inputs: Inputs | Mapping[str, Tensor] | None, batch: int, seed: int
) -> list[Tensor]:
    """A tensor for each input, given or drawn."""
    names = [value.name for value in declared]
    if inputs is None or isinstance(inputs, Mapping):
        given = as_kwargs(inputs)
    else:
        args = as_args(inputs)
        if len(args) != len(names):
            raise InputError(f"found {len(args)} inputs; the files take {len(names)} ({', '.join(names)})")
        given = dict(zip(names, args, strict=True))
    strange = [name for name in given if name not in names]
    if strange:
        raise InputError(f"the files have no input {', '.join(strange)}; theirs are {', '.join(names)}")
    for value in declared:
        if value.name in given:
            _check(value, given[value.name])
    left = [value for value in declared if value.name not in given]
    open_batch = {value.sizes[0] for value in left if value.sizes and isinstance(value.sizes[0], str)}
    _, drawn = draw_inputs((_spec(value, open_batch, batch) for value in left), seed)
    return [{**given, **drawn}[name] for name in names]


def _check(declared: _Declared, value: Tensor) -> None:
    found = _Declared(declared.name, str(value.dtype).removeprefix("torch."), tuple(value.shape))
    if not found.agrees(declared):
        raise InputError(f"found input {found}; the files take {declared}")


def _spec(declared: _Declared, batch_names: set[str], batch: int) -> InputSpec:
    """What to draw for an input."""
    if declared.dtype not in DRAWN:
        raise InputError(f"input {declared}: its type cannot be drawn; expected one of {', '.join(DRAWN)}")
    sizes = tuple(
        batch if not isinstance(size, int) and (index == 0 or size in batch_names) else size
        for index, size in enumerate(declared.sizes)
    )
    fixed = tuple(size for size in sizes if isinstance(size, int))
    if len(fixed) < len(sizes):
        raise InputError(f"input {declared} leaves sizes open beside the batch; give an input of that name")
    return InputSpec(declared.name, fixed, declared.dtype)


def _row(
    path: Path, times: NDArray[np.float64], first: NDArray[np.float64], outputs: list[Any], wanted: list[Any]
) -> BenchRow:
    lower, middle, upper = np.quantile(first / times, (0.25, 0.5, 0.75)).tolist()
    mismatch = _mismatch(wanted, outputs)
    difference = None if mismatch else max(map(_relative_difference, wanted, outputs), default=0.0)
    return BenchRow(str(path), float(np.median(times)), middle, (lower, upper), difference, mismatch)


def _mismatch(wanted: list[Any], found: list[Any]) -> str:
    """Why outputs cannot be compared, "" if they can."""
    if len(wanted) != len(found):
        return f"differ in number: {len(found)}"
    if not all(isinstance(value, np.ndarray) and value.dtype.kind in "biuf" for value in chain(wanted, found)):
        return "no numbers"
    if any(a.shape != b.shape for a, b in zip(wanted, found, strict=True)):
        return "differ in shape"
    if not all(np.isfinite(value).all() for value in chain(wanted, found)):
        return "NaN or Inf"
    return ""


def _relative_difference(wanted: NDArray[Any], found: NDArray[Any]) -> float:
    return differences(torch.tensor(wanted), torch.tensor(found))[1]
