"""The grid of ranks that a runtime computes without waste, found by timing one convolution at many widths.

Runtimes compute convolutions in blocks of channels; a width between two multiples of the block takes as long as the
next one, or longer where tensors have to be reordered for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate
from statistics import mean
from typing import Any

from tdfx.latency import runner
from tdfx.latency.micro_model import Piece
from tdfx.records.layer import Call, LayerSpec

GRIDS = (1, 2, 4, 8, 16, 32)
WIDTHS = tuple(range(32, 65))
CHANNELS, SIZE = 64, 28
WASTE = 1.03  # seconds per multiply-accumulate that a grid may take, as a multiple of the best grid's
Time = Callable[[list[bytes]], list[float]]


def measure_rank_grid(runtime: Mapping[str, Any]) -> int:
    """The grid for a runtime on this machine, see ``best_grid``."""

    def time(models: list[bytes]) -> list[float]:
        return runner.group_ratios([runner.session_run(model, runtime) for model in models], seconds=0.02)

    return rank_grid(time)


def rank_grid(time: Time) -> int:
    """The finest grid whose ranks take little more time per multiply-accumulate than those of the best grid.

    Args:
        time: seconds, in any unit, of ONNX models.
    """
    pieces = [_bottleneck(width) for width in WIDTHS]
    times = time([piece.model() for piece in pieces])
    macs = [sum(layer.macs for layer in piece.layers) for piece in pieces]
    # A rank never costs more than a larger one, which could be padded to; that also passes over disturbed times.
    least = list(accumulate(reversed(times), min))[::-1]
    per_mac = {width: value / of for width, value, of in zip(WIDTHS, least, macs, strict=True)}
    by_grid = {grid: mean(per_mac[width] for width in WIDTHS if width % grid == 0) for grid in GRIDS}
    return next(grid for grid in GRIDS if by_grid[grid] <= WASTE * min(by_grid.values()))


def _bottleneck(width: int) -> Piece:
    """A chain like Tucker-2's: to ``width`` channels, 3 x 3 among them, and back."""

    def convolution(inputs: int, outputs: int, kernel: int) -> LayerSpec:
        call = Call((1, inputs, SIZE, SIZE), (1, outputs, SIZE, SIZE))
        return LayerSpec(
            "", "conv2d", inputs, outputs, (kernel, kernel), (1, 1), (kernel // 2,) * 2, dilation=(1, 1), calls=(call,)
        )

    layers = (convolution(CHANNELS, width, 1), convolution(width, width, 3), convolution(width, CHANNELS, 1))
    return Piece(layers, 0, "relu")
