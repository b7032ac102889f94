"""The grid of ranks, from times of the test's own."""

from __future__ import annotations

import onnx
import pytest

from tdfx.latency.grid import rank_grid


def widths(models: list[bytes]) -> list[int]:
    """Channels between the convolutions of each model."""
    graphs = [onnx.load_from_string(model).graph for model in models]
    convolutions = [[node for node in graph.node if node.op_type == "Conv"] for graph in graphs]
    shapes = [{tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer} for graph in graphs]
    makers = [{node.output[0]: node.input[0] for node in graph.node} for graph in graphs]
    return [int(s[m[c[0].input[1]]][0]) for s, m, c in zip(shapes, makers, convolutions, strict=True)]


def macs(width: int) -> int:
    return 2 * 64 * width + 9 * width**2


@pytest.mark.parametrize("block", [1, 4, 8, 16, 32])
def test_the_block_is_found(block: int) -> None:
    def time(models: list[bytes]) -> list[float]:
        found = [-(-width // block) * block for width in widths(models)]
        return [1e-3 * macs(width) for width in found]

    assert rank_grid(time) == block


def test_a_disturbance_is_not_taken_for_a_block() -> None:
    def time(models: list[bytes]) -> list[float]:
        return [macs(width) * (100.0 if width == 45 else 1.0) for width in widths(models)]

    assert rank_grid(time) == 1


def test_reorders_off_a_multiple_of_four_count() -> None:
    def time(models: list[bytes]) -> list[float]:
        return [macs(width) * (1.3 if width % 4 else 1.0) for width in widths(models)]

    assert rank_grid(time) == 4
