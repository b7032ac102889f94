"""Independent work on several threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy  # noqa: F401 - brings the BLAS that SciPy's minimiser uses
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from tdfx.parallel import as_done, last_call


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_every_item_comes_with_its_result() -> None:
    assert dict(as_done(lambda x: x * x, range(7))) == {x: x * x for x in range(7)}


def test_nothing_to_do() -> None:
    assert list(as_done(lambda x: x, [])) == []


def test_two_work_at_a_time() -> None:
    both = threading.Barrier(2, timeout=30)
    assert len(list(as_done(lambda _: both.wait(), range(2)))) == 2


def test_results_come_as_they_are_ready() -> None:
    last = threading.Event()

    def work(name: str) -> bool:
        return last.wait(30) if name == "slow" else True

    found = as_done(work, ["slow", "quick"])
    assert next(found) == ("quick", True)
    last.set()
    assert next(found) == ("slow", True)


def test_each_computes_on_one_thread() -> None:
    assert [threads for _, threads in as_done(lambda _: torch.get_num_threads(), range(2))] == [1, 1]


def test_numpy_computes_on_one_thread_meanwhile() -> None:
    def blas(_: int) -> list[int]:
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    with threadpool_limits(2, "blas"):
        (_, inside), *_ = as_done(blas, range(1))
        assert inside and set(inside) == {1}
        assert set(blas(0)) == {2}


def test_threads_are_as_before_also_for_new_ones() -> None:
    list(as_done(lambda x: x, range(2)))
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert (torch.get_num_threads(), seen) == (2, [2])


def test_an_error_is_raised_and_leaves_out_what_has_not_started() -> None:
    started: list[int] = []

    def work(item: int) -> None:
        started.append(item)
        time.sleep(0.01)
        if item == 0:
            raise ValueError("item 0")

    with pytest.raises(ValueError, match="item 0"):
        list(as_done(work, range(100)))
    assert len(started) < 100


def test_a_caller_that_stops_leaves_out_what_has_not_started() -> None:
    started: list[int] = []

    def work(item: int) -> None:
        started.append(item)
        time.sleep(0.01)

    def stop() -> None:
        for _ in as_done(work, range(100)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    number = len(started)
    assert number < 100
    time.sleep(0.1)
    assert len(started) == number


def test_the_last_call_is_remembered_by_thread() -> None:
    calls: list[tuple[str, int]] = []

    @last_call
    def square(x: int) -> int:
        calls.append((threading.current_thread().name, x))
        return x * x

    def twice(x: int) -> None:
        assert (square(x), square(x)) == (x * x, x * x)

    twice(2)
    thread = threading.Thread(target=twice, args=(2,), name="other")
    thread.start()
    thread.join()
    twice(3)
    twice(2)
    assert [x for name, x in calls if name != "other"] == [2, 3, 2]
    assert [x for name, x in calls if name == "other"] == [2]
