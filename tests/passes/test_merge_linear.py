"""Merging neighbouring linear operators: the same function, never dearer, and only where nothing stands between."""

# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import build
from strategies import reproducible
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import tdfx
from tdfx.errors import OptionError
from tdfx.passes.capture import isolate, symbolic_trace
from tdfx.passes.fold_batch_norm import FoldBatchNorm
from tdfx.passes.merge_linear import MergedLayers, MergeLinear, merged_layer
from tdfx.passes.shape_prop import ShapeProp
from tdfx.stages.capture import capture, normalize

Shape = tuple[int, ...]
IMAGES = (2, 6, 9, 8)
ROWS = (2, 5, 12)


def layers(model: nn.Module, *shape: int, dtype: torch.dtype = torch.float64) -> list[str]:
    """Names of what the normalized graph calls, once it is checked that it computes what the model does."""
    model, x = model.to(dtype).eval(), torch.randn(shape, dtype=dtype)
    found = normalize(symbolic_trace(isolate(model)[0], (x,), {}), (x,))
    torch.testing.assert_close(found(x), model(x), rtol=1e-12, atol=1e-12)
    return [str(node.target) for node in found.graph.nodes if node.op == "call_module"]


def conv(i: int, o: int, kernel: Any = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, kernel, **options)


MERGED: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(12, 40), nn.Linear(40, 7)), ROWS),
    "linear, first bias": (lambda: nn.Sequential(nn.Linear(12, 40), nn.Linear(40, 7, bias=False)), ROWS),
    "linear, last bias": (lambda: nn.Sequential(nn.Linear(12, 40, bias=False), nn.Linear(40, 7)), ROWS),
    "no bias": (lambda: nn.Sequential(nn.Linear(12, 40, bias=False), nn.Linear(40, 7, bias=False)), ROWS),
    "identity": (lambda: nn.Sequential(nn.Linear(12, 40), nn.Identity(), nn.Dropout(), nn.Linear(40, 7)), ROWS),
    "1 x 1": (lambda: nn.Sequential(conv(6, 20), conv(20, 4)), IMAGES),
    "then 1 x 1": (lambda: nn.Sequential(conv(6, 40, (3, 2), stride=(2, 1), padding=1), conv(40, 4)), IMAGES),
    "reflected, then 1 x 1": (
        lambda: nn.Sequential(conv(6, 40, 3, padding=1, padding_mode="reflect", dilation=2), conv(40, 4)), IMAGES
    ),
    "same, then 1 x 1": (lambda: nn.Sequential(conv(6, 40, 3, padding="same"), conv(40, 4, padding="same")), IMAGES),
    "1 x 1 before": (lambda: nn.Sequential(conv(6, 40), conv(40, 4, (3, 2), stride=2, dilation=2)), IMAGES),
    "1 x 1 without bias before zeros": (
        lambda: nn.Sequential(conv(6, 40, bias=False), conv(40, 4, 3, padding=(0, 1))), IMAGES
    ),
    "1 x 1 before a border of its values": (
        lambda: nn.Sequential(conv(6, 40), conv(40, 4, 3, padding=2, padding_mode="circular")), IMAGES
    ),
    "1-d": (lambda: nn.Sequential(nn.Conv1d(6, 30, 1), nn.Conv1d(30, 4, 5)), (2, 6, 9)),
    "3-d": (lambda: nn.Sequential(nn.Conv3d(6, 30, 2), nn.Conv3d(30, 4, 1)), (2, 6, 3, 4, 5)),
    "unbatched": (lambda: nn.Sequential(conv(6, 20), conv(20, 4)), IMAGES[1:]),
    "batch norms": (
        lambda: nn.Sequential(conv(6, 20), nn.BatchNorm2d(20), conv(20, 4), nn.BatchNorm2d(4)), IMAGES
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MERGED)
def test_neighbours_are_merged_into_the_last(name: str) -> None:
    factory, shape = MERGED[name]
    model = factory()
    last = [key for key, layer in model.named_children() if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)][-1]
    assert layers(model, *shape) == [last]


class Reading(nn.Module):
    """Two layers and a function that calls them."""

    def __init__(self, function: Callable[[Any, Tensor], Any], first: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last, self.function = first, last, function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def of_linear(function: Callable[[Any, Tensor], Any]) -> Callable[[], nn.Module]:
    return lambda: Reading(function, nn.Linear(12, 12), nn.Linear(12, 12))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    model[3].weight = model[1].weight
    return model


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def joined(net: Any, x: Tensor) -> Tensor:
    y = net.first(x)
    return net.last(y) + y


SEPARATE: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "dearer": (lambda: nn.Sequential(nn.Linear(12, 3), nn.Linear(3, 12)), ROWS),
    "as dear": (lambda: nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)), (3, 4)),
    "fewer products, more parameters": (
        lambda: nn.Sequential(conv(8, 6, bias=False), conv(6, 8, 3, stride=3, bias=False)), (1, 8, 9, 9)
    ),
    "activation": (lambda: nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 7)), ROWS),
    "function": (of_linear(lambda net, x: net.last(net.first(x).relu())), ROWS),
    "second reader": (of_linear(joined), ROWS),
    "first called twice": (of_linear(lambda net, x: net.last(net.first(net.first(x).relu()))), ROWS),
    "last called twice": (of_linear(lambda net, x: net.last(net.last(net.first(x)).relu())), ROWS),
    "weight read": (of_linear(lambda net, x: net.last(net.first(x)) * net.first.weight.sum()), ROWS),
    "bias read": (of_linear(lambda net, x: net.last(net.first(x)) + net.last.bias), ROWS),
    "tied": (tied, ROWS),
    "another kind of layer": (lambda: nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 7)), ROWS),
    "bias before zeros": (lambda: nn.Sequential(conv(6, 40), conv(40, 4, 3, padding=1)), IMAGES),
    "bias before the same size": (lambda: nn.Sequential(conv(6, 40), conv(40, 4, 3, padding="same")), IMAGES),
    "1 x 1 that pads": (lambda: nn.Sequential(conv(6, 40, padding=1, bias=False), conv(40, 4, 3, padding=1)), IMAGES),
    "1 x 1 that pads after": (lambda: nn.Sequential(conv(6, 40, 3), conv(40, 4, padding=1)), IMAGES),
    "1 x 1 with strides": (lambda: nn.Sequential(conv(6, 40, stride=2), conv(40, 4, 3)), IMAGES),
    "two kernels": (lambda: nn.Sequential(conv(6, 40, 3), conv(40, 4, (1, 2))), IMAGES),
    "groups before": (lambda: nn.Sequential(conv(6, 40, 3, groups=2), conv(40, 4)), IMAGES),
    "groups after": (lambda: nn.Sequential(conv(6, 40), conv(40, 4, 3, groups=2)), IMAGES),
    "other kinds": (lambda: nn.Sequential(conv(6, 40), nn.Linear(8, 2)), IMAGES),
}  # fmt: skip


@pytest.mark.parametrize("name", SEPARATE)
def test_layers_that_cannot_be_one_or_should_not_stay(name: str) -> None:
    factory, shape = SEPARATE[name]
    model = factory()
    expected = {key for key, part in model.named_modules() if any(True for _ in part.parameters(recurse=False))}
    assert expected <= set(layers(model, *shape))


def test_a_layer_that_its_attention_reads_directly_stays() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.last = nn.MultiheadAttention(12, 2), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.attention.out_proj(x)) + self.attention(x, x, x)[0]

    assert layers(Inside(), *ROWS) == ["attention.out_proj", "last", "attention"]


def test_a_layer_with_a_forward_of_its_own_stays() -> None:
    graph = fx.Graph()
    graph.output(graph.call_module("1", (graph.call_module("0", (graph.placeholder("x"),)),)))
    module = fx.GraphModule(nn.Sequential(Halved(12, 40), nn.Linear(40, 7)).eval(), graph)
    assert len(list(normalize(module, (torch.randn(2, 12),)).children())) == 2


def test_layers_with_hooks_stay() -> None:
    for place in (0, 1):
        model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)).eval()
        model[place].register_forward_hook(lambda module, args, output: None)
        x = torch.randn(2, 12)
        assert len(list(normalize(symbolic_trace(model, (x,), {}), (x,)).children())) == 2


def test_a_product_that_overflows_is_not_taken() -> None:
    model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 1, bias=False)).half().eval()
    nn.init.constant_(model[0].weight, 1000.0)
    nn.init.constant_(model[1].weight, 1000.0)
    x = torch.tensor([[1e-3]], dtype=torch.float16)
    assert len(list(normalize(symbolic_trace(model, (x,), {}), (x,)).children())) == 2


def test_complex_layers_stay() -> None:
    first, last = (nn.Linear(i, o, dtype=torch.complex128) for i, o in ((3, 8), (8, 2)))
    x = torch.randn(4, 3, dtype=torch.complex128)
    traced = symbolic_trace(nn.Sequential(first, last).eval(), (x,), {})
    assert len(list(normalize(traced, (x,)).children())) == 2


@pytest.mark.parametrize("widths", [(9, 30, 20, 5), (9, 30, 5, 20), (30, 4, 40, 4, 30)])
def test_longer_chains_end_where_no_merge_is_cheaper(widths: Shape) -> None:
    model = nn.Sequential(*(nn.Linear(i, o, bias=False) for i, o in pairwise(widths)))
    sizes = [model[int(name)].out_features for name in layers(copy.deepcopy(model), 3, widths[0])]
    least = {(9, 30, 20, 5): [5], (9, 30, 5, 20): [5, 20], (30, 4, 40, 4, 30): [4, 30]}[widths]
    assert sizes == least


def test_biases_and_trained_flags_are_kept() -> None:
    first, last = nn.Linear(3, 8, bias=False).requires_grad_(False), nn.Linear(8, 2, bias=False)
    found = merged_layer(first, last)
    assert found is not None and found.bias is None and found.weight.requires_grad
    found = merged_layer(first, last.requires_grad_(False))
    assert found is not None and not found.weight.requires_grad
    assert not isinstance(found, nn.Conv2d) and repr(found) == repr(nn.Linear(3, 2, bias=False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_products_are_rounded_once(dtype: torch.dtype) -> None:
    first, last = nn.Linear(50, 90, dtype=dtype), nn.Linear(90, 20, dtype=dtype)
    found = merged_layer(first, last)
    assert found is not None
    exact = last.weight.detach().double() @ first.weight.detach().double()
    torch.testing.assert_close(found.weight.detach(), exact.to(dtype), rtol=0, atol=0)
    shift = last.weight.detach().double() @ first.bias.detach().double() + last.bias.detach().double()
    torch.testing.assert_close(found.bias.detach(), shift.to(dtype), rtol=0, atol=0)


@st.composite
def chains(draw: st.DrawFn) -> nn.Sequential:
    """Up to five convolutions of drawn widths, kernels, paddings and biases, with what is inactive between them."""
    channels, parts = 3, list[nn.Module]()
    for _ in range(draw(st.integers(2, 5))):
        out, kernel = draw(st.integers(1, 9)), draw(st.sampled_from((1, 1, 3)))
        mode = draw(st.sampled_from(("zeros", "zeros", "replicate")))
        padding = draw(st.sampled_from((0, kernel // 2)))
        options = {"stride": draw(st.sampled_from((1, 1, 2))), "groups": draw(st.sampled_from((1, channels)))}
        out *= options["groups"]
        bias = draw(st.booleans())
        parts.append(nn.Conv2d(channels, out, kernel, padding=padding, padding_mode=mode, bias=bias, **options))
        parts += draw(st.sampled_from(([], [nn.Identity()], [nn.Dropout2d()], [nn.ReLU()], [nn.BatchNorm2d(out)])))
        channels = out
    return nn.Sequential(*parts)


@reproducible(20)
@given(chains())
def test_drawn_chains_compute_the_same_and_never_cost_more(model: nn.Sequential) -> None:
    model, x = model.double().eval(), torch.randn(2, 3, 13, 12, dtype=torch.float64)
    traced = symbolic_trace(isolate(model)[0], (x,), {})
    metas = ShapeProp((x,)).run(traced)
    folded = FoldBatchNorm(metas).run(traced)
    found = MergeLinear(metas).run(folded)
    torch.testing.assert_close(found(x), model(x), rtol=1e-9, atol=1e-9)
    assert sum(p.numel() for p in found.parameters()) <= sum(p.numel() for p in folded.parameters())
    assert flops(found, x) <= flops(folded, x)


def flops(module: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops()


# The stages


class Classifier(nn.Module):
    """Features, a head of three linear layers, and one that does not belong."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.conv = nn.Conv2d(3, 48, 1), nn.Conv2d(48, 32, 3)
        self.fc1, self.drop, self.fc2 = nn.Linear(32, 64), nn.Dropout(), nn.Linear(64, 64)
        self.fc3, self.out = nn.Linear(64, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.expand(x)).relu().mean((2, 3))
        return self.out(F.relu(self.fc3(self.fc2(self.drop(self.fc1(x))))))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return Classifier().eval()


def test_what_was_merged_is_said_and_the_cost_before_is_that_of_the_model() -> None:
    model = classifier()
    captured = capture(model, X)
    profiled = tdfx.profile(captured, methods=["svd", "channel_svd"], rank_multiple=1)
    assert [site.name for site in profiled.sites] == ["conv", "fc3", "out"]
    reasons = {entry.layer: entry.reason for entry in captured.skipped}
    said = "fc1, fc2 and fc3 were merged: fc3 computes all of it, with 1.06K in place of 8.35K parameters"
    assert (reasons["fc1"], reasons["fc2"]) == (said, said)
    assert "expand and conv were merged" in reasons["expand"]
    assert profiled.before.params == sum(p.numel() for p in model.parameters())
    assert profiled.before.flops == flops(model, X)
    planned = tdfx.plan(profiled, "flops=100%")
    result = tdfx.apply(model, X, planned)
    assert all(candidate.is_dense for candidate in result.plan.candidates)
    assert result.after.params == sum(p.numel() for p in result.module.parameters()) < profiled.before.params
    assert result.after.flops == flops(result.module, X) < profiled.before.flops
    torch.testing.assert_close(result.module(X), model(X), rtol=1e-4, atol=1e-6)
    assert said in str(result.report)


def test_merged_layers_are_compressed_saved_and_loaded(tmp_path: Any) -> None:
    model = classifier()
    result = tdfx.compress(model, X, budget="flops=4%", methods=["svd", "channel_svd"], rank_multiple=1, target=None)
    assert result.after.macs <= 0.04 * result.before.macs
    assert not all(candidate.is_dense for candidate in result.plan.candidates)
    tdfx.save(result, tmp_path / "result")
    torch.testing.assert_close(tdfx.load(tmp_path / "result").module(X), result.module(X), rtol=0, atol=0)
    again = tdfx.apply(model, X, tdfx.Plan.from_json(result.plan.to_json()))
    torch.testing.assert_close(again.module(X), result.module(X), rtol=0, atol=0)


def test_calibration_sees_the_merged_layer() -> None:
    data = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    moments = tdfx.calibrate(capture(classifier(), X), data, metric="feature")
    result = tdfx.compress(classifier(), X, budget="flops=30%", calibration=moments, methods=["svd", "channel_svd"])
    assert moments.sites["fc3"].mean.shape == (32,)
    assert result.after.macs <= 0.3 * result.before.macs


def test_merged_layers_can_be_named_in_globs() -> None:
    captured = capture(classifier(), X)
    assert "fc3" in {site.name for site in tdfx.profile(captured, methods=["svd"], exclude="fc1").sites}
    with pytest.raises(OptionError, match="fc4"):
        tdfx.profile(captured, methods=["svd"], exclude="fc4")


def test_a_result_that_trains_is_not_merged() -> None:
    captured = capture(classifier(), X, trainable=True)
    assert {"expand", "fc1", "fc2"} <= dict(captured.module.named_modules()).keys()
    assert captured.module_workloads == captured.workloads


def test_a_compressed_network_is_not_multiplied_out() -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 64)).eval()
    x = torch.randn(2, 16, 4, 4)
    result = tdfx.compress(model, x, budget="flops=50%", rank_multiple=1, target=None)
    captured = capture(result.module, x)
    assert MergedLayers().run(captured.module) == ()
    assert set(captured.module.state_dict()) == set(result.module.state_dict())


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "unet", "language_model"])
def test_networks_without_such_neighbours_stay_as_they_are(name: str) -> None:
    # Attention stands between the values and their projection in the language model.
    model, args = build(name)
    assert MergedLayers().run(capture(model, args).module) == ()
