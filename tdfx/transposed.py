"""Transposed convolutions as convolutions, which every method, metric and moment is written for.

A transposed convolution of stride s, dilation d and padding p is the convolution of stride 1 with its kernel reversed,
inputs and outputs exchanged, on the input with s - 1 zeros between its elements and d (k - 1) - p zeros around it.

Source: Dumoulin and Visin 2016, section 4.6.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from tdfx.weights import ConvTranspose


def stuffed(value: Tensor, layer: ConvTranspose) -> Tensor:
    """What the equal convolution of stride 1 runs on: an input (N, in, *spatial), spread and padded with zeros."""
    for dim, step in enumerate(layer.stride, start=2):
        value = _spread(value, dim, step)
    padding = [side for sides in reversed(_paddings(layer)) for side in sides]
    return F.pad(value, padding) if any(padding) else value


def _spread(value: Tensor, dim: int, step: int) -> Tensor:
    """The elements ``step`` apart along a dimension, zeros between them."""
    if step == 1:
        return value
    shape = list(value.shape)
    shape[dim] = (shape[dim] - 1) * step + 1
    spread = value.new_zeros(shape)
    spread[(slice(None),) * dim + (slice(None, None, step),)] = value
    return spread


def _paddings(layer: ConvTranspose) -> Sequence[tuple[int, int]]:
    """By direction, before and after; negative where elements are cut off."""
    assert not isinstance(layer.padding, str)
    options = zip(layer.kernel_size, layer.dilation, layer.padding, layer.output_padding, strict=True)
    return [(d * (k - 1) - p, d * (k - 1) - p + more) for k, d, p, more in options]
