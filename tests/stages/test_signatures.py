"""Networks called with more than tensors: results are called likewise, return likewise, and are free in named sizes."""

# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import copy
import pickle
import re
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import tdfx
from tdfx.errors import CaptureError, InputError, OptionError
from tdfx.inputs import tensors

Pair = namedtuple("Pair", ["logits", "hidden"])


@dataclass
class Record:
    logits: Tensor
    hidden: tuple[Tensor, Tensor | None]


class Output(OrderedDict[str, Any]):
    """A class that torch does not know."""


class Cache:
    """Neither container nor dataclass."""

    def __init__(self, first: Tensor, length: int) -> None:
        self.layers, self.length = [first, first * 2], length


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 10)

    def layers(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.middle(F.relu(self.first(x)))))


class Nested(Layers):
    """A dictionary, a list of a tuple, and constants, one of them in the dictionary."""

    def forward(
        self, batch: dict[str, Any], pair: list[Any], negate: bool = False, mask: Tensor | None = None
    ) -> Tensor:
        y = self.layers(batch["x"] * batch["scale"] + pair[0][1])
        return -y if negate and mask is None else y


class Exported(Nested):
    """The same, with control flow that symbolic tracing does not take."""

    def forward(
        self, batch: dict[str, Any], pair: list[Any], negate: bool = False, mask: Tensor | None = None
    ) -> Tensor:
        return (
            super().forward(batch, pair, negate, mask) if len(batch["x"].shape) and batch["x"].shape[-1] > 3 else pair
        )


class Returns(Layers):
    """Returns a kind of container; ``exported`` keeps symbolic tracing out."""

    def __init__(self, kind: str, exported: bool) -> None:
        super().__init__()
        self.kind, self.exported = kind, exported

    def forward(self, x: Tensor) -> Any:
        if self.exported and x.shape[1] > 3:
            x = x + 0
        y = self.layers(x)
        if self.kind == "record":
            return Record(y, (y * 2, None))
        if self.kind in ("cache", "sized"):
            return {"logits": y, "cache": Cache(y * 3, x.shape[0] if self.kind == "sized" else 7)}
        if self.kind == "pair":
            return Pair(y, [y * 2, None])
        if self.kind == "output":
            return Output(logits=y, inner=Output(hidden=y * 2), none=None)
        return {"logits": y, "nested": [(y * 2, None)], "number": 3}


X, Y, Z = (torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
ARGS = ({"x": X, "scale": 2.0}, [(Y, Z)])
KWARGS: dict[str, Any] = {"negate": True, "mask": None}


def compressed(model: nn.Module, *example: Any, **options: Any) -> tdfx.Result:
    options = {"budget": "flops=60%", "target": None, "rank_multiple": 1, "methods": ["svd"], **options}
    return tdfx.compress(model.eval(), *example, **options)


def same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close([*tensors(found)], [*tensors(wanted)], rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "tier"), [(Nested, "fx"), (Exported, "export")])
def test_a_result_is_called_as_the_model_is(kind: type[nn.Module], tier: str, tmp_path: Path) -> None:
    model = kind()
    result = compressed(model, ARGS, KWARGS, budget="flops=100%")
    assert result.report.tier == tier
    assert any("batch['scale'] = 2.0, negate = True, mask = None" in note for note in result.report.notes)
    torch.testing.assert_close(result.module(*ARGS, **KWARGS), model(*ARGS, **KWARGS), rtol=1e-5, atol=1e-6)
    smaller = compressed(model, ARGS, KWARGS)
    wanted = smaller.module(*ARGS, **KWARGS)
    tdfx.save(smaller, tmp_path)
    loaded = tdfx.load(tmp_path).module
    for again in (copy.deepcopy(smaller.module), pickle.loads(pickle.dumps(smaller.module)), loaded):
        same(again(*ARGS, **KWARGS), wanted)
    same(tdfx.apply(model, ARGS, smaller.plan, example_kwargs=KWARGS).module(*ARGS, **KWARGS), wanted)
    report = tdfx.export_onnx(smaller.module, tmp_path / "m.onnx", ARGS, KWARGS)
    session = ort.InferenceSession(str(tmp_path / "m.onnx"))
    assert [value.name for value in session.get_inputs()] == ["x", "pair_0_0", "pair_0_1"]
    assert report.sizes == {"batch": (4, 5)}


@pytest.mark.parametrize("change", [{"negate": False}, {"mask": X}])
def test_a_result_refuses_other_constants(change: dict[str, Any]) -> None:
    module = compressed(Nested(), ARGS, KWARGS).module
    with pytest.raises((AssertionError, RuntimeError), match=r"captured|ambiguous"):
        module(*ARGS, **{**KWARGS, **change})


@pytest.mark.parametrize(
    "data",
    [
        {"x": X, "pair_0_0": Y, "pair_0_1": Z},
        [{"batch": {"x": X}, "pair": [(Y, Z)], "labels": X}],
        [({"x": X}, [(Y, Z)], X)],
        [(({"pair_0_1": Z, "pair_0_0": Y, "x": X}), X)],
    ],
)
def test_calibration_data_may_be_nested_likewise(data: Any) -> None:
    captured = tdfx.capture(Nested().eval(), ARGS, KWARGS)
    wanted = tdfx.calibrate(captured, (X, Y, Z))
    assert tdfx.calibrate(captured, data).fingerprint == wanted.fingerprint


def test_a_nested_result_is_tuned() -> None:
    result = compressed(Nested(), ARGS, KWARGS)
    data = tuple(torch.randn(64, 16) for _ in range(3))
    tuned = tdfx.tune(result, data, epochs=2, batch_size=8)
    assert not torch.equal(tuned.module(*ARGS, **KWARGS), result.module(*ARGS, **KWARGS))


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("kind", ["record", "pair", "output", "dict"])
def test_outputs_keep_their_classes(kind: str, exported: bool, tmp_path: Path) -> None:
    model = Returns(kind, exported)
    result = compressed(model, X, budget="flops=100%")
    assert result.report.tier == ("export" if exported else "fx")
    found, wanted = result.module(X), model(X)
    assert type(found) is type(wanted)
    for each, other in zip(tensors(found), tensors(wanted), strict=True):
        torch.testing.assert_close(each, other, rtol=1e-5, atol=1e-6)
    if kind == "output":
        assert list(found) == list(wanted) and type(found["inner"]) is Output
    if kind != "dict":  # which holds a number
        assert len(tdfx.export_onnx(result.module, tmp_path / "m.onnx", X).outputs) == 2


def test_objects_that_hold_tensors_are_returned_with_them(tmp_path: Path) -> None:
    model = Returns("cache", exported=True)
    result = compressed(model, X, budget="flops=100%")
    assert result.report.tier == "export"
    assert len(tdfx.export_onnx(result.module, tmp_path / "m.onnx", X).outputs) == 3
    tdfx.save(result, tmp_path)
    loaded = tdfx.load(tmp_path, model).module
    for module in (result.module, copy.deepcopy(result.module), pickle.loads(pickle.dumps(result.module)), loaded):
        found = module(X[:3])
        assert type(found["cache"]) is Cache and found["cache"].length == 7
        wanted = model(X[:3])
        torch.testing.assert_close(found["logits"], wanted["logits"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["cache"].layers, wanted["cache"].layers, rtol=1e-5, atol=1e-6)


def test_objects_that_hold_sizes_fix_them() -> None:
    captured = tdfx.capture(Returns("sized", exported=True).eval(), X)
    (note,) = captured.notes
    assert note.startswith("the batch size is fixed") and "an output holds sizes of the inputs in an object" in note


class Positions(nn.Module):
    """Tokens (batch, length) at learnt positions, 16 at most."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(20, 16), nn.Embedding(16, 16)
        self.layer, self.head = nn.Linear(16, 32), nn.Linear(32, 10)

    def forward(self, ids: Tensor) -> Tensor:
        positions = self.positions(torch.arange(self.length(ids), device=ids.device))
        return self.head(F.relu(self.layer(self.tokens(ids) + positions)))

    def length(self, ids: Tensor) -> int:
        return ids.shape[1]


class OfOneSizeInSymbolicTracing(Positions):
    def length(self, ids: Tensor) -> int:
        return 8 if isinstance(ids, fx.Proxy) else ids.shape[1]


class OfOneSize(Positions):
    def length(self, ids: Tensor) -> int:
        return 8 if isinstance(ids, fx.Proxy) or torch.compiler.is_exporting() else ids.shape[1]


IDS = torch.randint(0, 20, (2, 8), generator=torch.Generator().manual_seed(0))
SEQUENCE = {"ids": {1: "sequence"}}


@pytest.mark.parametrize(("kind", "tier"), [(Positions, "fx"), (OfOneSizeInSymbolicTracing, "export")])
def test_a_named_size_is_free_in_result_and_file(kind: type[nn.Module], tier: str, tmp_path: Path) -> None:
    result = compressed(kind(), IDS, dynamic=SEQUENCE)
    assert result.report.tier == tier
    assert "free sizes: model and graph agree at sequence = 16 too" in result.report.notes
    report = tdfx.export_onnx(result.module, tmp_path / "m.onnx", IDS, dynamic=SEQUENCE)
    assert report.sizes == {"batch": (2, 3), "sequence": (8, 16)}
    session = ort.InferenceSession(str(tmp_path / "m.onnx"))
    assert session.get_inputs()[0].shape == ["batch", "sequence"]
    ids = torch.randint(0, 20, (3, 13))
    (found,) = session.run(None, {"ids": ids.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), result.module(ids).detach(), rtol=1e-5, atol=1e-5)


def test_a_plan_does_not_depend_on_what_is_free() -> None:
    one, other = (compressed(Positions(), IDS, dynamic=dynamic).plan for dynamic in ("batch", SEQUENCE))
    assert one.candidates == other.candidates and one.structure == other.structure


def test_a_size_that_the_graph_fixes_is_refused_by_name() -> None:
    with pytest.raises(CaptureError, match=r"not of sequence = 16.*leave out of dynamic"):
        tdfx.capture(OfOneSize().eval(), IDS, dynamic=SEQUENCE, capture="fx")
    captured = tdfx.capture(OfOneSize().eval(), IDS, dynamic=SEQUENCE)
    reason = r"not of sequence = 16.*with sequence free.*leave out of dynamic"
    assert captured.tier == "inplace" and any(re.search(reason, note) for note in captured.notes)
    assert tdfx.capture(OfOneSize().eval(), IDS).tier == "fx"


def test_a_size_that_the_model_fixes_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    with pytest.raises(InputError, match=r"n = 4, but not with 8 \(RuntimeError"):
        tdfx.capture(model.eval(), torch.randn(2, 4, 4), dynamic={"input": {1: "n"}})


def test_an_exported_program_says_itself_what_is_free() -> None:
    program = torch.export.export(nn.Sequential(nn.Linear(4, 4)).eval(), (torch.randn(2, 4),))
    with pytest.raises(OptionError, match="exported program has its own free sizes"):
        tdfx.capture(program, dynamic={"input": {1: "n"}})


def test_inputs_on_another_device_are_named() -> None:
    with pytest.raises(InputError, match=r"input ids is on meta, the model on cpu; move"):
        tdfx.capture(Positions().eval(), IDS.to("meta"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("metric", ["weight", "feature", "loss"])
def test_layers_keep_their_half_dtypes(dtype: torch.dtype, metric: str) -> None:
    model = Halves().to(dtype)
    model.last.float()
    data = None if metric == "weight" else torch.randn(32, 16)
    result = compressed(model, X.to(dtype), metric=metric, calibration=data)
    dtypes = {name: value.dtype for name, value in result.module.named_parameters()}
    assert {value for name, value in dtypes.items() if not name.startswith("last")} == {dtype}
    assert {value for name, value in dtypes.items() if name.startswith("last")} == {torch.float32}
    assert not all(choice.is_dense for choice in result.plan.candidates)
    assert bool(result.module(X.to(dtype)).isfinite().all())


class Halves(Layers):
    """A head in a dtype of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.middle(F.relu(self.first(x)))).to(self.last.weight.dtype))


class Normalized(nn.Module):
    """For torch.export, with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0 if x.shape[2] > 3 else x
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def test_an_exported_trainable_result_at_full_rank_trains_as_the_original() -> None:
    model, x = Normalized(), torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    result = compressed(model, x, budget=None, ranks="energy=0.999999999", methods=["tucker2"], trainable=True)
    assert result.report.tier == "export"
    state = result.module.state_dict()
    for network in (result.module, model):
        network.train()(x).square().mean().backward()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        wanted = getattr(model.norm, name)
        torch.testing.assert_close(state[f"norm.{name}"], wanted, rtol=1e-4, atol=1e-5)
    moved = copy.deepcopy(result.module).eval().to(torch.float64).to("cpu")
    assert moved(x.double()).dtype == torch.float64
    again = compressed(
        Normalized(), x, budget=None, ranks="energy=0.999999999", methods=["tucker2"], trainable=True
    ).module
    again.load_state_dict(result.module.state_dict())
    same(again.eval()(x), result.module.eval()(x))
