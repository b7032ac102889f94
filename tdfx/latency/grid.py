"""The grid of ranks that a runtime computes without waste, found by timing one convolution at many widths.

Runtimes compute convolutions in blocks of channels; a width between two multiples of the block takes as long as the
next one, or longer where tensors have to be reordered for it.
"""

from __future__ import annotations

from tdfx.latency.micro_model import Piece
from tdfx.records.layer import Call, LayerSpec

WIDTHS = range(32, 65)
CHANNELS, SIZE = 64, 28
SECONDS = 0.02  # that the runs of one width take


def sweep() -> dict[int, Piece]:
    """Chains like Tucker-2's by their width: to so many channels, 3 x 3 among them, and back."""
    return {width: _bottleneck(width) for width in WIDTHS}


def _bottleneck(width: int) -> Piece:
    def convolution(inputs: int, outputs: int, kernel: int, *, bias: bool = False) -> LayerSpec:
        call = Call((1, inputs, SIZE, SIZE), (1, outputs, SIZE, SIZE))
        padding = (kernel // 2,) * 2
        return LayerSpec(
            "", "conv2d", inputs, outputs, (kernel, kernel), (1, 1), padding, dilation=(1, 1), bias=bias, calls=(call,)
        )

    back = convolution(width, CHANNELS, 1, bias=True)
    return Piece((convolution(CHANNELS, width, 1), convolution(width, width, 3), back), 0, "relu")
