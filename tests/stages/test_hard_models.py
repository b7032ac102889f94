"""Models that tempt a tracer to be silently wrong, and models that must be refused in so many words."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tdfx
from tdfx.stages.capture import capture
from tdfx.stages.compress import compress

METHODS = ["svd", "spatial_svd"]
IMAGE = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))


class Convolving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3, padding=1)


class InPlaceOnAlias(Convolving):
    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        y = self.conv(x)
        rows = y.flatten(1)
        rows += bias
        return y


class InPlaceResidual(Convolving):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        kept = y
        y *= 2
        return torch.relu(y) + kept


class Autocast(Convolving):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.conv(x)


class Counting(Convolving):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x)


class KeywordBatchNorm(Convolving):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(input=self.conv(x))


class NamedGraph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.graph = nn.Conv2d(16, 32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.graph(x)


def test_an_update_in_place_reaches_every_name_of_the_tensor() -> None:
    model = InPlaceOnAlias().eval()
    hidden, shown = torch.zeros(2, 1), torch.full((2, 1), 5.0)  # an update by zero hides what is wrong
    result = compress(model, (IMAGE, hidden), budget="flops=100%", methods=METHODS)
    for module in (result.module, pickle.loads(pickle.dumps(result.module))):
        torch.testing.assert_close(module(IMAGE, shown), model(IMAGE, shown), rtol=0, atol=1e-5)
    residual = InPlaceResidual().eval()
    torch.testing.assert_close(capture(residual, IMAGE).module(IMAGE), residual(IMAGE), rtol=0, atol=1e-5)


def test_autocast_in_forward_is_refused_by_name() -> None:
    with pytest.raises(tdfx.CaptureError, match=r"test_hard_models.py:\d+ in forward: .*autocast.*"):
        capture(Autocast(), IMAGE, capture="fx")
    assert capture(Autocast(), IMAGE).tier == "inplace"


def test_a_graph_that_returns_another_dtype_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdfx.passes.capture._autocast", lambda: (False,))
    with pytest.raises(tdfx.VerificationError, match=r"\(torch.float32\) differs from the model's \(torch.bfloat16\)"):
        capture(Autocast(), IMAGE, capture="fx")


@pytest.mark.parametrize(
    ("layer", "example"), [(nn.Linear(64, 64), torch.randn(8, 64)), (nn.Conv2d(16, 32, 3, padding=1), IMAGE)]
)
def test_a_model_that_is_one_layer_is_compressed(layer: nn.Module, example: Tensor) -> None:
    result = compress(layer, example, budget="flops=50%", methods=METHODS, target=None)
    assert [candidate.site for candidate in result.plan.candidates] == ["layer"]
    assert 2 * result.after.macs <= result.before.macs
    assert result.skipped == ()


def test_cost_before_is_of_the_model_as_given() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 32, 3)))
    result = compress(model, IMAGE, budget="params=100%", methods=METHODS)
    assert result.before.params == sum(parameter.numel() for parameter in model.parameters()) == 32 * 16 * 9 + 2 * 32
    assert result.before.weight_bytes == 4 * result.before.params


def test_a_buffer_that_forward_updates_is_told_and_stays() -> None:
    model = Counting().eval()
    captured = capture(model, IMAGE)
    assert captured.notes == ("calls: forward updates this buffer in eval mode; the result does not",)
    assert float(model.calls) == 0
    assert capture(model, IMAGE).weights == captured.weights


def test_frozen_layers_stay_frozen() -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval()
    model[0].requires_grad_(False)
    module = compress(model, IMAGE, budget="flops=60%", methods=METHODS, target=None).module
    learns = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    assert learns == {name: name.startswith("3.") for name in learns}
    assert len(learns) > 3


def test_batch_norm_called_by_keyword_is_folded() -> None:
    captured = capture(KeywordBatchNorm().eval(), IMAGE)
    assert [node.target for node in captured.module.graph.nodes if node.op == "call_module"] == ["conv"]
    assert captured.skipped == ()


def test_a_result_inside_another_model_is_captured() -> None:
    inner = compress(nn.Sequential(nn.Conv2d(16, 32, 3)), IMAGE, budget="flops=60%", methods=METHODS).module
    outer = nn.Sequential(inner, nn.Conv2d(32, 32, 3)).eval()
    assert {"0.0.spatial_svd.vertical", "1"} <= {str(node.target) for node in capture(outer, IMAGE).module.graph.nodes}


def nan_statistics() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32)).eval()
    model[1].running_var[3] = float("nan")
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Conv2d(16, 32, 3))


@pytest.mark.parametrize(
    ("factory", "example", "error", "message"),
    [
        (nan_statistics, IMAGE, tdfx.WeightError, "layer 1: 1 of 32 values of 1.running_var are NaN"),
        (on_meta, IMAGE, tdfx.InputError, "0.weight has no values, only a shape: it is on the meta device"),
        (lambda: nn.Sequential(nn.Conv2d(16, 32, 3)), IMAGE[:0], tdfx.InputError, r"example input input .* is empty"),
        (
            lambda: nn.Sequential(nn.Conv2d(16, 32, 3)),
            IMAGE / 0 * 0,
            tdfx.VerificationError,
            "holds NaN on the example",
        ),
    ],
)
def test_refusals_say_what_is_wrong(
    factory: Callable[[], nn.Module], example: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        capture(factory(), example)


def test_a_layer_called_as_something_of_torch_fx_is_compressed_in_place() -> None:
    with pytest.raises(tdfx.CaptureError, match=r"NamedGraph cannot be captured.*child module 'graph'"):
        capture(NamedGraph(), IMAGE, capture="fx")
    model = NamedGraph().eval()
    result = compress(model, IMAGE, budget="flops=60%", methods=METHODS)
    assert [candidate.site for candidate in result.plan.candidates] == ["graph"]
    assert result.report.tier == "inplace"


def test_torchscript_is_refused() -> None:
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(tdfx.CaptureError, match="TorchScript"):
        capture(scripted, torch.randn(2, 4))


def test_a_budget_on_what_a_model_has_none_of_is_unreachable_in_words() -> None:
    with pytest.raises(tdfx.BudgetError, match=r"flops: asked 0, .* params: asked 4, least reachable on its own 14"):
        compress(nn.Embedding(10, 4), torch.zeros(2, 3, dtype=torch.long), budget="flops=50%,params=10%")


@pytest.mark.parametrize(
    "option", [{"methods": 5}, {"target": ["x"]}, {"cache_dir": 5}, {"progress": "yes"}, {"seed": 2**70}]
)
def test_options_of_the_wrong_type_are_named(option: dict[str, object]) -> None:
    with pytest.raises(tdfx.OptionError, match=next(iter(option))):
        compress(nn.Linear(64, 64), torch.randn(4, 64), budget="flops=50%", **option)  # type: ignore[arg-type]
