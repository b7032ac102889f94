"""Files are timed on the same inputs, compared with the first, and refused where that cannot be done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from commands import tdfx_command
from onnx import TensorProto, helper

import tdfx
from tdfx import timing
from tdfx.errors import InputError, OptionError

FLOAT, INT64, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING
X = ("x", FLOAT, ["batch", 3])
Value = tuple[str, int, list[Any]]


def write(
    name: str, op: str, inputs: Sequence[Value] = (X,), *, outputs: int = 1, kind: int = FLOAT, **options: int
) -> Path:
    """A file in which one operator makes each output from all inputs."""
    names = [value[0] for value in inputs]
    nodes = [helper.make_node(op, names, [f"y{index}"], **options) for index in range(outputs)]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(f"y{index}", kind, None) for index in range(outputs)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), name)
    return Path(name)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_speed_is_that_of_each_round_and_its_quartiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(runs: Sequence[Callable[[], object]], *, rounds: int) -> Any:
        assert (len(runs), rounds) == (2, 5)
        return np.array([[4.0, 1.0], [4.0, 2.0], [12.0, 4.0], [4.0, 4.0], [8.0, 1.0]])

    monkeypatch.setitem(tdfx.bench.__globals__, "interleaved_times", times)
    found = tdfx.bench([write("a.onnx", "Identity"), write("b.onnx", "Relu")], rounds=5)
    first, second = found.rows
    assert (first.median_s, first.speed, first.speed_quartiles, first.max_rel_diff) == (4.0, 1.0, (1.0, 1.0), 0.0)
    assert (second.median_s, second.speed, second.speed_quartiles) == (2.0, 3.0, (2.0, 4.0))
    lines = str(found).splitlines()
    assert lines[3].split() == ["b.onnx", "2", "s", "3.00x", "2.00", "to", "4.00", f"{second.max_rel_diff:.2g}"]
    assert lines[4].startswith("5 rounds on x 1x3:float32; ONNX Runtime ")


def test_all_runs_are_timed_and_warm_ups_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    found = timing.interleaved_times([lambda: calls.append("a"), lambda: calls.append("b")], rounds=3)
    assert found.shape == (3, 2)
    assert calls.count("a") == calls.count("b") == 3 + timing.WARM_UP


def test_differences_are_relative_to_the_first_files_largest_output() -> None:
    files = [write("a.onnx", "Identity"), write("b.onnx", "Neg"), write("c.onnx", "Relu")]
    x = torch.tensor([[1.0, -4.0, 2.0]])
    found = tdfx.bench(files, x, rounds=1)
    assert [row.max_rel_diff for row in found.rows] == [0.0, 2.0, 1.0]
    assert [row.mismatch for row in found.rows] == ["", "", ""]
    assert found.inputs == (tdfx.InputSpec("x", (1, 3), "float32"),)


def test_outputs_that_cannot_be_compared_say_why() -> None:
    files = [write("a.onnx", "Identity"), write("b.onnx", "ReduceSum"), write("c.onnx", "Neg", outputs=2)]
    files += [write("d.onnx", "Log"), write("e.onnx", "Cast", kind=STRING, to=STRING)]
    found = tdfx.bench(files, -torch.ones(2, 3), rounds=1)
    assert [row.mismatch for row in found.rows] == [
        "",
        "differ in shape",
        "differ in number: 2",
        "NaN or Inf",
        "no numbers",
    ]
    assert [row.max_rel_diff for row in found.rows] == [0.0, None, None, None, None]
    assert "differ in shape" in str(found)


def test_inputs_of_the_same_names_are_matched_by_name_others_by_position() -> None:
    x, y = ("x", FLOAT, [2]), ("y", FLOAT, [2])
    files = [write("a.onnx", "Sub", (x, y)), write("b.onnx", "Sub", (y, x)), write("c.onnx", "Sub", (("u", *y[1:]), x))]
    values = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0])
    assert [row.max_rel_diff for row in tdfx.bench(files[:2], values, rounds=1).rows] == [0.0, 2.0]
    assert tdfx.bench([files[0], files[2]], values, rounds=1).rows[1].max_rel_diff == 0.0


def named(name: str, *operators: tuple[str, str]) -> Path:
    """A file whose outputs are given by name and operator."""
    nodes = [helper.make_node(op, ["x"], [output]) for output, op in operators]
    outputs = [helper.make_tensor_value_info(output, FLOAT, None) for output, _ in operators]
    graph = helper.make_graph(nodes, "graph", [helper.make_tensor_value_info(*X)], outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), name)
    return Path(name)


def test_outputs_of_the_same_names_are_matched_by_name_others_by_position() -> None:
    files = [named("a.onnx", ("p", "Neg"), ("q", "Abs")), named("b.onnx", ("q", "Abs"), ("p", "Neg"))]
    files += [named("c.onnx", ("r", "Neg"), ("s", "Abs")), named("d.onnx", ("s", "Abs"), ("r", "Neg"))]
    same, swapped = (tdfx.bench(pair, torch.ones(1, 3), rounds=1) for pair in (files[:3], files[::3]))
    assert [row.max_rel_diff for row in same.rows] == [0.0, 0.0, 0.0]
    assert swapped.rows[1].max_rel_diff == 2.0


def test_inputs_are_drawn_as_the_files_declare_them() -> None:
    table, ids = ("table", FLOAT, [4, 2]), ("ids", INT64, ["n", "n"])
    file = write("a.onnx", "Gather", (table, ids))
    found = tdfx.bench(file, batch=3, rounds=1)
    assert [(entry.shape, entry.dtype) for entry in found.inputs] == [((4, 2), "float32"), ((3, 3), "int64")]


def test_a_size_that_one_file_fixes_is_that_of_all() -> None:
    files = [write("a.onnx", "Neg"), write("b.onnx", "Neg", (("z", FLOAT, [5, None]),))]
    assert tdfx.bench(files, batch=7, rounds=1).inputs[0].shape == (5, 3)


def test_a_dictionary_gives_some_inputs_and_the_rest_is_drawn() -> None:
    file = write("a.onnx", "Gather", (("table", FLOAT, [4, 2]), ("ids", INT64, ["batch", "length"])))
    with pytest.raises(InputError, match="ids batchxlength:int64 leaves sizes open beside the batch"):
        tdfx.bench(file, rounds=1)
    assert tdfx.bench(file, {"ids": torch.ones(2, 5, dtype=torch.int64)}, rounds=1).inputs[1].shape == (2, 5)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.ones(1, 4), "found input x 1x4:float32; the files take x batchx3:float32"),
        (torch.ones(1, 3, dtype=torch.int64), "found input x 1x3:int64"),
        (torch.ones(3), "found input x 3:float32"),
        ((torch.ones(1, 3), torch.ones(1, 3)), r"found 2 inputs; the files take 1 \(x\)"),
        ({"z": torch.ones(1, 3)}, "no input z; theirs are x"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tdfx.bench(write("a.onnx", "Neg"), inputs, rounds=1)


@pytest.mark.parametrize("other", [("x", FLOAT, ["batch", 4]), ("x", FLOAT, [3]), ("x", INT64, ["batch", 3])])
def test_files_of_other_inputs_are_refused(other: Value) -> None:
    files = [write("a.onnx", "Neg"), write("b.onnx", "Neg", (other,), kind=other[1])]
    with pytest.raises(InputError, match=r"b.onnx takes the inputs x .*, a.onnx x batchx3:float32; compare files"):
        tdfx.bench(files, rounds=1)


def test_files_of_more_inputs_are_refused() -> None:
    files = [write("a.onnx", "Neg"), write("b.onnx", "Add", (X, ("y", *X[1:])))]
    with pytest.raises(InputError, match=r"b.onnx takes the inputs x .*, y "):
        tdfx.bench(files, rounds=1)


def test_files_that_do_not_run_are_refused() -> None:
    with pytest.raises(InputError, match=r"cannot time none.onnx: there is no such file"):
        tdfx.bench("none.onnx")
    Path("text.onnx").write_text("no model")
    with pytest.raises(InputError, match=r"cannot time text.onnx: InvalidProtobuf.*; expected an ONNX file"):
        tdfx.bench("text.onnx")
    with pytest.raises(InputError, match=r"input x 1:tensor.string.: its type cannot be drawn"):
        tdfx.bench(write("s.onnx", "Identity", (("x", STRING, [1]),), kind=STRING))
    table, ids = ("table", FLOAT, [4, 2]), ("ids", INT64, [1])
    file = write("g.onnx", "Gather", (table, ids))
    with pytest.raises(InputError, match=r"cannot time g.onnx: InvalidArgument.*; other inputs may do"):
        tdfx.bench(file, {"ids": torch.tensor([9])})


@pytest.mark.parametrize("option", ["batch", "threads", "rounds"])
@pytest.mark.parametrize("value", [0, True, 1.5])
def test_options_are_positive_integers(option: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"{option} is {value}; expected a positive integer"):
        tdfx.bench("a.onnx", **{option: value})


@pytest.mark.parametrize("files", [5, [5], ["a.onnx", 5], None])
def test_files_are_paths(files: Any) -> None:
    with pytest.raises(OptionError, match=r"files holds (5, a int|None, a NoneType); expected paths of ONNX files"):
        tdfx.bench(files)


def test_files_may_come_from_an_iterator() -> None:
    assert len(tdfx.bench(iter([write("a.onnx", "Neg"), write("b.onnx", "Neg")]), rounds=1).rows) == 2  # type: ignore[arg-type]


def test_values_that_are_not_drawn_may_be_given() -> None:
    file = write("a.onnx", "Neg", (("x", TensorProto.INT16, [3]),), kind=TensorProto.INT16)
    assert tdfx.bench(file, rounds=1).inputs[0].dtype == "int16"
    file = write("b.onnx", "Identity", (("x", TensorProto.UINT16, [3]),), kind=TensorProto.UINT16)
    with pytest.raises(InputError, match="input x 3:uint16: its type cannot be drawn; expected one of float32, "):
        tdfx.bench(file)
    given = tdfx.bench(file, torch.ones(3, dtype=torch.uint16), rounds=1)
    assert given.inputs[0].dtype == "uint16"


def test_no_file_is_refused() -> None:
    with pytest.raises(OptionError, match="no file to time"):
        tdfx.bench([])


def test_the_command_prints_the_table() -> None:
    write("a.onnx", "Neg")
    write("b.onnx", "Neg")
    stdout, stderr = tdfx_command("bench", "a.onnx", "b.onnx", "--batch", "4", "--rounds", "2")
    assert stderr == ""
    assert [line.split()[0] for line in stdout.splitlines()[2:4]] == ["a.onnx", "b.onnx"]
    assert "2 rounds on x 4x3:float32" in stdout
    assert "on x 5x3:float32" in tdfx_command("bench", "a.onnx", "--input", "5x3", "--rounds", "1")[0]
    assert "on x 6x3:float32" in tdfx_command("bench", "a.onnx", "--input", "x=6x3", "--rounds", "1")[0]


def test_the_command_says_what_is_wrong() -> None:
    assert tdfx_command("bench", "a.onnx", code=1)[1].startswith("error: cannot time a.onnx")
    write("a.onnx", "Neg")
    _, stderr = tdfx_command("bench", "a.onnx", "--input", "1x3", "--input", "x=1x3", code=2)
    assert "name all inputs or none" in stderr
