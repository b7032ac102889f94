"""The grid of ranks, from times of the test's own."""

from __future__ import annotations

import onnx
import pytest

from tdfx.latency import runner
from tdfx.latency.grid import WIDTHS, sweep

MACS = {width: 28**2 * (2 * 64 * width + 9 * width**2) for width in WIDTHS}


def test_the_sweep_holds_a_chain_of_each_width() -> None:
    pieces = sweep()
    assert {width: piece.macs for width, piece in pieces.items()} == MACS
    for width, piece in pieces.items():
        graph = onnx.load_from_string(piece.model()).graph
        shapes = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        makers = {node.output[0]: node.input[0] for node in graph.node}
        first = next(node for node in graph.node if node.op_type == "Conv")
        assert int(shapes[makers[first.input[1]]][0]) == width


@pytest.mark.parametrize("block", [1, 4, 8, 16, 32])
def test_the_block_is_found(block: int) -> None:
    padded = {width: -(-width // block) * block for width in WIDTHS}
    assert runner.best_grid({width: 1e-3 * MACS[padded[width]] for width in WIDTHS}, MACS) == block


def test_a_disturbance_is_not_taken_for_a_block() -> None:
    assert runner.best_grid({width: MACS[width] * (100.0 if width == 45 else 1.0) for width in WIDTHS}, MACS) == 1


def test_reorders_off_a_multiple_of_four_count() -> None:
    assert runner.best_grid({width: MACS[width] * (1.3 if width % 4 else 1.0) for width in WIDTHS}, MACS) == 4


def test_the_order_of_widths_does_not_count() -> None:
    times = {width: float(MACS[-(-width // 8) * 8]) for width in reversed(WIDTHS)}
    assert runner.best_grid(times, MACS) == 8
