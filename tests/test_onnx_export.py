"""The ONNX file computes what the network does, says what it holds, and appears only when both are known."""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from tdfx import contained, onnx_export, parity
from tdfx.errors import ExportError, InputError, OptionError, VerificationError
from tdfx.inputs import named_outputs
from tdfx.onnx_export import ExportReport, export_onnx


class Net(nn.Module):
    """Conv, BatchNorm and Linear; returns logits and the class."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.bn = nn.BatchNorm2d(16)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, 20)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.drop(self.bn(self.conv(x)).relu().mean((2, 3))))
        return logits, logits.argmax(1)


class Both(NamedTuple):
    mean: Tensor
    rest: Any


class Calls(nn.Module):
    """A Linear, and a forward given as a function of that layer and the inputs."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer, x)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def make_net() -> Net:
    torch.manual_seed(0)
    net = Net()
    for _ in range(3):  # BatchNorm statistics that are not the identity
        net(2 * torch.randn(16, 3, 6, 6) + 1)
    return net.eval()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 6, 6)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def run(path: Path, *inputs: Tensor) -> list[Any]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {value.name: tensor.numpy() for value, tensor in zip(session.get_inputs(), inputs, strict=True)}
    return list(session.run(None, feeds))


def assert_same(module: nn.Module, path: Path, *inputs: Tensor, rtol: float = 1e-5) -> None:
    """Every output of the file equals the eval-mode module's."""
    with torch.no_grad():
        wanted = copy.deepcopy(module).eval()(*(tensor.clone() for tensor in inputs))
    wanted = [wanted] if isinstance(wanted, Tensor) else list(wanted)
    for want, found in zip(wanted, run(path, *inputs), strict=True):
        np.testing.assert_allclose(found, want.numpy(), rtol=0, atol=rtol * float(want.abs().max()))


# --- real exports ---


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, Path, ExportReport]:
    """A network exported while in a mix of modes."""
    net = make_net().train()
    net.drop.eval()
    path = tmp_path_factory.mktemp("exported") / "new" / "model.onnx"
    return net, path, export_onnx(net, str(path), images(), opset=20)


def test_a_dynamic_batch_runs_at_any_size(exported: tuple[Net, Path, ExportReport]) -> None:
    net, path, _ = exported
    for batch in (1, 5):
        assert_same(net, path, images(batch))


def test_the_report_says_what_was_written(exported: tuple[Net, Path, ExportReport]) -> None:
    _, path, report = exported
    model = onnx.load(path)
    assert (report.path, report.batch_sizes, report.rtol) == (str(path), (2, 3), 1e-4)
    assert [report.opset] == [entry.version for entry in model.opset_import if entry.domain == ""] == [20]
    assert (report.file_bytes, report.external_data) == (path.stat().st_size, False)
    named = [output.name for output in report.outputs]
    assert named == [value.name for value in model.graph.output] == ["output_0", "output_1"]
    assert report.max_abs_diff == max(output.max_abs_diff for output in report.outputs)
    assert report.max_rel_diff == max(output.max_rel_diff for output in report.outputs) < 1e-5


def test_the_batch_axis_has_its_name(exported: tuple[Net, Path, ExportReport]) -> None:
    (value,) = onnx.load(exported[1]).graph.input
    sizes = [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
    assert sizes == ["batch", 3, 6, 6]


def test_one_file_is_written(exported: tuple[Net, Path, ExportReport]) -> None:
    assert names(exported[1].parent) == {"model.onnx"}


def test_the_file_holds_no_source_paths(exported: tuple[Net, Path, ExportReport]) -> None:
    content = exported[1].read_bytes()
    for words in (str(Path(__file__).parents[1]), str(Path.home()), str(Path(torch.__file__).parent), ".py", "Net"):
        assert words.encode() not in content, words


def test_the_callers_module_keeps_its_modes_and_statistics(exported: tuple[Net, Path, ExportReport]) -> None:
    net, _, _ = exported
    assert {name: part.training for name, part in net.named_modules()} == {
        "": True, "conv": True, "bn": True, "drop": False, "head": True
    }  # fmt: skip
    for name, value in make_net().state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=0, atol=0)


def test_an_example_of_one_row_and_an_older_opset(tmp_path: Path) -> None:
    net = make_net()
    report = export_onnx(net, tmp_path / "m.onnx", images(1), opset=18)
    model = onnx.load(tmp_path / "m.onnx")
    (entry,) = model.opset_import
    assert model.ir_version == 8  # of the same age
    assert (report.batch_sizes, report.opset, entry.version) == ((1, 3), 18, 18)
    for batch in (1, 5):
        assert_same(net, tmp_path / "m.onnx", images(batch))


def test_a_fixed_batch_takes_no_other(tmp_path: Path) -> None:
    net = nn.Linear(4, 3)
    report = export_onnx(net, tmp_path / "m.onnx", torch.randn(1, 4), dynamic=None)
    assert report.batch_sizes == (1,)
    assert_same(net, tmp_path / "m.onnx", torch.randn(1, 4))
    with pytest.raises(Exception, match="Got: 2 Expected: 1"):
        run(tmp_path / "m.onnx", torch.randn(2, 4))


def test_several_inputs_keywords_and_nested_outputs(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor, bias: Tensor | None = None, *, scale: Tensor) -> dict[str, Any]:
            z = self.layer(x) - 2 * y
            return {"sum": z * scale, "parts": (z.argmax(1), [z > 0]), "nothing": None}

    net, x = Two(), torch.randn(2, 4)
    report = export_onnx(net, tmp_path / "m.onnx", (x, x), {"scale": torch.tensor(3.0)})  # x twice, and a scalar
    assert [output.name for output in report.outputs] == ["sum", "parts_0", "parts_1_0"]
    x, y, scale = torch.randn(5, 4), torch.randn(5, 4), torch.tensor(0.5)
    wanted = net(x, y, scale=scale)
    found = run(tmp_path / "m.onnx", x, y, scale)
    np.testing.assert_allclose(found[0], wanted["sum"].detach().numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[1], wanted["parts"][0].numpy())
    np.testing.assert_array_equal(found[2], wanted["parts"][1][0].numpy())


def test_integer_inputs_stay_valid_indices(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))
    export_onnx(net, tmp_path / "m.onnx", torch.tensor([[0, 6, 3]]))
    assert_same(net, tmp_path / "m.onnx", torch.randint(0, 7, (5, 3)))


def test_a_forward_that_writes_to_its_input(tmp_path: Path) -> None:
    net, x = Calls(lambda layer, x: layer(x.mul_(2))), torch.randn(2, 4)
    kept = x.clone()
    export_onnx(net, tmp_path / "m.onnx", x)
    torch.testing.assert_close(x, kept, rtol=0, atol=0)
    assert_same(net, tmp_path / "m.onnx", torch.randn(5, 4))


def test_padded_transformer_layers_pass(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    net = nn.TransformerEncoder(layer, 1).requires_grad_(False)
    padding = torch.tensor([[False, False, True], [False, True, True]])
    export_onnx(net, tmp_path / "m.onnx", torch.randn(2, 3, 4), {"src_key_padding_mask": padding})
    assert torch.backends.mha.get_fastpath_enabled()


def test_float16(tmp_path: Path) -> None:
    net, x = nn.Linear(4, 3).half(), torch.randn(2, 4).half()
    report = export_onnx(net, tmp_path / "m.onnx", x)
    assert report.rtol == 1e-2
    assert_same(net, tmp_path / "m.onnx", torch.randn(5, 4).half(), rtol=1e-2)


def test_bfloat16_names_the_way_out(tmp_path: Path) -> None:
    net, x = nn.Linear(4, 3).bfloat16(), torch.randn(2, 4).bfloat16()
    with pytest.raises(ExportError, match=r"ONNX Runtime cannot .* in float32 \(module\.float\(\)"):
        export_onnx(net, tmp_path / "m.onnx", x)
    assert names(tmp_path) == set()


def test_what_torch_cannot_export_is_one_silent_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    net = Calls(lambda layer, x: layer(x) if x.sum() > 0 else x)
    with pytest.raises(ExportError, match="data-dependent") as caught:
        export_onnx(net, tmp_path / "new" / "m.onnx", torch.randn(2, 4))
    assert len(str(caught.value).splitlines()) == 1
    assert "control flow depends on values" in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert names(tmp_path) == set()


def test_the_exporters_chatter_is_held_back(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def chatter() -> None:
        print("printed")
        print("printed", file=sys.stderr)
        logging.getLogger("torch.onnx.chatter").error("logged")

    with contained.quiet():
        chatter()
        warnings.warn("warned", stacklevel=1)  # an error here, were it to get out
    assert (capsys.readouterr(), caplog.messages) == (("", ""), [])
    logging.getLogger("chatter").error("heard again")
    assert caplog.messages == ["heard again"]


def test_a_batch_that_the_exporter_fixes_is_refused(tmp_path: Path) -> None:
    net = Calls(lambda layer, x: layer(x) * (2.0 if x.shape[0] == 2 else 1.0))
    with pytest.raises(ExportError, match=r"batch of 2 only.*dynamic=None"):
        export_onnx(net, tmp_path / "m.onnx", torch.randn(2, 4))
    assert names(tmp_path) == set()


# --- the gate, around an export made once ---


@pytest.fixture(scope="module")
def program() -> torch.onnx.ONNXProgram:
    return onnx_export._export(make_net(), {"x": images()}, {"x": {0: "batch"}}, None)


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: torch.onnx.ONNXProgram) -> Path:
    """A path that holds an older file; whatever is exported there, torch exports ``make_net()``."""
    monkeypatch.setattr(onnx_export, "_export", lambda *_: program)
    (tmp_path / "m.onnx").write_text("older")
    return tmp_path / "m.onnx"


def assert_untouched(target: Path) -> None:
    assert target.read_text() == "older"
    assert names(target.parent) == {target.name}


def scaled(factor: float) -> Net:
    net = make_net()
    with torch.no_grad():
        net.head.weight.mul_(factor)
        net.head.bias.mul_(factor)
    return net


def test_the_older_file_is_replaced(target: Path) -> None:
    export_onnx(make_net(), target, images())
    assert_same(make_net(), target, images(4))
    assert names(target.parent) == {target.name}


def test_another_network_in_the_file_is_refused(target: Path) -> None:
    with pytest.raises(VerificationError, match=r"output 'output_0', \(2, 20\), differs") as caught:
        export_onnx(scaled(1.01), target, images())
    assert caught.value.max_rel_diff == pytest.approx(0.01 / 1.01, rel=1e-3)
    assert caught.value.max_abs_diff > 0
    assert_untouched(target)


def test_the_callers_rtol_counts(target: Path) -> None:
    report = export_onnx(scaled(1.01), target, images(), rtol=0.02)
    assert report.rtol == 0.02
    assert report.max_rel_diff == pytest.approx(0.01 / 1.01, rel=1e-3)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 5e-2), (torch.float16, 1e-2), (torch.float64, 1e-4)])
def test_the_coarsest_parameter_sets_rtol(target: Path, dtype: torch.dtype, rtol: float) -> None:
    net = make_net()
    net.register_parameter("unused", nn.Parameter(torch.zeros(1, dtype=dtype)))
    assert export_onnx(net, target, images()).rtol == rtol


def alter(monkeypatch: pytest.MonkeyPatch, change: Any, batch: int | None = None) -> None:
    """Change what ONNX Runtime returns, at one batch size or at all."""
    original = ort.InferenceSession.run

    def changed(session: Any, *args: Any) -> list[Any]:
        outputs = original(session, *args)
        return list(change(*outputs)) if batch in (None, len(outputs[0])) else list(outputs)

    monkeypatch.setattr(ort.InferenceSession, "run", changed)


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda logits, best: (logits + 0.1, best), "'output_0'.* differs"),
        (lambda logits, best: (logits, (best + 1) % 20), "'output_1'.* differs"),
        (lambda logits, best: (logits * np.nan, best), "'output_0' holds NaN or Inf in ONNX Runtime"),
        (lambda logits, best: (logits[:, :1], best), r"'output_0' is torch.float32 \(\d, 1\) in ONNX Runtime"),
        (lambda logits, best: (logits.astype(np.float64), best), "'output_0' is torch.float64"),
    ],
)
def test_other_outputs_are_refused(
    target: Path, monkeypatch: pytest.MonkeyPatch, change: Any, words: str, batch: int
) -> None:
    alter(monkeypatch, change, batch)
    with pytest.raises(VerificationError, match=words):
        export_onnx(make_net(), target, images())
    assert_untouched(target)


def test_large_integers_must_be_equal_to_the_last() -> None:
    wanted = torch.tensor([2**60])
    assert parity._parity("ids", wanted, np.array([2**60]), 1e-4).max_abs_diff == 0
    with pytest.raises(VerificationError, match="ids"):
        parity._parity("ids", wanted, np.array([2**60 + 1]), 1e-4)


def test_the_worst_batch_is_reported(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alter(monkeypatch, lambda logits, best: (logits + 0.01, best), batch=2)
    logits, best = export_onnx(make_net(), target, images(), rtol=0.1).outputs
    assert logits.max_abs_diff == pytest.approx(0.01, rel=1e-3)
    assert (best.max_abs_diff, best.max_rel_diff) == (0, 0)


@pytest.mark.parametrize(("factor", "words"), [(1e-8, "too small to compare"), (float("inf"), "NaN or Inf in the net")])
def test_outputs_that_prove_nothing_are_refused(target: Path, factor: float, words: str) -> None:
    with pytest.raises(VerificationError, match=words):
        export_onnx(scaled(factor), target, images())
    assert_untouched(target)


def test_a_missing_output_is_refused(target: Path) -> None:
    class Three(Net):
        def forward(self, x: Tensor) -> Any:
            return (*super().forward(x), x)

    net = Three()
    net.load_state_dict(make_net().state_dict())
    with pytest.raises(VerificationError, match="has 2 outputs, the network 3"):
        export_onnx(net, target, images())
    assert_untouched(target)


def test_outputs_are_called_by_their_keys_or_places() -> None:
    x = torch.ones(1)
    for outputs, wanted in (
        (x, ["output"]),
        ([x, (x,)], ["output_0", "output_1_0"]),
        (Both(x, (x, [x])), ["mean", "rest_0", "rest_1_0"]),
        ({"0": x, "a.b": x, "c": [{"d": x}]}, ["output_0", "a_b", "d"]),
    ):
        assert [*named_outputs(outputs)] == wanted


def test_names_of_outputs_are_of_nothing_else(tmp_path: Path) -> None:
    def forward(layer: nn.Linear, x: Tensor) -> dict[str, Tensor]:
        y = layer(x)
        return {"linear": y + 1, "x": x, "again": x, "val_0": y, "weight": layer.weight, "layer_weight": y * 2}

    net, x = Calls(forward), torch.randn(3, 4)
    report = export_onnx(net, tmp_path / "m.onnx", torch.randn(2, 4))
    graph = onnx.load(tmp_path / "m.onnx").graph
    names = ["linear", "output_x", "again", "val_0", "weight", "layer_weight"]
    assert [value.name for value in (*graph.input, *graph.output)] == ["x", *names]
    assert [output.name for output in report.outputs] == names
    for want, found in zip(net(x).values(), run(tmp_path / "m.onnx", x), strict=True):
        np.testing.assert_allclose(found, want.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_another_opset_than_asked_for_is_refused(target: Path) -> None:
    with pytest.raises(ExportError, match=r"opset 99 was asked for, but torch wrote 20"):
        export_onnx(make_net(), target, images(), opset=99)
    assert_untouched(target)


@pytest.mark.parametrize(
    ("owner", "name"), [(onnx.checker, "check_model"), (ort, "InferenceSession"), (onnx, "save_model")]
)
def test_what_the_tools_refuse_leaves_the_older_file(
    target: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no kernel\nwith a long trace")

    monkeypatch.setattr(owner, name, refuse)
    with pytest.raises(ExportError, match="RuntimeError: no kernel; ") as caught:
        export_onnx(make_net(), target, images())
    assert "trace" not in str(caught.value)
    assert_untouched(target)


def test_the_checker_looks_at_the_written_file(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = onnx.checker.check_model

    def check(model: Any, full_check: bool) -> None:
        seen.append((Path(model).name, full_check))
        original(model, full_check=full_check)

    monkeypatch.setattr(onnx.checker, "check_model", check)
    export_onnx(make_net(), target, images())
    assert seen == [(target.name, True)]


def test_large_weights_get_a_second_file(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "MAX_WEIGHT_BYTES", 1000)
    report = export_onnx(make_net(), target, images())
    data = target.with_name("m.onnx.data")
    assert names(target.parent) == {target.name, data.name}
    assert report.external_data
    assert report.file_bytes == target.stat().st_size + data.stat().st_size
    assert_same(make_net(), target, images(4))


def test_a_path_that_cannot_be_written_is_refused(target: Path) -> None:
    with pytest.raises(InputError, match="Not a directory"):
        export_onnx(make_net(), target / "m.onnx", images())
    assert_untouched(target)


# --- refused before any export ---


@pytest.mark.parametrize("opset", [17, True, 18.0, "18"])
def test_an_opset_must_be_an_integer_of_at_least_18(tmp_path: Path, opset: Any) -> None:
    with pytest.raises(OptionError, match=r"opset is .*18 or more"):
        export_onnx(nn.Linear(4, 3), tmp_path / "m.onnx", torch.randn(2, 4), opset=opset)


@pytest.mark.parametrize("rtol", [-1e-4, 1.0, float("nan"), "1e-4"])
def test_rtol_must_leave_something_to_check(tmp_path: Path, rtol: Any) -> None:
    with pytest.raises(OptionError, match="rtol is"):
        export_onnx(nn.Linear(4, 3), tmp_path / "m.onnx", torch.randn(2, 4), rtol=rtol)


@pytest.mark.parametrize("dynamic", ["Batch", True, 0])
def test_dynamic_is_batch_or_none(tmp_path: Path, dynamic: Any) -> None:
    with pytest.raises(OptionError, match=r"dynamic is .*'batch'"):
        export_onnx(nn.Linear(4, 3), tmp_path / "m.onnx", torch.randn(2, 4), dynamic=dynamic)


@pytest.mark.parametrize(
    ("inputs", "kwargs", "words"),
    [
        ((torch.ones(2, 4), np.ones(3)), None, r"example_inputs\[1\].* ndarray"),
        (7, None, "example_inputs.* int"),
        (torch.ones(2, 4), {"y": {"z": slice(3)}}, r"example_kwargs\['y'\]\['z'\].* slice"),
        (torch.ones(2, 4), {"y": torch.ones(2, 4)}, "do not fit the network's forward"),
        ((), None, "do not fit the network's forward"),
        (torch.ones(2, 5), None, "does not run on a batch of 2"),
        (torch.ones(0, 4), None, "at least 1"),
        (torch.tensor(1.0), None, "dimension 0"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(tmp_path: Path, inputs: Any, kwargs: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        export_onnx(nn.Linear(4, 3), tmp_path / "m.onnx", inputs, kwargs)
    assert names(tmp_path) == set()


def test_inputs_must_agree_on_the_batch(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\[2, 1\], expected one batch size.*dynamic=None"):
        export_onnx(nn.Bilinear(4, 4, 3), tmp_path / "m.onnx", (torch.ones(2, 4), torch.ones(1, 4)))


def test_a_network_for_one_batch_size_is_refused(tmp_path: Path) -> None:
    net = Calls(lambda layer, x: layer(x).reshape(2, 4))
    with pytest.raises(InputError, match=r"does not run on a batch of 3: RuntimeError.*dynamic=None"):
        export_onnx(net, tmp_path / "m.onnx", torch.randn(2, 4))


@pytest.mark.parametrize(
    ("output", "words"), [(3, "output 'output_1' .* int"), (None, None), ("none", "returns no tensor")]
)
def test_outputs_must_be_tensors(tmp_path: Path, output: Any, words: str | None) -> None:
    net = Calls(lambda layer, x: None if output == "none" else (layer(x), output))
    if words is None:  # the exporter leaves None out
        assert len(export_onnx(net, tmp_path / "m.onnx", torch.randn(2, 4)).outputs) == 1
    else:
        with pytest.raises(ExportError, match=words):
            export_onnx(net, tmp_path / "m.onnx", torch.randn(2, 4))


def test_collected_keywords_have_a_dynamic_batch(tmp_path: Path) -> None:
    class Collects(nn.Linear):
        def forward(self, x: Tensor, **more: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) + more["y"]

    net = Collects(4, 3)
    export_onnx(net, tmp_path / "m.onnx", torch.randn(2, 4), {"y": torch.randn(2, 3)})
    x, y = torch.randn(5, 4), torch.randn(5, 3)
    np.testing.assert_allclose(run(tmp_path / "m.onnx", x, y)[0], net(x, y=y).detach(), rtol=1e-5, atol=1e-6)


def test_only_modules_are_exported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="module has type function"):
        export_onnx(lambda x: x, tmp_path / "m.onnx", torch.ones(2, 4))  # type: ignore[arg-type]
