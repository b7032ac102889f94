from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tdfx.fingerprint import structure_fingerprint, tensor_digest, weights_fingerprint


def network(seed: int = 0, channels: int = 4, stride: int = 1) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, channels, 3, stride), nn.BatchNorm2d(channels), nn.ReLU())


def test_a_copy_has_the_same_fingerprints() -> None:
    model = network()
    assert structure_fingerprint(copy.deepcopy(model)) == structure_fingerprint(model)
    assert weights_fingerprint(copy.deepcopy(model)) == weights_fingerprint(model)
    assert structure_fingerprint(model) != weights_fingerprint(model)


def test_structure_disregards_values_and_mode() -> None:
    assert structure_fingerprint(network(1).train()) == structure_fingerprint(network(0).eval())


@pytest.mark.parametrize(
    "other",
    [
        lambda: network(channels=5),
        lambda: network(stride=2),
        lambda: network().double(),
        lambda: network().append(nn.ReLU()),
        lambda: nn.Sequential(network()),
        lambda: nn.Sequential(*list(network())[:2], nn.GELU()),
    ],
)
def test_structure_sees_shapes_options_dtypes_and_names(other: Callable[[], nn.Module]) -> None:
    assert structure_fingerprint(other()) != structure_fingerprint(network())


def _flip_a_bit(model: nn.Sequential) -> None:
    weight = model[0].get_parameter("weight")
    with torch.no_grad():
        weight.view(torch.int32).view(-1)[-1] ^= 1


def _move_a_statistic(model: nn.Sequential) -> None:
    model[1].get_buffer("running_var")[0] += 1


@pytest.mark.parametrize("edit", [_flip_a_bit, _move_a_statistic])
def test_weights_are_seen_to_the_bit_buffers_included(edit: Callable[[nn.Sequential], None]) -> None:
    model = network()
    before = weights_fingerprint(model)
    edit(model)
    assert weights_fingerprint(model) != before


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(2, 3, dtype=torch.bfloat16),
        torch.zeros(3, 2),
        torch.zeros(6),
        torch.zeros(2, 3, dtype=torch.int32),
        -torch.zeros(2, 3),
    ],
)
def test_a_digest_depends_on_dtype_shape_and_bits(other: Tensor) -> None:
    assert tensor_digest(other) != tensor_digest(torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_a_digest_depends_on_values_not_on_memory_layout(dtype: torch.dtype) -> None:
    values = torch.arange(6).reshape(2, 3).to(dtype)
    assert tensor_digest(values.T.contiguous().T) == tensor_digest(values)
    assert tensor_digest(values.flatten()[::2]) == tensor_digest(values.flatten()[::2].clone())
    assert tensor_digest(values.flip(0)) != tensor_digest(values)


def test_scalars_and_empty_tensors_have_a_digest() -> None:
    assert tensor_digest(torch.tensor(3)) != tensor_digest(torch.tensor(4))
    assert tensor_digest(torch.zeros(0, 3)) != tensor_digest(torch.zeros(3, 0))


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"step": 3}

    def set_extra_state(self, state: object) -> None: ...


def test_extra_state_of_any_type_is_no_obstacle() -> None:
    model = WithExtraState(2, 2)
    assert structure_fingerprint(copy.deepcopy(model)) == structure_fingerprint(model)
    assert weights_fingerprint(copy.deepcopy(model)) == weights_fingerprint(model)
