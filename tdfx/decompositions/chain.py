"""Chains of layer specifications: the shapes of what replaces a layer, and the layers themselves."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from tdfx.records.layer import Call, Kind, LayerSpec, Shape
from tdfx.weights import set_weight

DIRECTIONS = ("frontal", "vertical", "horizontal")
CONV: dict[str, type[nn.modules.conv._ConvNd]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}


def pointwise(layer: LayerSpec, name: str, in_channels: int, out_channels: int) -> LayerSpec:
    """A linear layer, or a convolution with kernel 1 and no padding, of the layer's kind and dtype."""
    plain = layer if layer.lookup is None else replace(layer, kind="linear", lookup=None)
    return spatial(replace(plain, padding_mode="zeros"), name, in_channels, out_channels, dims=())


def spatial(
    layer: LayerSpec,
    name: str,
    in_channels: int,
    out_channels: int,
    *,
    dims: Collection[int] | None = None,
    groups: int = 1,
) -> LayerSpec:
    """A layer that does the layer's kernel, stride, padding and dilation along ``dims`` (None = all) only."""
    kept = range(len(layer.kernel_size)) if dims is None else dims
    made = replace(
        layer,
        name=name,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=_along(layer.kernel_size, kept, 1),
        stride=_along(layer.stride, kept, 1),
        padding=_padding_along(layer.padding, kept),
        dilation=_along(layer.dilation, kept, 1),
        groups=groups,
        bias=False,
        calls=(),
        output_padding=_along(layer.output_padding, kept, 0),
    )
    return _as_convolution(made) if made.is_transposed and _is_pointwise(made) else made


def along_each(layer: LayerSpec, channels: Sequence[int], *, groups: int = 1) -> tuple[LayerSpec, ...]:
    """One layer per spatial direction, from ``channels[d]`` to ``channels[d + 1]``, each doing its direction only."""
    names = DIRECTIONS[-len(layer.kernel_size) :]
    return tuple(
        spatial(layer, names[dim], left, right, dims=(dim,), groups=groups)
        for dim, (left, right) in enumerate(pairwise(channels))
    )


def link(layer: LayerSpec, factors: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
    """The factors with the shapes of the layer's calls run through them; the last takes the layer's bias."""
    shapes = tuple(call.input_shape for call in layer.calls)
    linked = []
    for factor in factors:
        called = factor.called_on(shapes) if factor.lookup is None else _called_as(factor, layer)
        shapes = tuple(call.output_shape for call in called.calls)
        linked.append(called)
    return (*linked[:-1], replace(linked[-1], bias=layer.bias))


def _called_as(factor: LayerSpec, layer: LayerSpec) -> LayerSpec:
    """A lookup with the calls of another one: how many bags there are, offsets alone may tell."""
    calls = (Call(call.input_shape, (*call.output_shape[:-1], factor.out_channels)) for call in layer.calls)
    return replace(factor, calls=tuple(calls))


def build_layer(spec: LayerSpec, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A torch layer of this specification, in its dtype, on the weight's device, for a weight of ``weight_shape``."""
    dtype = cast(torch.dtype, getattr(torch, spec.dtype))
    if weight.shape != spec.weight_shape:
        raise ValueError(f"{spec.name}: weight has shape {tuple(weight.shape)}, its specification {spec.weight_shape}")
    layer: nn.Module
    if spec.lookup is not None:
        layer = _build_lookup(spec, dtype)
    elif spec.kind == "linear":
        layer = nn.Linear(spec.in_channels, spec.out_channels, bias is not None, device="meta", dtype=dtype)
    else:
        options: dict[str, Any] = {"output_padding": spec.output_padding} if spec.is_transposed else {}
        layer = cast(Any, CONV[spec.kind])(
            spec.in_channels,
            spec.out_channels,
            spec.kernel_size,
            stride=spec.stride,
            padding=spec.padding,
            dilation=spec.dilation,
            groups=spec.groups,
            bias=bias is not None,
            padding_mode=spec.padding_mode,
            device="meta",
            dtype=dtype,
            **options,
        )
    set_weight(layer, weight.to(dtype))
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(dtype).clone())
    return layer


def _is_pointwise(layer: LayerSpec) -> bool:
    """Whether a layer computes each position by itself and neither adds nor drops any."""
    padding = () if isinstance(layer.padding, str) else layer.padding
    return math.prod((*layer.kernel_size, *layer.stride)) == 1 and not any((*padding, *layer.output_padding))


def _as_convolution(layer: LayerSpec) -> LayerSpec:
    """The convolution that a transposed one of a single position is; runtimes have faster kernels for it."""
    return replace(layer, kind=cast(Kind, layer.kind.replace("_transpose", "")), output_padding=())


def _build_lookup(spec: LayerSpec, dtype: torch.dtype) -> nn.Module:
    options = asdict(spec.lookup) if spec.lookup is not None else {}
    mode, include_last_offset = options.pop("mode"), options.pop("include_last_offset")
    options |= {"device": "meta", "dtype": dtype}
    if spec.kind == "embedding":
        return nn.Embedding(spec.in_channels, spec.out_channels, **options)
    return nn.EmbeddingBag(
        spec.in_channels, spec.out_channels, mode=mode, include_last_offset=include_last_offset, **options
    )


def _along(values: Shape, dims: Collection[int], other: int) -> Shape:
    return tuple(value if dim in dims else other for dim, value in enumerate(values))


def _padding_along(padding: Shape | str, dims: Collection[int]) -> Shape | str:
    # "same" and "valid" mean nothing to pad where the kernel is 1, so they stay right along any dims.
    return padding if isinstance(padding, str) else _along(padding, dims, 0)
