"""The matrix form of layers, against the layers themselves and torch's own unfold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layers import reversed_kernels
from torch import Tensor, nn

from tdfx.im2col import chunks, im2col, output_rows

LAYERS = {
    "linear": (nn.Linear(4, 6), (5, 4)),
    "linear on (n, t, d)": (nn.Linear(4, 6), (2, 3, 5, 4)),
    "linear on (d,)": (nn.Linear(4, 6), (4,)),
    "conv1d": (nn.Conv1d(3, 5, 4, stride=2, padding=3, dilation=2), (2, 3, 17)),
    "conv1d same": (nn.Conv1d(3, 5, 4, padding="same", dilation=3, padding_mode="circular"), (2, 3, 17)),
    "conv2d": (nn.Conv2d(3, 5, (3, 2)), (2, 3, 8, 7)),
    "conv2d 1 x 1": (nn.Conv2d(3, 5, 1, stride=2), (2, 3, 8, 7)),
    "conv2d stride and dilation": (nn.Conv2d(3, 5, 3, (2, 3), (1, 2), (2, 1)), (2, 3, 9, 11)),
    "conv2d same": (nn.Conv2d(3, 5, (4, 3), padding="same", dilation=(1, 2)), (2, 3, 8, 9)),
    "conv2d valid": (nn.Conv2d(3, 5, 3, padding="valid"), (2, 3, 8, 9)),
    "conv2d reflect": (nn.Conv2d(3, 5, 3, padding=(1, 2), padding_mode="reflect"), (2, 3, 8, 9)),
    "conv2d replicate": (nn.Conv2d(3, 5, 3, padding=(2, 1), padding_mode="replicate"), (2, 3, 8, 9)),
    "conv2d circular": (nn.Conv2d(3, 5, 3, padding=(2, 1), padding_mode="circular"), (2, 3, 8, 9)),
    "conv2d same reflect": (nn.Conv2d(3, 5, (2, 5), padding="same", padding_mode="reflect"), (2, 3, 8, 9)),
    "conv2d unbatched": (nn.Conv2d(3, 5, 3, padding=1), (3, 8, 9)),
    "conv2d unbatched circular": (nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), (3, 8, 9)),
    "conv3d": (nn.Conv3d(2, 3, (2, 3, 1), (1, 2, 2), (1, 2, 0), (2, 1, 1)), (2, 2, 6, 7, 5)),
    "transposed 1d": (nn.ConvTranspose1d(3, 5, 3, 3, 1, 2, dilation=2), (2, 3, 5)),
    "transposed 2d": (nn.ConvTranspose2d(3, 5, 4, 2, 1), (2, 3, 4, 3)),
    "transposed 2d cropped": (nn.ConvTranspose2d(3, 5, (2, 3), (3, 2), (2, 3), (1, 0)), (2, 3, 4, 5)),
    "transposed 2d unbatched": (nn.ConvTranspose2d(3, 5, 2, 2), (3, 4, 3)),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, (2, 3, 1), (2, 1, 2), (0, 1, 0), (1, 0, 1)), (2, 2, 3, 4, 2)),
    "conv3d replicate": (nn.Conv3d(2, 3, 3, padding=(1, 0, 2), padding_mode="replicate"), (2, 2, 5, 4, 5)),
}


def case(name: str) -> tuple[Any, Tensor]:
    layer, shape = LAYERS[name]
    generator = torch.Generator().manual_seed(0)
    return layer.double(), torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_weight_are_the_layers_output(name: str) -> None:
    layer, value = case(name)
    rows = im2col(value, layer)
    expected = layer(value).detach()
    weight = layer.weight.detach()
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        weight = reversed_kernels(weight, 1)
    found = rows @ weight.flatten(1).T + layer.bias.detach()
    torch.testing.assert_close(found, output_rows(expected, layer), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["conv2d", "conv2d stride and dilation"])
def test_rows_are_those_of_unfold(name: str) -> None:
    layer, value = case(name)
    unfolded = F.unfold(value, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    expected = unfolded.transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(im2col(value, layer), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("most_bytes", [1, 700, 5000, 10**9])
@pytest.mark.parametrize("name", LAYERS)
def test_chunks_are_the_rows_in_parts(name: str, most_bytes: int) -> None:
    layer, value = case(name)
    rows = im2col(value, layer)
    parts = list(chunks(value, layer, most_bytes))
    torch.testing.assert_close(torch.cat(parts), rows, rtol=0, atol=0)
    dims = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size) - 1
    line = math.prod(layer(value).shape[-dims:]) if dims else 1
    assert all(part.nbytes <= max(most_bytes, line * rows.shape[1] * rows.itemsize) for part in parts)


def test_outputs_as_rows_follow_the_samples() -> None:
    value = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    expected = torch.stack([value[n, :, h, w] for n in range(2) for h in range(4) for w in range(5)])
    assert torch.equal(output_rows(value, nn.Conv2d(1, 3, 1)), expected)
    assert torch.equal(output_rows(value[0], nn.Conv2d(1, 3, 1)), expected[:20])
