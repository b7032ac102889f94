from __future__ import annotations

from dataclasses import replace

import pytest

from tdfx.errors import OptionError
from tdfx.records.cost import Workload
from tdfx.records.layer import Call, LayerSpec
from tdfx.targets import ORT_CPU, find_target, layer_cost


def conv(in_channels: int, out_channels: int, kernel: int = 1, groups: int = 1, pixels: int = 784) -> Workload:
    return Workload(
        pixels, in_channels, out_channels, kernel, groups, inputs=pixels * in_channels, itemsize=4, conv=True
    )


def matmul(in_features: int, out_features: int, rows: int = 64, itemsize: int = 4) -> Workload:
    return Workload(rows, in_features, out_features, inputs=rows * in_features, itemsize=itemsize)


def seconds(*workloads: Workload) -> float:
    return sum(map(ORT_CPU.latency, workloads))


def transposed(in_channels: int, out_channels: int, groups: int = 1, pixels: int = 784) -> Workload:
    """Of kernel 4 x 4 and stride 2."""
    spread = replace(conv(in_channels, out_channels, 16, groups, pixels), scattered=4 * pixels * out_channels)
    assert spread.outputs == 4 * pixels * out_channels
    return spread


def test_transposed_convolutions_are_computed_in_the_plain_layout() -> None:
    assert not ORT_CPU.is_blocked(transposed(64, 64))
    assert not ORT_CPU.is_blocked(transposed(64, 64, groups=64))
    assert seconds(transposed(64, 64)) > 1.1 * seconds(conv(64, 64, 16))


def test_a_transposed_convolution_is_not_cheap_because_it_is_depthwise() -> None:
    """The products are written and added up, 16 to each element of the input, however few are multiplied."""
    spread, folded, reordered = transposed(64, 64, groups=64), 784 * 64 * 16, (1 + 4) * 784 * 64
    assert seconds(spread) > 4 * ORT_CPU.copy_byte_s * (folded + reordered)
    assert seconds(spread) > 4 * seconds(conv(64, 64, 16, groups=64, pixels=784))


def test_what_a_transposed_convolution_writes_is_reordered_for_its_neighbours() -> None:
    bare = replace(ORT_CPU, operator_s=0, matrix_mac_s=0, weight_byte_s=0, byte_s=0)
    outputs, inputs, folded = 4 * 784 * 64, 784 * 64, 784 * 64 * 16
    expected = 4 * bare.copy_byte_s * (outputs + inputs + folded)
    assert bare.latency(transposed(64, 64)) == pytest.approx(expected, rel=1e-12)
    assert bare.latency(transposed(64, 3)) == pytest.approx(4 * bare.copy_byte_s * (inputs + 784 * 3 * 16), rel=1e-12)


@pytest.mark.parametrize("kernel", [1, 3, 9])
def test_more_blocks_cost_more(kernel: int) -> None:
    by_output = [seconds(conv(64, c, kernel)) for c in range(16, 513, 16)]
    by_input = [seconds(conv(c, 64, kernel)) for c in range(16, 513, 16)]
    assert by_output == sorted(set(by_output))
    assert by_input == sorted(set(by_input))


def test_channels_of_one_block_compute_the_same() -> None:
    bare = replace(ORT_CPU, weight_byte_s=0.0)  # the weight is stored unpadded, the one thing that differs
    assert bare.latency(conv(64, 52, 9)) == bare.latency(conv(64, 64, 9))
    assert bare.latency(conv(52, 64, 9)) == bare.latency(conv(64, 64, 9))


@pytest.mark.parametrize("kernel", [1, 9])
def test_rank_49_costs_more_than_48_and_at_least_what_64_costs(kernel: int) -> None:
    for other in (64, 128, 256):
        into = [seconds(conv(other, rank, kernel)) for rank in (48, 49, 64)]
        out_of = [seconds(conv(rank, other, kernel)) for rank in (48, 49, 64)]
        assert into[0] < into[2] <= into[1]
        assert out_of[0] < out_of[2] <= out_of[1]


def test_channels_that_are_no_multiple_of_4_leave_the_blocked_layout() -> None:
    assert ORT_CPU.is_blocked(conv(52, 64, 9))
    assert not ORT_CPU.is_blocked(conv(50, 64, 9))
    assert ORT_CPU.is_blocked(conv(64, 50, 9))  # outputs are padded, then reordered
    chain = {r: seconds(conv(128, r), conv(r, r, 9), conv(r, 128)) for r in (50, 52)}
    assert chain[50] > 1.3 * chain[52]


def test_matrix_products_do_not_care_for_alignment() -> None:
    assert seconds(matmul(512, 48)) < seconds(matmul(512, 49)) < seconds(matmul(512, 50)) < seconds(matmul(512, 64))


def test_fewer_than_16_input_channels_are_read_unpadded_and_slowly() -> None:
    assert ORT_CPU.is_blocked(conv(3, 64, 49))
    assert seconds(conv(3, 64, 49)) < seconds(conv(12, 64, 49)) < seconds(conv(16, 64, 49))
    assert seconds(conv(12, 64)) > seconds(conv(16, 64))


def test_reorders_are_paid_where_blocked_and_plain_meet() -> None:
    free = replace(ORT_CPU, operator_s=0.0, blocked_mac_s=0.0, sweep_s=0.0, accumulate_s=0.0, weight_byte_s=0.0)
    only_copies = replace(free, matrix_mac_s=0.0, group_s=0.0, byte_s=0.0, copy_byte_s=1.0)
    pixels = 784
    assert only_copies.latency(conv(64, 64)) == 0
    assert only_copies.latency(conv(64, 49)) == 4 * pixels * 49  # blocked, read by a plain one
    assert only_copies.latency(conv(49, 49)) == 0  # plain between plain ones
    assert only_copies.latency(conv(49, 64)) == 4 * pixels * 64  # plain, read by a blocked one
    assert only_copies.latency(conv(64, 12)) == 4 * pixels * 12  # below 16 channels the plain layout is read
    assert only_copies.latency(conv(64, 64, groups=8)) == 4 * pixels * (64 + 64)  # plain between blocked ones


def test_depthwise_is_its_own_kernel() -> None:
    depthwise = conv(128, 128, 9, groups=128)
    assert ORT_CPU.is_blocked(depthwise)
    assert not ORT_CPU.is_blocked(conv(130, 130, 9, groups=130))
    assert seconds(conv(130, 130, 9, groups=130)) > 2 * seconds(conv(144, 144, 9, groups=144))
    assert seconds(depthwise) < seconds(conv(128, 128, 9)) / 10
    assert seconds(depthwise) < seconds(conv(128, 128, 25, groups=128)) < seconds(conv(256, 256, 25, groups=256))
    assert not ORT_CPU.is_blocked(conv(64, 128, 9, groups=64))  # with a multiplier it is a grouped one


def test_grouped_is_blocked_only_with_whole_blocks_per_group() -> None:
    assert ORT_CPU.is_blocked(conv(128, 128, 9, groups=8))
    assert not ORT_CPU.is_blocked(conv(128, 128, 9, groups=16))
    assert not ORT_CPU.is_blocked(conv(128, 64, 9, groups=8))
    assert seconds(conv(128, 128, 9, groups=2)) < seconds(conv(128, 128, 9))
    assert seconds(conv(128, 128, 9, groups=32)) > seconds(conv(128, 128, 9, groups=8))


def test_outside_the_blocked_layout_each_group_costs() -> None:
    dearer = replace(ORT_CPU, group_s=ORT_CPU.group_s + 1.0)
    for workload, groups in ((conv(64, 64, 9, 16), 16), (conv(50, 50, 9, 50), 50), (conv(50, 64, 9), 0)):
        assert not ORT_CPU.is_blocked(workload)
        assert dearer.latency(workload) - seconds(workload) == pytest.approx(groups, rel=1e-9, abs=1e-9)


def test_plain_depthwise_is_not_unfolded() -> None:
    no_copies = replace(ORT_CPU, copy_byte_s=0.0)
    assert no_copies.latency(conv(50, 50, 9, 50)) == seconds(conv(50, 50, 9, 50))


def test_each_sweep_reads_the_input_again() -> None:
    only_sweeps = replace(ORT_CPU, operator_s=0.0, blocked_mac_s=0.0, weight_byte_s=0.0, sweep_s=1.0)
    sweeps = [only_sweeps.latency(conv(32, outputs, 9)) / (784 * 32 * 9) for outputs in (16, 64, 80, 192)]
    assert sweeps == [1, 1, 2, 3]


def test_every_operator_has_a_fixed_cost() -> None:
    assert seconds(conv(1, 1, pixels=1)) >= ORT_CPU.operator_s
    assert seconds(matmul(1, 1, rows=1)) >= ORT_CPU.operator_s


def test_wider_elements_move_more_bytes() -> None:
    extra = seconds(matmul(512, 512, itemsize=8)) - seconds(matmul(512, 512))
    weights, outputs = 512 * 512, 64 * 512
    assert extra == pytest.approx(4 * (ORT_CPU.weight_byte_s * weights + ORT_CPU.byte_s * outputs), rel=1e-9)


def test_only_float32_has_a_blocked_kernel() -> None:
    assert not ORT_CPU.is_blocked(replace(conv(64, 64, 9), itemsize=2))
    assert not ORT_CPU.is_blocked(replace(conv(64, 64, 9), itemsize=8))


def test_only_2d_convolutions_have_a_blocked_kernel() -> None:
    planar = LayerSpec("conv", "conv2d", 64, 64, (3, 1), (1, 1), (1, 0), dilation=(1, 1))
    line = LayerSpec("conv", "conv1d", 64, 64, (3,), (1,), (1,), dilation=(1,))
    planar, line = planar.called_on(((1, 64, 400, 1),)), line.called_on(((1, 64, 400),))
    assert planar.macs == line.macs
    assert ORT_CPU.layer_latency(planar) == ORT_CPU.latency(planar.workloads[0])
    assert ORT_CPU.layer_latency(line) == ORT_CPU.latency(replace(line.workloads[0], conv=False))


def test_layer_called_twice_counts_time_and_macs_twice_and_parameters_once() -> None:
    layer = LayerSpec("conv", "conv2d", 32, 32, (3, 3), (1, 1), (1, 1), dilation=(1, 1), bias=True)
    shape = (2, 32, 14, 14)
    once = layer_cost(replace(layer, calls=(Call(shape, shape),)), ORT_CPU)
    twice = layer_cost(replace(layer, calls=(Call(shape, shape),) * 2), ORT_CPU)
    assert once.latency_s is not None and once.latency_s > 0
    assert twice.latency_s == 2 * once.latency_s
    assert twice.macs == 2 * once.macs == 2 * 2 * 14 * 14 * 32 * 32 * 9
    assert twice.params == once.params == 32 * 32 * 9 + 32
    assert twice.weight_bytes == once.weight_bytes == 4 * once.params


def test_no_target_no_latency() -> None:
    layer = LayerSpec("fc", "linear", 8, 4).called_on(((2, 8),))
    assert find_target(None) is None
    assert layer_cost(layer, None).latency_s is None
    assert layer_cost(layer, None).macs == 2 * 8 * 4


def test_targets_are_found_by_name() -> None:
    assert find_target("ort-cpu") is ORT_CPU
    with pytest.raises(OptionError, match="target is 'gpu', expected one of 'ort-cpu', a file of"):
        find_target("gpu")
