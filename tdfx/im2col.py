"""The matrix that a layer's weight is multiplied with: one row for each output position (im2col)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdfx.transposed import stuffed
from tdfx.weights import ConvTranspose

Layer = nn.Linear | nn.modules.conv._ConvNd
CHUNK_BYTES = 32_000_000


def im2col(value: Tensor, layer: Layer) -> Tensor:
    """Inputs of every output position of one call.

    Args:
        value: the layer's input: (..., in) of a Linear, (N, in, *spatial) or (in, *spatial) of a convolution.
        layer: a Linear or a convolution, transposed or not, of any groups, stride, padding, padding mode, dilation.

    Returns:
        (positions, in * prod(kernel)), columns in the order of ``weight_of(layer).flatten(1)``, of one group
        after another, padding included; positions in the order of the output, sample by sample. It may share memory
        with the input.
    """
    return value.reshape(-1, value.shape[-1]) if isinstance(layer, nn.Linear) else _rows(_windows(value, layer), layer)


def chunks(value: Tensor, layer: Layer, most_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
    """The rows of ``im2col`` in parts of about ``most_bytes``, or of one line of a sample's output if that is more."""
    if isinstance(layer, nn.Linear):
        rows = value.reshape(-1, value.shape[-1])
        yield from torch.split(rows, max(1, most_bytes // (rows.shape[1] * rows.itemsize)))
        return
    windows = _windows(value, layer)
    samples = 1 + len(layer.kernel_size)  # its dimension; the next is the first of the output's spatial ones
    sample_bytes = windows.numel() * windows.itemsize // windows.shape[samples]
    lines = max(1, most_bytes * windows.shape[samples + 1] // sample_bytes)
    for part in torch.split(windows, max(1, most_bytes // sample_bytes), samples):
        for piece in torch.split(part, lines, samples + 1):
            yield _rows(piece, layer)


def output_rows(value: Tensor, layer: Layer) -> Tensor:
    """A layer's output, or a gradient of its shape, as (positions, out), in the order of ``im2col`` or ``one_hot``."""
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return value.reshape(-1, value.shape[-1])
    channels = value.dim() - 1 - len(layer.kernel_size)
    return value.movedim(channels, 0).flatten(1).T


def _windows(value: Tensor, layer: nn.modules.conv._ConvNd) -> Tensor:
    """(in, *kernel, N, *output spatial): a view of the padded input."""
    spatial = len(layer.kernel_size)
    value = value if value.dim() == spatial + 2 else value[None]
    steps: tuple[int, ...] = layer.stride
    if isinstance(layer, ConvTranspose):
        value, steps = stuffed(value, layer), (1,) * spatial
    else:
        value = _padded(value, layer)
    for dim, (size, step, dilation) in enumerate(zip(layer.kernel_size, steps, layer.dilation, strict=True), start=2):
        value = value.unfold(dim, dilation * (size - 1) + 1, step)[..., ::dilation]
    # (N, in, *output, *kernel); positions last, so that rows are copied in long runs.
    return value.permute(1, *range(2 + spatial, 2 + 2 * spatial), 0, *range(2, 2 + spatial))


def _padded(value: Tensor, layer: nn.modules.conv._ConvNd) -> Tensor:
    padding = _padding(layer)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(value, padding, mode) if any(padding) else value


def _rows(windows: Tensor, layer: nn.modules.conv._ConvNd) -> Tensor:
    columns = layer.in_channels * math.prod(layer.kernel_size)
    return windows.reshape(columns, -1).T


def _padding(layer: nn.modules.conv._ConvNd) -> list[int]:
    """As torch.nn.functional.pad takes it: last dimension first, before and after; "same" pads more after."""
    if not isinstance(layer.padding, str):
        return [side for size in reversed(layer.padding) for side in (size, size)]
    reach = [dilation * (size - 1) for size, dilation in zip(layer.kernel_size, layer.dilation, strict=True)]
    totals = reach if layer.padding == "same" else [0 for _ in reach]
    return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
