from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tdfx.passes.sites import layer_spec
from tdfx.records.layer import LayerSpec, Site

LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(5, 7), (3, 5)),
    (nn.Linear(5, 7, bias=False), (2, 3, 5)),
    (nn.Conv1d(4, 6, 5, stride=3, padding=2, dilation=2), (2, 4, 31)),
    (nn.Conv1d(4, 6, 3, padding="same", dilation=2), (2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), bias=False), (2, 4, 9, 8)),
    (nn.Conv2d(4, 6, 3, padding="valid", dilation=(1, 2)), (1, 4, 9, 8)),
    (nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="reflect"), (2, 4, 5, 5)),
    (nn.Conv2d(4, 8, 3, groups=4, stride=2), (2, 4, 7, 7)),
    (nn.Conv3d(2, 3, (1, 2, 3), stride=(1, 2, 2), padding=(0, 1, 1)), (2, 2, 3, 6, 7)),
]


def spec(layer: Any, shape: tuple[int, ...]) -> LayerSpec:
    return layer_spec("layer", layer, ()).called_on((shape,))


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_shapes_and_parameters_are_those_of_the_layer(layer: Any, shape: tuple[int, ...]) -> None:
    found = spec(layer, shape)
    assert found.weight_shape == tuple(layer.weight.shape)
    assert found.params == sum(parameter.numel() for parameter in layer.parameters())
    assert found.weight_bytes == sum(parameter.nbytes for parameter in layer.parameters())
    assert found.calls[0].output_shape == tuple(layer(torch.zeros(shape)).shape)


@pytest.mark.parametrize(("layer", "shape"), [(layer, shape[1:]) for layer, shape in LAYERS])
def test_unbatched_inputs(layer: Any, shape: tuple[int, ...]) -> None:
    assert layer_spec("layer", layer, ()).output_shape(shape) == tuple(layer(torch.zeros(shape)).shape)


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_macs_are_what_torch_counts(layer: nn.Module, shape: tuple[int, ...]) -> None:
    with FlopCounterMode(display=False) as counter:
        layer(torch.zeros(shape))
    assert 2 * spec(layer, shape).macs == counter.get_total_flops()


def test_every_call_counts() -> None:
    found = layer_spec("layer", nn.Linear(5, 7), ()).called_on(((2, 5), (3, 4, 5)))
    assert found.macs == (2 + 12) * 35
    assert [workload.positions for workload in found.workloads] == [2, 12]
    assert [workload.inputs for workload in found.workloads] == [10, 60]
    assert found.called_on(()).macs == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_bytes_follow_the_dtype(dtype: torch.dtype) -> None:
    layer = nn.Linear(5, 7, dtype=dtype)
    found = spec(layer, (2, 5))
    assert found.dtype == str(dtype).removeprefix("torch.")
    assert found.weight_bytes == sum(parameter.nbytes for parameter in layer.parameters())
    assert found.workloads[0].itemsize == dtype.itemsize


def test_only_2d_convolutions_run_in_the_blocked_layout() -> None:
    blocked = [spec(layer, shape).workloads[0].conv for layer, shape in LAYERS]
    assert blocked == [isinstance(layer, nn.Conv2d) for layer, _ in LAYERS]


def test_the_layer_of_a_site_is_the_first_whose_weight_the_others_share() -> None:
    layer = LayerSpec("a", "linear", 2, 2)
    assert Site.of(layer) == Site("a", (layer,), "linear")
    assert Site.of(layer).layer is layer
    site = Site("a", (layer, LayerSpec("b", "linear", 2, 2, tied=True)), "linear")
    assert site.layer is layer
    assert [part.params for part in site.layers] == [4, 0]
    assert (Site.of(layer).can_gain_bias, site.can_gain_bias) == (True, False)
