"""Seconds: of stages, and of ONNX files measured side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdfx.latency import runner

WARM_UP = 5  # runs of each that are not counted: the first ones allocate


def open_session(file: Path, threads: int = 1) -> Any:
    """An ONNX Runtime session on the CPU with this many intra-op threads."""
    return runner.open_session(str(file), {"threads": threads, "provider": "CPUExecutionProvider"})


def interleaved_times(runs: Sequence[Callable[[], object]], *, rounds: int) -> NDArray[np.float64]:
    """Seconds of each run in each round, (rounds, runs), after rounds that are not counted.

    Args:
        runs: what takes turns.
        rounds: how often each is timed.
    """
    times = runner.interleaved(runs, rounds=(rounds, rounds), warm_up=WARM_UP, clock=time.perf_counter)
    return np.array(times).T


def interleaved_medians(
    files: Sequence[Path], inputs: Sequence[NDArray[Any]], *, rounds: int = 200, threads: int = 1
) -> tuple[float, ...]:
    """Median seconds of one run of each file, on the same inputs, as the files take turns.

    Args:
        files: ONNX files that take the same inputs.
        inputs: arrays in the order of the files' inputs.
        rounds: timed runs of each file.
        threads: intra-op threads of ONNX Runtime.
    """
    sessions = [open_session(file, threads) for file in files]
    feeds = [dict(zip((value.name for value in s.get_inputs()), inputs, strict=True)) for s in sessions]
    runs = [partial(session.run, None, feed) for session, feed in zip(sessions, feeds, strict=True)]
    return tuple(np.median(interleaved_times(runs, rounds=rounds), axis=0).tolist())


@contextmanager
def timed(timings: dict[str, float], name: str) -> Iterator[None]:
    """Keeps the seconds that the block takes under a name."""
    started = time.perf_counter()
    yield
    timings[name] = time.perf_counter() - started
