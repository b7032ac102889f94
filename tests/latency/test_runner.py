"""Timing models in turn, with a clock of the test's own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tdfx.latency import runner

RUNTIME = {"threads": 1, "provider": "CPUExecutionProvider", "config": {}}


class Machine:
    """A clock that runs that are called move on, by more on a slow day."""

    def __init__(self, pace: Callable[[int], float] = lambda calls: 1.0) -> None:
        self.now, self.calls, self.pace = 0.0, 0, pace
        self.order: list[str] = []

    def clock(self) -> float:
        return self.now

    def run(self, name: str, seconds: float) -> runner.Run:
        def call() -> None:
            self.now += seconds * self.pace(self.calls)
            self.calls += 1
            self.order.append(name)

        return call


def test_runs_take_turns_every_other_round_in_reverse() -> None:
    machine = Machine()
    times = runner.interleaved(
        [machine.run(name, 1.0) for name in "abc"], rounds=(3, 3), seconds=0.0, clock=machine.clock
    )
    assert "".join(machine.order) == "cbaabc" + "cbaabccba"
    assert times == [[1.0] * 3] * 3


def test_there_are_as_many_rounds_as_time_allows() -> None:
    def rounds(seconds: float) -> int:
        machine = Machine()
        runs = [machine.run("a", 0.01), machine.run("b", 0.03)]
        return len(runner.interleaved(runs, rounds=(5, 50), seconds=seconds, clock=machine.clock)[0])

    assert (rounds(0.01), rounds(0.2), rounds(10.0)) == (5, 10, 50)


def test_the_first_rounds_do_not_count() -> None:
    machine = Machine(pace=lambda calls: 100.0 if calls < 2 * runner.WARM_UP else 1.0)
    times = runner.interleaved([machine.run("a", 1.0), machine.run("b", 2.0)], seconds=0.0, clock=machine.clock)
    assert [set(values) for values in times] == [{1.0}, {2.0}]


def test_ratios_are_of_medians_and_stand_a_disturbance() -> None:
    machine = Machine(pace=lambda calls: 50.0 if calls % 7 == 0 else 1.0)
    runs = [machine.run("dense", 1.0), machine.run("half", 0.5), machine.run("twice", 2.0)]
    assert runner.group_ratios(runs, 0.0, machine.clock) == [1.0, 0.5, 2.0]


KIT: dict[str, Any] = {
    "groups": [["dense", "half", "third"], ["other", "same"]],
    "rows": [
        ["a", "dense", [], [["dense", "dense"], ["other", "other"]]],
        ["a", "svd", [3], [["dense", "half"], ["other", "same"]]],
        ["b", "cp", [4], [["dense", "third"]]],
    ],
    "bytes": dict.fromkeys(["dense", "half", "third", "other", "same"], 1),
    "structure": "abc",
}
SECONDS = {"network": 10.0, "dense": 6.0, "half": 3.0, "third": 2.0, "other": 1.0, "same": 1.0}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine()
    original = runner.interleaved
    monkeypatch.setattr(runner, "session_run", lambda model, runtime: found.run(model, SECONDS[model]))
    monkeypatch.setattr(runner, "waiting", lambda since: 0.0)
    monkeypatch.setattr(
        runner, "interleaved", lambda runs, **options: original(runs, **{**options, "clock": found.clock})
    )
    return found


def measure(ratios: dict[str, dict[str, float]], keep: Callable[[], None] = lambda: None) -> dict[str, Any]:
    return runner.measure(
        KIT, "network", lambda key: key, RUNTIME, ratios=ratios, keep=keep, progress=lambda done, total: None
    )


def test_rows_are_sums_over_calls_beside_the_network(machine: Machine) -> None:
    assert measure({}) == {
        "structure": "abc",
        "network_s": 10.0,
        "disturbed": 0,
        "rows": [
            {"site": "a", "method": "dense", "rank": [], "latency_s": 7.0},
            {"site": "a", "method": "svd", "rank": [3], "latency_s": 4.0},
            {"site": "b", "method": "cp", "rank": [4], "latency_s": 2.0},
        ],
    }


def test_a_slower_day_for_one_group_changes_nothing(machine: Machine) -> None:
    wanted = measure({})
    machine.calls = 0
    machine.pace = lambda calls: 3.0 if calls < 3 * (runner.WARM_UP + runner.ROUNDS[0]) else 1.0
    assert measure({}) == wanted


def test_what_is_known_is_not_timed_again(machine: Machine) -> None:
    kept: list[int] = []
    ratios = {"dense": {"dense": 1.0, "half": 0.25}}
    found = measure(ratios, keep=lambda: kept.append(len(machine.order)))
    assert "half" not in machine.order and "third" in machine.order
    assert found["rows"][1]["latency_s"] == 6.0 * 0.25 + 1.0
    assert len(kept) == 2 and ratios["other"] == {"other": 1.0, "same": 1.0}


def test_few_weights_are_in_memory_at_once(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []
    ratios = runner.group_ratios
    monkeypatch.setattr(runner, "group_ratios", lambda runs, seconds: groups.append(len(runs)) or ratios(runs, seconds))
    wanted = measure({})
    monkeypatch.setattr(runner, "BYTES", 2)
    assert measure({}) == wanted
    assert groups == [3, 2, 2, 2, 2]


def test_batches_keep_order_and_room() -> None:
    sizes = {"a": 3, "b": 4, "c": 5, "d": 20, "e": 1}
    assert runner.batches("abcde", sizes, 8) == [["a", "b"], ["c"], ["d"], ["e"]]  # type: ignore[arg-type]
    assert runner.batches("ab", sizes, -5) == [["a"], ["b"]]  # type: ignore[arg-type]
    assert runner.batches("", sizes, 8) == []  # type: ignore[arg-type]


def kit_folder(folder: Path) -> Path:
    (folder / "kit.json").write_text(json.dumps(KIT))
    return folder


@pytest.fixture
def device(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kit whose files are run by their names."""
    timed = runner.session_run
    monkeypatch.setattr(runner, "session_run", lambda model, runtime: timed(Path(str(model)).stem, runtime))
    return kit_folder(tmp_path)


def test_a_device_that_was_stopped_goes_on(device: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    write = runner.write

    def stop(path: Path, value: object) -> None:
        write(path, value)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runner, "write", stop)
        runner.main(device, [])
    assert "half" in machine.order and "same" not in machine.order
    machine.order.clear()
    runner.main(device, [])
    assert "half" not in machine.order and "same" in machine.order
    assert json.loads((device / "latency.json").read_text())["network_s"] == 10.0


def test_other_options_are_measured_anew(device: Path, machine: Machine) -> None:
    runner.main(device, [])
    machine.order.clear()
    runner.main(device, ["--threads", "2"])
    assert "half" in machine.order
    assert json.loads((device / "latency.json").read_text())["runtime"]["threads"] == 2


def test_the_host_is_named() -> None:
    assert all(runner.host().values())


def test_a_group_beside_which_others_ran_is_timed_again(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = [0.5, 0.2, 0.0, 0.0]
    monkeypatch.setattr(runner, "waiting", lambda since: waits.pop(0))
    ratios: dict[str, dict[str, float]] = {}
    assert measure(ratios)["disturbed"] == 0 and not waits
    assert ratios["dense"]["half"] == 0.5


def test_what_was_disturbed_every_time_is_used_and_not_kept(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = measure({})
    waits = [0.5, 0.5, 0.5, 0.0]
    monkeypatch.setattr(runner, "waiting", lambda since: waits.pop(0))
    ratios: dict[str, dict[str, float]] = {}
    assert measure(ratios) == {**wanted, "disturbed": 1}
    assert ratios == {"dense": {"dense": 1.0}, "other": {"other": 1.0, "same": 1.0}}


def test_a_thread_that_sleeps_waits_and_one_that_works_does_not() -> None:
    since = time.perf_counter(), time.thread_time()
    time.sleep(0.05)
    assert runner.waiting(since) > 0.5
    asked = {**RUNTIME, "provider": "CUDAExecutionProvider"}
    assert runner.undisturbed(lambda: time.sleep(0.01) or [1.0], asked) == ([1.0], True)
    assert runner.undisturbed(lambda: time.sleep(0.01) or [1.0], RUNTIME) == ([1.0], False)


def test_session_configuration_is_key_and_value() -> None:
    assert runner.entries(["a.b=1", "c=x=y"]) == {"a.b": "1", "c": "x=y"}
    for text in ("a.b", "=1"):
        with pytest.raises(ValueError, match="expected KEY=VALUE"):
            runner.entries([text])
