"""The int8 file is made from a verified float32 file, by data where there are any, and its error is reported."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from commands import BOTH_INPUTS, BUDGET, METHODS, tdfx_command
from onnx import numpy_helper
from torch import Tensor, nn

import tdfx
from tdfx import onnx_export, quantization
from tdfx.errors import ExportError, InputError, OptionError, PlanError, VerificationError
from tdfx.latency import runner
from tdfx.onnx_export import ExportReport, export_onnx
from tdfx.quantization import Quantization
from tdfx.records.reading import read


class Chain(nn.Module):
    """A convolution as CP leaves it, channels of ranges that differ by 1000, a ReLU and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 1, bias=False)
        self.middle = nn.Conv2d(16, 16, 3, groups=16, bias=False)
        self.last = nn.Conv2d(16, 24, 1)
        self.head = nn.Linear(24, 10)
        scale = torch.logspace(-1.5, 1.5, 16)
        with torch.no_grad():
            self.first.weight.mul_(scale[:, None, None, None])
            self.last.weight.div_(scale[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.last(self.middle(self.first(x))).relu().mean((2, 3)))
        return out


def make(seed: int = 0) -> Chain:
    torch.manual_seed(seed)
    return Chain().eval()


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def run(path: Path, *inputs: Tensor) -> list[Any]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {value.name: tensor.numpy() for value, tensor in zip(session.get_inputs(), inputs, strict=True)}
    return list(session.run(None, feeds))


def int8(report: ExportReport) -> Quantization:
    assert report.quantization is not None
    return report.quantization


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportReport]:
    path = tmp_path_factory.mktemp("int8") / "net.onnx"
    return path, export_onnx(make(), path, images(2), quantize="int8", calibration=images(80))


def test_weights_are_int8_with_a_scale_for_each_output_channel(exported: tuple[Path, ExportReport]) -> None:
    graph = onnx.load(exported[0]).graph
    held = {value.name: numpy_helper.to_array(value) for value in graph.initializer}
    weights = [
        [held[name] for name in node.input]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in held and held[node.input[0]].dtype == np.int8
    ]
    assert sorted(scale.shape for _, scale, _ in weights) == [(10,), (16,), (16,), (24,)]
    assert {int(np.abs(weight.astype(int)).max()) for weight, _, _ in weights} <= {63, 64}  # of seven bits
    activations = [held[node.input[2]].dtype for node in graph.node if node.op_type == "QuantizeLinear"]
    assert set(activations) == {np.dtype(np.uint8)}


def test_the_report_holds_both_files_errors_and_sizes(exported: tuple[Path, ExportReport]) -> None:
    path, report = exported
    found = int8(report)
    assert (found.path, found.file_bytes) == (str(path), path.stat().st_size)
    assert [entry.name for entry in path.parent.iterdir()] == ["net.onnx"]
    assert (found.calibrated, found.compared, found.equalized, found.rtol) == (80, 32, 2, None)
    inputs = images(80)[:32]
    wanted = make()(inputs).detach().double().numpy()
    error = run(path, inputs)[0].astype(np.float64) - wanted
    (output,) = found.outputs
    assert output.max_rel_diff == pytest.approx(np.abs(error).max() / np.abs(wanted).max(), rel=1e-3)
    assert output.rel_l2_diff == pytest.approx(np.linalg.norm(error) / np.linalg.norm(wanted), rel=1e-3)
    assert found.max_rel_diff == output.max_rel_diff
    assert 0 < output.rel_l2_diff < 0.05
    assert report.rtol == 1e-4
    assert report.max_rel_diff < 1e-5
    assert report.file_bytes > 0
    assert report.file_bytes != found.file_bytes


def test_the_report_holds_time_and_scores_beside_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[list[str]] = []

    def network_times(models: list[str], runtime: Any, feed: Any) -> list[list[float]]:
        timed.append(models)
        assert [value.shape for value in feed.values()] == [images(2).shape]
        return [[4.0, 6.0, 8.0, 10.0], [2.0, 2.0, 2.0, 2.0]]

    monkeypatch.setattr(runner, "network_times", network_times)
    seen: list[Tensor] = []

    def evaluate(network: nn.Module) -> float:
        seen.append(network(images(5)))
        return -float(len(seen))

    options: dict[str, Any] = {"quantize": "int8", "calibration": images(80), "evaluate": evaluate}
    report = export_onnx(make(), tmp_path / "int8.onnx", images(2), float32=tmp_path / "float.onnx", **options)
    found = int8(report)
    assert (found.speed, found.speed_quartiles) == (3.5, (2.25, 4.75))
    assert [Path(model).name for model in timed[0]] == ["float.onnx", "int8.onnx"]
    assert found.scores == (-1.0, -2.0)
    for file, output in zip(("float.onnx", "int8.onnx"), seen, strict=True):
        np.testing.assert_allclose(output.numpy(), run(tmp_path / file, images(5))[0], rtol=1e-6)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["float.onnx", "int8.onnx"]
    assert read(ExportReport, json.loads(json.dumps(asdict(report))), "export") == report
    values = asdict(report)
    values["quantization"]["scores"] = [math.nan]
    with pytest.raises(PlanError, match=r"scores\[0\] is nan; expected a finite number"):
        read(ExportReport, json.loads(json.dumps(values)), "export")


def test_the_batch_stays_open(exported: tuple[Path, ExportReport]) -> None:
    assert run(exported[0], images(5))[0].shape == (5, 10)


def test_equalization_is_what_keeps_unequal_channels(
    exported: tuple[Path, ExportReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "equalize", lambda model, tensors, ranges: None)
    report = export_onnx(make(), tmp_path / "net.onnx", images(2), quantize="int8", calibration=images(80))
    assert int8(report).outputs[0].rel_l2_diff > 2 * int8(exported[1]).outputs[0].rel_l2_diff


def test_the_report_comes_back_from_json(exported: tuple[Path, ExportReport]) -> None:
    values = json.loads(json.dumps(asdict(exported[1])))
    assert read(ExportReport, values, "export") == exported[1]
    del values["quantization"]["notes"]
    assert read(ExportReport, values, "export") == exported[1]
    del values["quantization"]  # as older versions wrote it
    assert read(ExportReport, values, "export").quantization is None


def test_without_data_ranges_are_found_in_every_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
    report = export_onnx(net, tmp_path / "net.onnx", torch.randn(4, 32), quantize="int8")
    kinds = {node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node}
    assert {"DynamicQuantizeLinear", "MatMulInteger"} <= kinds
    assert (int8(report).calibrated, int8(report).compared, int8(report).equalized) == (0, 4, 0)
    assert 0 < int8(report).outputs[0].rel_l2_diff < 0.05


def test_networks_too_large_for_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "MAX_WEIGHT_BYTES", 1)
    net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64))
    for data in (None, torch.randn(8, 64)):
        report = export_onnx(net, tmp_path / "n.onnx", torch.randn(4, 64), quantize="int8", calibration=data)
        assert report.external_data
        assert int8(report).file_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
        assert run(tmp_path / "n.onnx", torch.randn(3, 64))[0].shape == (3, 64)


def test_a_loader_that_gives_its_batches_once_is_read_once(tmp_path: Path) -> None:
    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in images(24).split(8):
            yield batch.double(), torch.zeros(len(batch))

    report = export_onnx(make(), tmp_path / "net.onnx", images(2), quantize="int8", calibration=loader(), samples=20)
    assert (int8(report).calibrated, int8(report).compared) == (20, 8)


def test_inputs_by_name_and_writing_to_them(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, a: Tensor, *, ids: Tensor) -> tuple[Tensor, Tensor]:
            out = self.layer(a) + ids
            a += 1
            return out, out.argmax(1)

    data = {"ids": torch.ones(6, 8, dtype=torch.int64), "a": torch.randn(6, 8), "label": torch.zeros(6)}
    kwargs = {"ids": torch.ones(2, 8, dtype=torch.int64)}
    report = export_onnx(Net(), tmp_path / "n.onnx", torch.randn(2, 8), kwargs, quantize="int8", calibration=data)
    first, _ = int8(report).outputs
    assert 0 < first.rel_l2_diff < 0.05


def test_a_fixed_batch_leaves_other_batches_out(tmp_path: Path) -> None:
    report = export_onnx(make(), tmp_path / "n.onnx", images(4), dynamic=None, quantize="int8", calibration=images(10))
    assert int8(report).calibrated == 8
    with pytest.raises(InputError, match="calibration data hold no batch of 4, the only size"):
        export_onnx(make(), tmp_path / "n.onnx", images(4), dynamic=None, quantize="int8", calibration=images(3))


def test_a_network_of_free_sizes_is_timed_on_the_example(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1)).eval()
    free = {"input": {2: "height", 3: "width"}}
    options: dict[str, Any] = {"quantize": "int8", "calibration": torch.randn(8, 3, 16, 16), "dynamic": free}
    assert int8(export_onnx(net, tmp_path / "n.onnx", torch.randn(2, 3, 16, 16), **options)).speed > 0


def test_an_error_beyond_rtol_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"int8 file differs .* largest magnitude .allowed: 1e-06.") as caught:
        export_onnx(make(), tmp_path / "n.onnx", images(2), quantize="int8", calibration=images(8), rtol=1e-6)
    assert caught.value.max_rel_diff > 1e-6
    assert list(tmp_path.iterdir()) == []


def test_an_error_within_rtol_is_written(tmp_path: Path) -> None:
    report = export_onnx(make(), tmp_path / "n.onnx", images(2), quantize="int8", calibration=images(8), rtol=0.5)
    assert (int8(report).rtol, report.rtol) == (0.5, 1e-4)


def test_the_float32_file_passes_its_gate_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise VerificationError("the float32 file differs")

    monkeypatch.setattr(onnx_export, "compare", fail)
    with pytest.raises(VerificationError, match="the float32 file differs"):
        export_onnx(make(), tmp_path / "n.onnx", images(2), quantize="int8", rtol=0.9)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(VerificationError, match="output 'y' of the int8 file holds NaN or Inf"):
        quantization._difference("y", torch.ones(2), torch.tensor([1.0, float("nan")]), None)


def test_integer_outputs_are_reported_but_not_held_to_rtol() -> None:
    found = quantization._difference("y", torch.tensor([4, 0]), torch.tensor([2, 0]), 0.1)
    assert (found.max_rel_diff, found.rel_l2_diff) == (0.5, 0.5)


def test_what_onnxruntime_cannot_quantize_is_an_export_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise ValueError("no such operator")

    for name, calibration in (("quantize_static", images(4)), ("quantize_dynamic", None), ("quant_pre_process", None)):
        with (
            monkeypatch.context() as patch,
            pytest.raises(ExportError, match="ValueError: no such operator; export it"),
        ):
            patch.setattr(quantization, name, fail)
            export_onnx(make(), tmp_path / "n.onnx", images(2), quantize="int8", calibration=calibration)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int4"}, "quantize is 'int4'; expected 'int8' or None"),
        ({"calibration": torch.zeros(1)}, "calibration is given without quantize; pass quantize='int8' too"),
        ({"samples": 3}, "samples is given without quantize"),
        ({"evaluate": len}, "evaluate is given without quantize"),
        ({"quantize": "int8", "evaluate": "top1"}, "evaluate is a str; expected a function"),
        ({"float32": "f.onnx"}, "float32 is 'f.onnx'; without quantize"),
        ({"quantize": "int8", "samples": 3}, "samples is 3; expected a positive integer, with calibration data"),
        ({"quantize": "int8", "calibration": torch.ones(1), "samples": 0}, "samples is 0; expected a positive integer"),
    ],
)
def test_options_that_are_not_understood(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        export_onnx(make(), tmp_path / "n.onnx", images(2), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_floats_than_float32_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(InputError, match=f"takes a float32 network; this one or its inputs are {name}"):
        export_onnx(make().to(dtype), tmp_path / "n.onnx", images(2).to(dtype), quantize="int8")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "holds no batch"),
        (torch.zeros(0, 3, 8, 8), "holds no batch"),
        (torch.full((2, 3, 8, 8), float("inf")), "holds Inf"),
        (images(2)[0], "expected as many dimensions"),
        (3, "the data is a int"),
    ],
)
def test_data_that_cannot_be_read_are_refused(data: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        export_onnx(make(), tmp_path / "n.onnx", images(2), quantize="int8", calibration=data)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("dynamic", "sizes"), [("batch", "anyx3x8x8"), (None, "2x3x8x8")])
def test_data_of_other_shapes_than_the_files_are_refused(dynamic: str | None, sizes: str, tmp_path: Path) -> None:
    data = torch.ones(2, 3, 9, 8)
    with pytest.raises(
        InputError, match=f"batch 0 of the calibration data: input x is 2x3x9x8, the file takes {sizes}"
    ):
        export_onnx(make(), tmp_path / "n.onnx", images(2), dynamic=dynamic, quantize="int8", calibration=data)
    assert list(tmp_path.iterdir()) == []


def test_what_a_loader_raises_stays_as_it_is(tmp_path: Path) -> None:
    def loader() -> Iterator[Tensor]:
        yield images(2)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        export_onnx(make(), tmp_path / "n.onnx", images(2), quantize="int8", calibration=loader())


@pytest.mark.parametrize("name", ["pairs", "channel_ranges", "equalize"])
def test_what_cannot_be_equalized_is_an_export_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no such tensor")

    monkeypatch.setattr(quantization, name, fail)
    with pytest.raises(ExportError, match="cannot quantize the network: RuntimeError: no such tensor; export it"):
        export_onnx(make(), tmp_path / "n.onnx", images(2), quantize="int8", calibration=images(4))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)[0]
        return out


class Residual(nn.Module):
    """An addition, whose tensors are quantized though it has no weight."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.sigmoid()


@pytest.mark.parametrize(
    ("net", "calibrated", "is_quantized"),
    [
        (Recurrent(), True, False),
        (Recurrent(), False, True),
        (nn.ReLU(), True, False),
        (Residual(), True, False),
        (nn.Linear(8, 8), True, True),
        (nn.Linear(8, 8), False, True),
    ],
)
def test_it_is_said_where_nothing_was_quantized(
    net: nn.Module, calibrated: bool, is_quantized: bool, tmp_path: Path
) -> None:
    x = torch.randn(2, 5, 8)
    report = export_onnx(net, tmp_path / "n.onnx", x, quantize="int8", calibration=x if calibrated else None)
    assert int8(report).notes == (() if is_quantized else (quantization.NOTHING,))


def test_the_commands_write_int8_beside(folder: Path) -> None:
    names = {
        "x": np.random.default_rng(0).standard_normal((12, 4, 8, 8), np.float32),
        "ids": np.ones((12, 3), np.int64),
    }
    np.savez("data.npz", **names)  # type: ignore[arg-type]
    data = ("--data", "data.npz", "--samples", "8")
    stdout, _ = tdfx_command(
        "compress", "net.py:make", *BOTH_INPUTS, *METHODS, *BUDGET, *data, "--quantize", "int8", "--out", "out"
    )
    assert "model.int8.onnx: " in stdout
    assert "int8, calibrated on 8 samples; differs by" in stdout
    assert Path("out/model.int8.onnx").stat().st_size > 0
    saved = json.loads(Path("out/report.json").read_text())["export"]
    assert saved["path"] == str(Path("out/model.onnx"))
    assert saved["quantization"]["path"] == str(Path("out/model.int8.onnx"))
    assert "int8, calibrated on 8 samples" in tdfx_command("inspect", "out")[0]
    assert tdfx.load("out").plan.metric == "loss"
    Path("score.py").write_text("def size(network):\n    return float(network.session is not None)\n")
    stdout, _ = tdfx_command("export", "out", "--quantize", "int8", *data, "--evaluate", "score.py:size")
    assert "int8, calibrated on 8 samples; differs by" in stdout
    assert "x as fast as float32" in stdout and "; score 1, of float32 1" in stdout
    before = Path("out/model.int8.onnx").read_bytes()
    _, stderr = tdfx_command("export", "out", "--quantize", "int8", *data, "--rtol", "1e-6", code=1)
    assert "int8 file differs" in stderr and "allowed: 1e-06" in stderr
    assert Path("out/model.int8.onnx").read_bytes() == before
    assert "note: out/model.int8.onnx was there before" in tdfx_command("export", "out")[0]
    _, stderr = tdfx_command("export", "out", *data, code=2)
    assert "--data" in stderr and "it is for --quantize" in stderr
    _, stderr = tdfx_command("export", "out", "--evaluate", "score.py:size", code=2)
    assert "--evaluate" in stderr and "it is for --quantize" in stderr


def test_both_files_need_names_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "n.onnx"
    with pytest.raises(OptionError, match="float32 and path are both"):
        export_onnx(make(), path, images(2), quantize="int8", float32=tmp_path / "." / "n.onnx")


def test_weights_beside_the_float32_file_are_kept_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "MAX_WEIGHT_BYTES", 1)
    path = tmp_path / "float" / "f.onnx"
    export_onnx(make(), tmp_path / "n.onnx", images(2), quantize="int8", float32=path)
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["f.onnx", "f.onnx.data"]
    wanted = make()(images(2)).detach().numpy()
    np.testing.assert_allclose(run(path, images(2))[0], wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
