"""Timing models in turn, with a clock of the test's own."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

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
    monkeypatch.setattr(runner, "session_run", lambda model, runtime, feed=None: found.run(model, SECONDS[model]))
    monkeypatch.setattr(runner, "waiting", lambda since: 0.0)
    monkeypatch.setattr(
        runner, "interleaved", lambda runs, **options: original(runs, **{**options, "clock": found.clock})
    )
    return found


def measure(
    ratios: dict[str, dict[str, float]], keep: Callable[[], None] = lambda: None, kit: dict[str, Any] = KIT
) -> dict[str, Any]:
    return runner.measure(
        kit, "network", lambda key: key, RUNTIME, ratios=ratios, keep=keep, progress=lambda done, total: None
    )


def test_rows_are_sums_over_calls_beside_the_network(machine: Machine) -> None:
    assert measure({}) == {
        "structure": "abc",
        "network_s": 10.0,
        "disturbed": 0,
        "rank_grid": None,
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


def test_layers_that_are_not_all_in_memory_at_once_are_timed_beside_the_network(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = measure({})
    beside: list[int] = []
    seconds = runner.network_seconds
    monkeypatch.setattr(runner, "network_seconds", lambda runs: beside.append(len(runs)) or seconds(runs))
    monkeypatch.setattr(runner, "BYTES", 1)
    assert measure({}) == wanted
    assert beside == [2, 2]


def test_a_network_without_layers_is_timed(machine: Machine) -> None:
    assert measure({}, kit={**KIT, "groups": [], "rows": []})["network_s"] == 10.0


WIDTHS = range(32, 65)
GRID: dict[str, Any] = {
    **KIT,
    "bytes": KIT["bytes"] | {f"w{width}": 1 for width in WIDTHS},
    "grid": [[f"w{width}", width, width] for width in WIDTHS],
}


@pytest.fixture
def blocked(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine that computes in blocks of 8 channels."""
    for width in WIDTHS:
        monkeypatch.setitem(SECONDS, f"w{width}", float(-(-width // 8)))
    return machine


def test_the_grid_is_measured_with_the_layers_and_kept(blocked: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    without = measure({})
    ratios: dict[str, dict[str, float]] = {}
    assert measure(ratios, kit=GRID) == {**without, "rank_grid": 8}
    blocked.order.clear()
    assert measure(ratios, kit=GRID)["rank_grid"] == 8
    assert set(blocked.order) == {"network", "dense", "other"}


def test_a_grid_beside_which_others_ran_is_none(blocked: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = [0.0, 0.0, *[0.5] * runner.TRIES, 0.0]
    monkeypatch.setattr(runner, "waiting", lambda since: waits.pop(0))
    found = measure({}, kit=GRID)
    assert (found["rank_grid"], found["disturbed"]) == (None, 1)


def test_batches_keep_order_and_room() -> None:
    sizes = {"a": 3, "b": 4, "c": 5, "d": 20, "e": 1}
    assert runner.batches("abcde", sizes, 8) == [["a", "b"], ["c"], ["d"], ["e"]]  # type: ignore[arg-type]
    assert runner.batches("ab", sizes, -5) == [["a"], ["b"]]  # type: ignore[arg-type]
    assert runner.batches("", sizes, 8) == []  # type: ignore[arg-type]


def kit_folder(folder: Path) -> Path:
    (folder / "kit.json").write_text(json.dumps(KIT))
    (folder / "models").mkdir()
    for name in ("network", *(f"models/{key}" for key in KIT["bytes"])):
        (folder / f"{name}.onnx").touch()
    return folder


@pytest.fixture
def device(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kit whose files are run by their names."""
    timed = runner.session_run
    monkeypatch.setattr(runner, "session_run", lambda model, runtime, feed=None: timed(Path(str(model)).stem, runtime))
    return kit_folder(tmp_path)


def test_a_device_that_was_stopped_goes_on(device: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    write = runner.write

    def stop(path: Path, value: object) -> None:
        write(path, value)
        if machine.order:
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


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({"/proc/cpuinfo": "processor\t: 0\nmodel name\t: A 1\nprocessor\t: 1\nmodel name\t: A 1\n"}, "A 1"),
        (
            {
                "/proc/cpuinfo": "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd08\nCPU revision\t: 3\n" * 4,
                "/proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.1\0",
            },
            "Raspberry Pi 4 Model B Rev 1.1 0x41 0xd08 3",
        ),
        ({}, "Apple M3"),
    ],
    ids=["x86", "board", "Apple"],
)
def test_processors_have_names_of_their_own(files: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_read", lambda path: files.get(path, ""))
    monkeypatch.setattr(runner, "_apple", lambda: "Apple M3")
    assert runner.processor() == name


def test_a_group_beside_which_others_ran_is_timed_again(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = [0.5, 0.2, 0.0, 0.0, 0.5, 0.0]
    monkeypatch.setattr(runner, "waiting", lambda since: waits.pop(0))
    ratios: dict[str, dict[str, float]] = {}
    assert measure(ratios)["disturbed"] == 0 and not waits
    assert ratios["dense"]["half"] == 0.5


def test_what_was_disturbed_every_time_is_used_and_not_kept(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = measure({})
    waits = [0.5, 0.5, 0.5, 0.0, 0.0, 0.5, 0.5, 0.5]
    monkeypatch.setattr(runner, "waiting", lambda since: waits.pop(0))
    ratios: dict[str, dict[str, float]] = {}
    assert measure(ratios) == {**wanted, "disturbed": 1}
    assert len(waits) == 3
    assert measure({"dense": {"dense": 1.0, "half": 0.5, "third": 2 / 6}, "other": {"other": 1.0, "same": 1.0}}) == {
        **wanted,
        "disturbed": 1,  # beside the network
    }
    assert ratios == {"dense": {"dense": 1.0}, "other": {"other": 1.0, "same": 1.0}}


def test_a_thread_that_sleeps_waits_and_one_that_works_does_not() -> None:
    since = time.perf_counter(), time.thread_time()
    time.sleep(0.05)
    assert runner.waiting(since) > 0.5
    asked = {**RUNTIME, "provider": "CUDAExecutionProvider"}
    assert runner.undisturbed(lambda: time.sleep(0.01) or [1.0], asked) == ([1.0], True)
    assert runner.undisturbed(lambda: time.sleep(0.01) or [1.0], RUNTIME) == ([1.0], False)


@pytest.mark.parametrize(("threads", "is_sure"), [(1, False), (2, True)])
def test_a_thread_may_wait_for_its_own_others(threads: int, is_sure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "waiting", lambda since: 0.2)
    assert runner.undisturbed(lambda: [1.0], {**RUNTIME, "threads": threads}) == ([1.0], is_sure)


# --- what is given ---


def identity(kind: int) -> bytes:
    """A model whose output is its input, of a type."""
    values = [helper.make_tensor_value_info(name, kind, ["batch", 3]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:])
    opset = [helper.make_opsetid("", 18)]
    made: bytes = helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
    return made


@pytest.mark.parametrize("name", [
    "FLOAT", "DOUBLE", "FLOAT16", "BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64",
])  # fmt: skip
def test_inputs_of_all_types_of_numpy_are_drawn(name: str) -> None:
    kind = getattr(TensorProto, name)
    (found,) = runner.session_run(identity(kind), RUNTIME)()  # type: ignore[misc]
    assert found.dtype == helper.tensor_dtype_to_np_dtype(kind) and found.shape == (1, 3)
    assert bool(np.any(found)) == np.issubdtype(found.dtype, np.floating)


def test_inputs_of_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"input x is a tensor\(string\); values are drawn for tensor\(float\), "):
        runner.session_run(identity(TensorProto.STRING), RUNTIME)


def test_session_options_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []

    def session(model: object, options: Any, providers: Any) -> Any:
        taken.append((options, providers))
        return SimpleNamespace(get_providers=lambda: [runner.CPU])

    monkeypatch.setattr(ort, "InferenceSession", session)
    config = {
        "graph_optimization_level": "ORT_ENABLE_BASIC", "enable_cpu_mem_arena": "0", "inter_op_num_threads": "3",
        "session.intra_op.allow_spinning": "0", "provider.use_arena": "0",
    }  # fmt: skip
    runner.open_session(b"", {**RUNTIME, "config": config})
    ((options, providers),) = taken
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert options.enable_cpu_mem_arena is False and options.inter_op_num_threads == 3
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert providers == [(runner.CPU, {"use_arena": "0"})]


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("session.intra_op_thread_affinities", "x", "opens no session"),
        ("session.load_model_format", "ORT", "opens no session"),
        ("", "1", "opens no session: =1: expected a whole number"),
        ("no_such_option", "1", "no_such_option=1: expected"),
        ("graph_optimization_level", "MOST", "level=MOST: expected ORT_DISABLE_ALL, ORT_ENABLE_BASIC"),
        ("enable_mem_pattern", "off", "enable_mem_pattern=off: expected a whole number"),
    ],
)  # fmt: skip
def test_options_that_are_not_taken_are_refused(key: str, value: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        runner.open_session(identity(TensorProto.FLOAT), {**RUNTIME, "threads": 2, "config": {key: value}})


def test_a_network_that_cannot_be_opened_is_told_before_anything_is_timed(
    device: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []

    def refused(model: str, runtime: Any, feed: Any = None) -> Any:
        opened.append(Path(model).stem)
        raise ValueError("opens no session: Unsupported model IR version")

    monkeypatch.setattr(runner, "session_run", refused)
    with pytest.raises(SystemExit):
        runner.main(device, [])
    assert opened == ["network"] and "Unsupported model IR version" in capsys.readouterr().err


def test_files_are_timed_beside_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "a.onnx", tmp_path / "b.onnx", tmp_path / "c.onnx"]
    for file, operator in zip(files, ("Identity", "Neg", "Shape"), strict=True):
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "xy"]
        if operator == "Shape":
            values[1] = helper.make_tensor_value_info("y", TensorProto.INT64, [2])
        graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"])], "g", values[:1], values[1:])
        opset = [helper.make_opsetid("", 18)]
        file.write_bytes(helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString())
    runner.main(tmp_path, ["--bench", *map(str, files)])
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{files[0]}: ") and "100.0% of the first's time" in first
    assert first.endswith("outputs differ by 0 of the largest")
    assert second.endswith("outputs differ by 2 of the largest") and third.endswith("outputs of other shapes")
    with pytest.raises(SystemExit):
        runner.main(tmp_path, ["--bench", str(tmp_path / "none.onnx")])
    assert "opens no session" in capsys.readouterr().err


def test_a_provider_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"provider 'CUDAish' is not in this ONNX Runtime; expected one of .*CPUExec"):
        runner.open_session(identity(TensorProto.FLOAT), {**RUNTIME, "provider": "CUDAish"})


def test_a_provider_that_does_not_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def session(*arguments: Any, **options: Any) -> Any:
        return SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["Fast", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", session)
    with pytest.raises(ValueError, match="provider 'Fast' does not start here, ONNX Runtime took 'CPUExecution"):
        runner.open_session(b"", {**RUNTIME, "provider": "Fast"})


USABLE = {"a": {"a": 1.0, "b": 0.5}, "b": {"b": 1.0}}


def test_ratios_that_were_stored_are_used() -> None:
    assert runner.usable_ratios(USABLE) == USABLE
    assert runner.usable_ratios({}) == {}


@pytest.mark.parametrize("value", [0.0, -0.5, math.nan, math.inf, "1.0", None, True, 1, [1.0]])
def test_ratios_that_are_no_positive_numbers_are_not_used(value: object) -> None:
    assert runner.usable_ratios({**USABLE, "b": {"b": value}}) == {}


@pytest.mark.parametrize("values", [None, 3, [], "a", {"a": 1.0}, {"a": None}, {**USABLE, "c": [1.0]}])
def test_ratios_are_dictionaries(values: object) -> None:
    assert runner.usable_ratios(values) == {}


def unfinished(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "unfinished.json").read_text())
    return found


@pytest.mark.parametrize("content", [b"{", b"{}", b"[]", b"\xff\xfe", b"", b"3", b"[" * 100_000])
def test_a_broken_file_of_an_earlier_run_counts_as_missing(device: Path, machine: Machine, content: bytes) -> None:
    (device / "unfinished.json").write_bytes(content)
    runner.main(device, [])
    assert "half" in machine.order and unfinished(device)["ratios"]["dense"]["half"] == 0.5


@pytest.mark.parametrize("value", [math.nan, -1.0, 0.0, None])
def test_broken_ratios_of_an_earlier_run_count_as_missing(device: Path, machine: Machine, value: object) -> None:
    runner.main(device, [])
    found = unfinished(device)
    found["ratios"]["dense"]["half"] = value
    (device / "unfinished.json").write_text(json.dumps(found))
    machine.order.clear()
    runner.main(device, [])
    assert "half" in machine.order and unfinished(device)["ratios"]["dense"]["half"] == 0.5


def test_ratios_of_shorter_runs_are_not_used_for_longer_ones(device: Path, machine: Machine) -> None:
    runner.main(device, ["--seconds", "0"])
    machine.order.clear()
    runner.main(device, ["--seconds", "0.01"])
    assert "half" in machine.order
    assert "seconds" not in json.loads((device / "latency.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads: found 0; expected a whole number of 1 or more"),
        (["--threads", "-1"], "--threads: found -1; expected"),
        (["--threads", "1.5"], "--threads: found 1.5; expected"),
        (["--seconds", "-1"], "--seconds: found -1; expected a number of 0 or more"),
        (["--seconds", "nan"], "--seconds: found nan; expected"),
        (["--seconds", "much"], "--seconds: found much; expected"),
        (["--session-config", "spinning"], "expected KEY=VALUE"),
    ],
)
def test_arguments_are_checked_at_once(
    arguments: list[str], message: str, device: Path, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        runner.main(device, arguments)
    assert message in capsys.readouterr().err
    assert machine.order == []


def test_a_kit_that_is_not_there_is_a_plain_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with pytest.raises(SystemExit):
            runner.main(tmp_path, [])
        assert "cannot read kit.json beside this file" in capsys.readouterr().err
        (tmp_path / "kit.json").write_text("{")


def test_a_device_without_the_provider_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kit.json").write_text(json.dumps({"groups": [], "rows": [], "bytes": {}, "structure": "abc"}))
    (tmp_path / "network.onnx").touch()
    with pytest.raises(SystemExit):
        runner.main(tmp_path, ["--provider", "CUDAish"])
    assert "error: provider 'CUDAish' is not in this ONNX Runtime" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kit.json", "network.onnx"]


@pytest.mark.parametrize("name", ["network.onnx", "models/half.onnx"])
def test_a_kit_that_lacks_a_model_says_so_before_anything_is_timed(
    name: str, device: Path, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    (device / name).unlink()
    with pytest.raises(SystemExit):
        runner.main(device, [])
    assert f"{name} is missing beside this file; copy the whole folder" in capsys.readouterr().err
    assert machine.order == []


@pytest.mark.parametrize(("kit", "found"), [([], "what kit.json should hold"), ({"groups": []}, "'bytes' of kit.json")])
def test_a_kit_of_something_else_says_so(
    kit: object, found: str, device: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (device / "kit.json").write_text(json.dumps(kit))
    with pytest.raises(SystemExit):
        runner.main(device, [])
    assert f"{found} is missing beside this file" in capsys.readouterr().err


def test_a_folder_that_takes_no_files_says_so_before_anything_is_timed(
    device: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(path: Path, value: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(runner, "write", refused)
    with pytest.raises(SystemExit):
        runner.main(device, [])
    assert "cannot write beside this file" in capsys.readouterr().err
    assert machine.order == []


# --- what is left ---


def test_what_is_left_takes_as_long_as_what_was_timed() -> None:
    assert runner.work_of(GRID, {}) == [2, 1, 32]
    work = runner.work_of(GRID, {"dense": {"dense": 1.0, "half": 0.5, "third": 0.5}})
    assert work == [0, 1, 32]
    assert runner.seconds_left(work, 0, 1.0) is None
    assert runner.seconds_left(work, 1, 1.0) is None
    assert runner.seconds_left(work, 2, 0.5) == 16.0


def test_progress_says_how_long_it_will_take(
    device: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "seconds_left", lambda work, done, elapsed_s: 34.6 if done else None)
    runner.main(device, [])
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [
        "0 of 2 groups of models",
        "1 of 2 groups of models, about 35 s left",
        "2 of 2 groups of models",
    ]


@pytest.mark.parametrize(("given", "stop"), [({}, "1"), ({"session.force_spinning_stop": "0"}, "0")])
def test_idle_sessions_leave_the_processors_to_others(given: dict[str, str], stop: str) -> None:
    session = runner.open_session(identity(TensorProto.FLOAT), {**RUNTIME, "config": given})
    assert session.get_session_options().get_session_config_entry("session.force_spinning_stop") == stop


def test_session_configuration_is_key_and_value() -> None:
    assert runner.entries(["a.b=1", "c=x=y"]) == {"a.b": "1", "c": "x=y"}
    for text in ("a.b", "=1"):
        with pytest.raises(ValueError, match="expected KEY=VALUE"):
            runner.entries([text])
