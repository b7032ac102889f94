"""Chains of layer specifications and the layers built from them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tdfx.decompositions.chain import build_layer, link, pointwise, spatial
from tdfx.records.layer import LayerSpec

CONV = LayerSpec(
    "block.conv",
    "conv2d",
    in_channels=8,
    out_channels=6,
    kernel_size=(3, 5),
    stride=(2, 1),
    padding=(1, 4),
    padding_mode="circular",
    dilation=(1, 2),
    bias=True,
    dtype="bfloat16",
).called_on(((2, 8, 9, 12), (1, 8, 4, 10)))
LINEAR = LayerSpec("head", "linear", 8, 6, bias=True).called_on(((2, 5, 8),))


def options(spec: LayerSpec) -> tuple[object, ...]:
    return spec.kernel_size, spec.stride, spec.padding, spec.padding_mode, spec.dilation, spec.groups


def test_pointwise_leaves_space_alone() -> None:
    spec = pointwise(CONV, "reduce", 8, 3)
    assert options(spec) == ((1, 1), (1, 1), (0, 0), "zeros", (1, 1), 1)
    assert (spec.name, spec.kind, spec.weight_shape, spec.dtype) == ("reduce", "conv2d", (3, 8, 1, 1), "bfloat16")
    assert not spec.bias
    assert spec.calls == ()


def test_pointwise_of_a_linear_layer_is_linear() -> None:
    spec = pointwise(LINEAR, "reduce", 8, 3)
    assert (spec.kind, spec.weight_shape, spec.output_shape((2, 5, 8))) == ("linear", (3, 8), (2, 5, 3))


def test_spatial_keeps_the_options_of_the_directions_asked_for() -> None:
    assert options(spatial(CONV, "core", 4, 4)) == options(CONV)
    assert options(spatial(CONV, "down", 4, 4, dims=(0,))) == ((3, 1), (2, 1), (1, 0), "circular", (1, 1), 1)
    assert options(spatial(CONV, "right", 4, 4, dims=(1,))) == ((1, 5), (1, 1), (0, 4), "circular", (1, 2), 1)
    assert spatial(CONV, "depthwise", 4, 4, groups=4).weight_shape == (4, 1, 3, 5)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name_keeps_its_name(padding: str) -> None:
    spec = LayerSpec("conv", "conv2d", 4, 4, (3, 3), (1, 1), padding, dilation=(2, 2))
    for part in (pointwise(spec, "a", 4, 2), spatial(spec, "b", 2, 2), spatial(spec, "c", 2, 2, dims=(1,))):
        layer = build_layer(part, torch.zeros(part.weight_shape), None)
        value = torch.zeros(1, part.in_channels, 9, 7)
        assert part.padding == padding
        assert layer(value).shape == part.output_shape(tuple(value.shape))


def test_link_passes_every_call_on_and_the_bias_to_the_last() -> None:
    first, second = link(CONV, (spatial(CONV, "down", 8, 3, dims=(0,)), spatial(CONV, "right", 3, 6, dims=(1,))))
    assert [call.input_shape for call in first.calls] == [call.input_shape for call in CONV.calls]
    assert [call.output_shape for call in first.calls] == [(2, 3, 5, 12), (1, 3, 2, 10)]
    assert [call.input_shape for call in second.calls] == [call.output_shape for call in first.calls]
    assert [call.output_shape for call in second.calls] == [call.output_shape for call in CONV.calls]
    assert (first.bias, second.bias) == (False, True)


@pytest.mark.parametrize(("dims", "layer"), [(1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)])
def test_built_convolutions_have_every_option(dims: int, layer: type[nn.Conv1d]) -> None:
    spec = LayerSpec(
        "conv",
        f"conv{dims}d",  # type: ignore[arg-type]
        in_channels=4,
        out_channels=6,
        kernel_size=(3, 2, 1)[:dims],
        stride=(2, 1, 3)[:dims],
        padding=(1, 0, 2)[:dims],
        padding_mode="replicate",
        dilation=(1, 2, 3)[:dims],
        groups=2,
        bias=True,
        dtype="float16",
    )
    weight, bias = torch.randn(spec.weight_shape), torch.randn(6)
    built = build_layer(spec, weight, bias)
    assert type(built) is layer
    assert (built.in_channels, built.out_channels) == (4, 6)
    assert options(spec) == tuple(
        getattr(built, name) for name in ("kernel_size", "stride", "padding", "padding_mode", "dilation", "groups")
    )
    assert torch.equal(built.weight, weight.half())
    assert built.bias is not None
    assert torch.equal(built.bias, bias.half())
    assert built.weight.requires_grad
    assert built.bias.requires_grad
    value = torch.randn(2, 4, *(9, 8, 7)[:dims])
    assert built.double()(value.double()).shape == spec.output_shape(tuple(value.shape))


@pytest.mark.parametrize("bias", [None, torch.ones(6)])
def test_built_linear_layers(bias: Tensor | None) -> None:
    built = build_layer(LINEAR, torch.eye(6, 8, dtype=torch.float64), bias)
    assert type(built) is nn.Linear
    assert (built.in_features, built.out_features, built.weight.dtype) == (8, 6, torch.float32)
    assert (built.bias is None) == (bias is None)
    expected = torch.eye(6, 8) if bias is None else torch.eye(6, 8) + 1
    assert torch.equal(built(torch.eye(8)).T, expected)


def test_a_built_layer_has_a_bias_of_its_own() -> None:
    bias = nn.Parameter(torch.ones(6))
    built = build_layer(LINEAR, torch.zeros(6, 8), bias)
    nn.init.zeros_(built.bias)  # type: ignore[arg-type]
    assert torch.equal(bias, torch.ones(6))


def test_a_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"head: weight has shape \(8, 6\), its specification \(6, 8\)"):
        build_layer(LINEAR, torch.zeros(8, 6), None)
