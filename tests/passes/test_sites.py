"""Sites: specifications as the layers are and as they are called, and a sentence for every layer that is none."""

# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, build
from torch import Tensor, fx, nn

from tdfx.passes.shape_prop import ShapeProp, TensorMeta, bind
from tdfx.passes.sites import FindSites, layer_spec
from tdfx.records.layer import Call, LayerSpec, Lookup, Site, Skipped
from tdfx.stages.capture import capture

Found = tuple[tuple[Site, ...], tuple[Skipped, ...]]


def find(model: nn.Module, *args: Tensor) -> Found:
    module = capture(model, args).module
    return FindSites(ShapeProp(args).run(module)).run(module)


def skips(model: nn.Module, *args: Tensor) -> dict[str, str]:
    sites, skipped = find(model, *args)
    assert {site.name for site in sites}.isdisjoint(entry.layer for entry in skipped)
    return {entry.layer: entry.reason for entry in skipped}


def observed(module: fx.GraphModule, args: tuple[Tensor, ...]) -> dict[str, list[Call]]:
    """Shapes of the calls of every Linear and convolution, seen by hooks."""
    calls: dict[str, list[Call]] = {}
    handles = [
        part.register_forward_hook(
            lambda part, given, output, name=name: calls.setdefault(name, []).append(
                Call(tuple(given[0].shape), tuple(output.shape))
            )
        )
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear | nn.modules.conv._ConvNd | nn.Embedding)
    ]
    with torch.no_grad():
        module(*args)
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_specifications_are_those_of_the_layers_that_run(name: str) -> None:
    model, args = build(name)
    module = capture(model, args).module
    sites, _ = FindSites(ShapeProp(args).run(module)).run(module)
    calls = observed(module, args)
    order = [str(node.target) for node in module.graph.nodes if node.op == "call_module"]
    assert [site.name for site in sites] == list(
        dict.fromkeys(path for path in order if path in {s.name for s in sites})
    )
    for site in sites:
        layer, spec = module.get_submodule(site.name), site.layer
        kind = type(layer).__name__.lower().replace("transpose", "_transpose")
        assert (site.kind, spec.kind, spec.name) == (spec.kind, kind, site.name)
        assert list(spec.calls) == calls[site.name]
        assert spec.called_on(tuple(call.input_shape for call in spec.calls)) == spec
        assert spec.params == sum(parameter.numel() for parameter in layer.parameters())
        assert spec.weight_bytes == sum(parameter.nbytes for parameter in layer.parameters())
        shapes = (call.input_shape if spec.is_transposed else call.output_shape for call in spec.calls)
        weight = layer.get_parameter("weight")
        assert spec.macs == (0 if spec.lookup else sum(map(math.prod, shapes)) * weight[0].numel())


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_layer_with_a_weight_matrix_is_a_site_or_has_a_reason(name: str) -> None:
    model, args = build(name)
    captured = capture(model, args)
    sites, skipped = FindSites(ShapeProp(args).run(captured.module)).run(captured.module)
    named = [
        *(layer.name for site in sites for layer in site.layers),
        *(entry.layer for entry in (*captured.skipped, *skipped)),
    ]
    matrices = [path for path, parameter in model.named_parameters() if parameter.dim() >= 2]
    assert matrices
    for path in matrices:
        holder, _, weight = path.rpartition(".")
        names, expected = [holder, path], 1
        if weight == "in_proj_weight":  # the packed weight of attention becomes that of three layers
            names, expected = [f"{holder}.{part}_proj" for part in "qkv"], 3
        elif "_ih_l" in weight or "_hh_l" in weight:  # of both directions
            layer = weight.removesuffix("_reverse").rpartition("_")[2]
            names = [f"{holder}.ih_{layer}" if "_ih_" in weight else f"{holder}.{layer}"]
        assert sum(map(named.count, names)) == expected, path


def test_options_of_a_convolution() -> None:
    layer = nn.Conv2d(
        4, 6, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=False, padding_mode="reflect"
    ).double()
    assert layer_spec("a.b", layer, ()) == LayerSpec(
        name="a.b",
        kind="conv2d",
        in_channels=4,
        out_channels=6,
        kernel_size=(3, 5),
        stride=(2, 1),
        padding=(1, 2),
        padding_mode="reflect",
        dilation=(1, 2),
        groups=1,
        bias=False,
        dtype="float64",
    )
    assert layer_spec("x", nn.Conv1d(4, 6, 3, padding="same", groups=2), ()).padding == "same"


def test_options_of_a_transposed_convolution() -> None:
    layer = nn.ConvTranspose2d(4, 6, (3, 5), (2, 3), (1, 2), (1, 2), 2, dilation=(1, 2))
    spec = layer_spec("up", layer, ())
    assert spec == LayerSpec(
        "up", "conv_transpose2d", 4, 6, (3, 5), (2, 3), (1, 2), dilation=(1, 2), groups=2, bias=True,
        output_padding=(1, 2),
    )  # fmt: skip
    assert spec.parameter_shape == layer.weight.shape
    x = torch.randn(2, 4, 5, 3)
    assert spec.output_shape(tuple(x.shape)) == layer(x).shape
    assert layer_spec("x", nn.Conv1d(4, 6, 3, groups=2), ()).groups == 2
    assert layer_spec("x", nn.Conv3d(4, 6, 3), ()).padding == (0, 0, 0)


def test_options_of_a_linear_layer() -> None:
    spec = layer_spec("a", nn.Linear(4, 6, dtype=torch.bfloat16), ())
    assert spec == LayerSpec("a", "linear", 4, 6, bias=True, dtype="bfloat16")


class Subclass(nn.Conv2d):
    """A stock forward in a class of the user's."""


def test_a_subclass_with_a_stock_forward_and_unbatched_inputs_are_sites() -> None:
    ((site,), skipped) = find(nn.Sequential(Subclass(3, 4, 3)), torch.randn(3, 6, 6))
    assert site.layer.calls == (Call((3, 6, 6), (4, 4, 4)),)
    assert site.layer.macs == 16 * 4 * 27
    assert skipped == ()


class Apply(nn.Module):
    """A function of layers and inputs as a network."""

    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(layers)

    def forward(self, *xs: Tensor) -> Tensor:
        return self.function(*self.layers, *xs)


X = torch.randn(2, 4, 6)
TOKENS = torch.zeros(2, 3, dtype=torch.long)


def only(layer: nn.Module) -> nn.Module:
    return Apply(lambda layer, x: layer(x), layer)


def first(layer: nn.Module) -> nn.Module:
    return Apply(lambda layer, x: layer(x)[0], layer)


def attention() -> nn.Module:
    """Attention that is not unpacked."""
    return Apply(lambda layer, x: layer(x, x, x)[0], nn.MultiheadAttention(6, 2, batch_first=True, add_zero_attn=True))


class OwnConvolution(nn.Conv1d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv1d(x, weight / 2, bias)


class OwnPadding(nn.ConvTranspose1d):
    def _output_padding(self, input: Tensor, output_size: list[int] | None, *args: Any) -> list[int]:
        return [0]


def integer_linear() -> nn.Module:
    layer = nn.Linear(3, 5, bias=False)
    layer.weight = nn.Parameter(torch.ones(5, 3, dtype=torch.long), requires_grad=False)
    return only(layer)


UNSUPPORTED: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "depthwise": (
        lambda: only(nn.Conv1d(4, 8, 7, groups=4, padding=3)),
        X,
        "a depthwise 7 convolution is cheap already; kernels of 5 x 5 and more are decomposed",
    ),
    "depthwise 3d": (
        lambda: only(nn.Conv3d(4, 8, 5, groups=4, padding=2)),
        torch.randn(1, 4, 3, 3, 3),
        "depthwise convolutions are decomposed in two dimensions only",
    ),
    "max_norm": (lambda: only(nn.Embedding(5, 3, max_norm=1.0)), TOKENS, "it rescales its rows to max_norm"),
    "max": (lambda: only(nn.EmbeddingBag(5, 3, mode="max")), TOKENS, "a bag's maximum is not linear in its rows"),
    "attention": (
        attention,
        X,
        "attention with add_bias_kv or add_zero_attn is not compressed; without these two it is",
    ),
    "transposed of its own": (lambda: only(OwnPadding(4, 3, 3)), X, "OwnPadding has a forward of its own"),
    "transposed to a size": (
        lambda: Apply(lambda layer, x: layer(x, output_size=(13,)), nn.ConvTranspose1d(4, 3, 3, 2)),
        X,
        "it is called with output_size, which a chain does not take; give the layer output_padding instead",
    ),
    "transposed to another's size": (
        lambda: Apply(lambda layer, x: layer(x, x.size()), nn.ConvTranspose1d(4, 3, 3, padding=1)),
        X,
        "it is called with output_size",
    ),
    "depthwise transposed": (
        lambda: only(nn.ConvTranspose1d(4, 8, 7, 2, groups=4)),
        X,
        "a depthwise 7 convolution is cheap already",
    ),
    "bilinear": (
        lambda: Apply(lambda layer, x: layer(x, x), nn.Bilinear(6, 6, 3)),
        X,
        "Bilinear layers are not compressed",
    ),
    "own convolution": (lambda: only(OwnConvolution(4, 4, 3)), X, "OwnConvolution has a forward of its own"),
    "integers": (integer_linear, TOKENS, "its weight is int64; expected one of float64, float32, float16, bfloat16"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_layers_of_other_kinds_are_skipped_with_a_sentence(name: str) -> None:
    factory, x, reason = UNSUPPORTED[name]
    assert skips(factory().eval(), x)["layers.0"].startswith(reason)


@pytest.mark.parametrize(
    ("groups", "kernel", "reason"),
    [
        (2, (3, 3), None),
        (4, (3, 3), "a depthwise 3 x 3 convolution is cheap already; kernels of 5 x 5 and more are decomposed"),
        (4, (7, 3), "a depthwise 7 x 3 convolution is cheap already; kernels of 5 x 5 and more are decomposed"),
        (4, (5, 5), None),
    ],
)
def test_grouped_convolutions_are_sites_but_for_small_depthwise_ones(
    groups: int, kernel: tuple[int, int], reason: str | None
) -> None:
    found = skips(only(nn.Conv2d(4, 8, kernel, groups=groups)).eval(), torch.randn(2, 4, 9, 9))
    assert found.get("layers.0") == reason


def linears(**shared: str) -> tuple[nn.Linear, nn.Linear]:
    one, other = nn.Linear(6, 6), nn.Linear(6, 6)
    for name in shared:
        setattr(other, name, getattr(one, name))
    return one, other


@pytest.mark.parametrize("tied", [("bias",), ("weight", "bias")])
def test_layers_that_share_a_bias_are_skipped(tied: tuple[str, ...]) -> None:
    found = skips(Apply(lambda a, b, x: a(b(x)), *linears(**dict.fromkeys(tied, "tied"))), X)
    assert found == {
        f"layers.{one}": f"it shares parameters with layers.{other}; a chain for one of them would break the tie; "
        "give it a copy of its own"
        for one, other in ((0, 1), (1, 0))
    }


def test_layers_that_share_a_weight_are_one_site() -> None:
    ((site,), skipped) = find(Apply(lambda a, b, x: a(b(x)), *linears(weight="tied")), X)
    assert skipped == ()
    assert (site.name, site.kind) == ("layers.1", "linear")  # in the order of execution
    assert [(layer.name, layer.tied, layer.params) for layer in site.layers] == [
        ("layers.1", False, 42),
        ("layers.0", True, 6),
    ]
    assert not any(site.is_turned(layer) for layer in site.layers)


def test_a_head_tied_to_an_embedding_is_of_its_site() -> None:
    embedding, head = nn.Embedding(5, 6, padding_idx=1), nn.Linear(6, 5)
    head.weight = embedding.weight
    model = Apply(lambda embedding, head, x: head(embedding(x)), embedding, head)
    ((site,), skipped) = find(model, TOKENS)
    assert skipped == ()
    assert (site.name, site.kind, site.layer.lookup) == ("layers.0", "embedding", Lookup(padding_idx=1))
    assert [layer.weight_shape for layer in site.layers] == [(6, 5), (5, 6)]
    assert [site.is_turned(layer) for layer in site.layers] == [False, True]
    assert sum(layer.params for layer in site.layers) == sum(parameter.numel() for parameter in model.parameters())
    assert [layer.macs for layer in site.layers] == [0, 6 * 30]


@pytest.mark.parametrize("reads", ["a function", "another layer's obstacle"])
def test_a_tie_with_what_cannot_follow_is_skipped(reads: str) -> None:
    embedding, head = nn.Embedding(5, 6, max_norm=None if reads == "a function" else 9.0), nn.Linear(6, 5, bias=False)
    head.weight = embedding.weight

    def function(embedding: nn.Embedding, head: nn.Linear, x: Tensor) -> Tensor:
        output: Tensor = head(embedding(x))
        return output + head.weight.sum() if reads == "a function" else output

    found = skips(Apply(function, embedding, head), TOKENS)
    assert found["layers.1"].startswith("it shares parameters with ")


def test_options_of_embeddings() -> None:
    spec = layer_spec("a", nn.Embedding(4, 6, padding_idx=-1, scale_grad_by_freq=True, sparse=True).half(), ())
    lookup = Lookup(padding_idx=3, scale_grad_by_freq=True, sparse=True)
    assert spec == LayerSpec("a", "embedding", 4, 6, dtype="float16", lookup=lookup)
    bag = layer_spec("a", nn.EmbeddingBag(4, 6, mode="sum", include_last_offset=True), ())
    assert bag.lookup == Lookup(mode="sum", include_last_offset=True)
    assert bag.kind == "embeddingbag"


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_layer_whose_parameter_is_read_directly_is_skipped(name: str) -> None:
    found = skips(Apply(lambda layer, x: layer(x) + getattr(layer, name).sum(), nn.Linear(6, 6)), X)
    assert found["layers.0"].startswith("it shares parameters with a function in forward;")


def test_a_parameter_of_the_network_that_is_a_layers_too() -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.kernel = self.layer.weight

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.layer(x), self.kernel)

    ((site,), skipped) = find(Held(), X)
    assert ([layer.name for layer in site.layers], skipped) == (["layer", "kernel"], ())


def test_a_layer_inside_another_that_is_called_too_is_skipped() -> None:
    layer = nn.MultiheadAttention(6, 2, add_zero_attn=True)
    found = skips(Apply(lambda layer, x: layer(x, x, x)[0] + layer.out_proj(x), layer).eval(), X)
    assert found["layers.0.out_proj"].startswith("it shares parameters with layers.0;")


def test_a_shared_layer_is_one_site_with_all_its_calls() -> None:
    model = Apply(lambda layer, x, y: layer(x).sum() + layer(y).sum() + layer(x).sum(), nn.Linear(6, 5))
    ((site,), _) = find(model, X, torch.randn(3, 6))
    assert [call.input_shape for call in site.layer.calls] == [(2, 4, 6), (3, 6), (2, 4, 6)]
    assert site.layer.macs == (8 + 3 + 8) * 30


def test_shapes_are_of_every_tensor_and_inputs_are_left_alone() -> None:
    def write(layer: Any, x: Tensor) -> Tensor:
        x.mul_(2)
        return layer(F.dropout(x)).half().max(1).values

    model, x, kept = Apply(write, nn.Linear(6, 5)), X.clone(), torch.random.get_rng_state()
    module = capture(model, x).module
    metas = ShapeProp(bind(module, (x,), {})).run(module)
    assert metas["layers_0"] == TensorMeta((2, 4, 5), torch.float32)
    assert metas["half"] == TensorMeta((2, 4, 5), torch.float16)
    assert "max_1" not in metas
    torch.testing.assert_close(x, X, rtol=0, atol=0)
    torch.testing.assert_close(torch.random.get_rng_state(), kept, rtol=0, atol=0)


def test_inputs_are_bound_in_the_order_of_the_placeholders() -> None:
    class Named(nn.Module):
        def forward(self, a: Tensor, b: Tensor, *, c: Tensor) -> Tensor:
            return a + b + c

    a, b, c = torch.randn(3, 2)
    module = capture(Named(), (a,), {"c": c, "b": b}).module
    bound = bind(module, (a,), {"c": c, "b": b})
    assert all(one is other for one, other in zip(bound, (a, b, c), strict=True))


class Raw(nn.Module):
    """Weights outside of layers: in a product, in a sum, and in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.product, self.term = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(1, 4))
        self.register_buffer("kernel", torch.randn(4, 4))
        self.register_buffer("table", torch.randn(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bi,ij->bj", x, self.product) + self.term
        return F.linear(y, self.kernel) + self.table


def test_weights_outside_of_layers_have_reasons_and_remedies() -> None:
    reasons = skips(Raw(), torch.randn(2, 4))
    advice = "use a layer, or a function of torch.nn.functional on the whole parameter"
    assert reasons == {
        "product": f"a parameter that einsum reads; only weights of layers are compressed: {advice}",
        "term": "a parameter that add reads; only weights of layers are compressed",
        "kernel": "a buffer that linear reads; only parameters are compressed: make it one",
    }


class ReadTwice(nn.Module):
    """A weight of a functional layer that is summed too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.weight.sum(0)


def test_a_weight_read_in_two_ways_is_named_once() -> None:
    ((name, reason),) = skips(ReadTwice(), torch.randn(2, 4)).items()
    assert (name, reason.partition(";")[0]) == ("weight", "it shares parameters with a function in forward")
