"""Independent pieces of work on as many threads as torch may use, each of which computes alone.

A decomposition is many operators too small to share among threads: sharing them gains nothing, and costs many times
their own time where another process wants the same cores.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from threadpoolctl import threadpool_limits

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")


def as_done(work: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
    """Every item with what ``work`` returns for it, as soon as it does; started in the order given.

    The first error is raised; work that has not started by then is left out.
    """
    threads = torch.get_num_threads()
    with threadpool_limits(1), ThreadPoolExecutor(threads, "tdfx", torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(work, item): item for item in items}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # also what threads to come start with


def last_call(function: Callable[P, R]) -> Callable[P, R]:
    """The function, remembering on every thread the last arguments and what it returned for them."""
    local = threading.local()

    @wraps(function)
    def remembering(*args: P.args, **kwargs: P.kwargs) -> R:
        if not hasattr(local, "function"):
            local.function = lru_cache(maxsize=1)(function)
        return local.function(*args, **kwargs)  # type: ignore[no-any-return]

    return remembering
