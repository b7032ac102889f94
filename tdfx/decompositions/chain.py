"""Chains of layer specifications: the shapes of what replaces a layer, and the layers themselves."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from tdfx.records.layer import LayerSpec, Shape

DIRECTIONS = ("frontal", "vertical", "horizontal")
CONV = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}


def pointwise(layer: LayerSpec, name: str, in_channels: int, out_channels: int) -> LayerSpec:
    """A linear layer, or a convolution with kernel 1 and no padding, of the layer's kind and dtype."""
    return spatial(replace(layer, padding_mode="zeros"), name, in_channels, out_channels, dims=())


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
    return replace(
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
    )


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
        called = factor.called_on(shapes)
        shapes = tuple(call.output_shape for call in called.calls)
        linked.append(called)
    return (*linked[:-1], replace(linked[-1], bias=layer.bias))


def build_layer(spec: LayerSpec, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A torch layer of this specification, in its dtype, on the weight's device."""
    dtype = cast(torch.dtype, getattr(torch, spec.dtype))
    if weight.shape != spec.weight_shape:
        raise ValueError(f"{spec.name}: weight has shape {tuple(weight.shape)}, its specification {spec.weight_shape}")
    layer: nn.Module
    if spec.kind == "linear":
        layer = nn.Linear(spec.in_channels, spec.out_channels, bias is not None, device="meta", dtype=dtype)
    else:
        layer = CONV[spec.kind](
            spec.in_channels,
            spec.out_channels,
            spec.kernel_size,  # type: ignore[arg-type]
            spec.stride,  # type: ignore[arg-type]
            spec.padding,  # type: ignore[arg-type]
            spec.dilation,  # type: ignore[arg-type]
            spec.groups,
            bias is not None,
            spec.padding_mode,  # type: ignore[arg-type]
            device="meta",
            dtype=dtype,
        )
    layer.weight = nn.Parameter(weight.to(dtype).contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(dtype).clone())
    return layer


def _along(values: Shape, dims: Collection[int], other: int) -> Shape:
    return tuple(value if dim in dims else other for dim, value in enumerate(values))


def _padding_along(padding: Shape | str, dims: Collection[int]) -> Shape | str:
    # "same" and "valid" mean nothing to pad where the kernel is 1, so they stay right along any dims.
    return padding if isinstance(padding, str) else _along(padding, dims, 0)
