from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tdfx.errors import InputError
from tdfx.model_check import check_devices, check_values


def test_a_single_number_may_stay_on_the_cpu() -> None:
    model = nn.Linear(2, 2, device="meta")
    check_devices(model, {"scale": torch.tensor(2.0)})
    with pytest.raises(InputError, match="input x is on cpu, the model on meta"):
        check_devices(model, {"scale": torch.tensor(2.0), "x": torch.ones(1, 2)})


def test_masks_may_hold_infinity() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2, 2), -math.inf))
    check_values(model)
