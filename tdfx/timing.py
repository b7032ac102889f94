"""Seconds: of stages, and of ONNX files measured side by side."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

WARM_UP = 5  # runs of each file that are not counted: the first ones allocate


def open_session(file: Path, threads: int = 1) -> Any:
    """An ONNX Runtime session on the CPU with this many intra-op threads."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def interleaved_medians(
    files: Sequence[Path], inputs: Sequence[NDArray[Any]], *, rounds: int = 200, threads: int = 1
) -> tuple[float, ...]:
    """Median seconds of one run of each file, on the same inputs.

    In every round each file runs once, every other round in reverse, so that whatever slows the machine down
    meets all files alike.

    Args:
        files: ONNX files that take the same inputs.
        inputs: arrays in the order of the files' inputs.
        rounds: timed runs of each file.
        threads: intra-op threads of ONNX Runtime.
    """
    sessions = [open_session(file, threads) for file in files]
    feeds = [dict(zip((value.name for value in s.get_inputs()), inputs, strict=True)) for s in sessions]
    times = np.zeros((WARM_UP + rounds, len(sessions)))
    order = list(range(len(sessions)))
    for turn in range(len(times)):
        for index in order if turn % 2 else reversed(order):
            started = time.perf_counter()
            sessions[index].run(None, feeds[index])
            times[turn, index] = time.perf_counter() - started
    return tuple(np.median(times[WARM_UP:], axis=0).tolist())


@contextmanager
def timed(timings: dict[str, float], name: str) -> Iterator[None]:
    """Keeps the seconds that the block takes under a name."""
    started = time.perf_counter()
    yield
    timings[name] = time.perf_counter() - started
