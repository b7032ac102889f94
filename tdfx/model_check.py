"""What a model must hold before anything is made of it: inputs on its device, weights with finite values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tdfx.errors import InputError, WeightError
from tdfx.layouts import strided_parts


def check_devices(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Raises InputError, naming the input, where one is on another device than the model."""
    devices = dict.fromkeys(value.device for value in (*model.parameters(), *model.buffers()))
    for name, value in inputs.items():
        # A single number on the CPU goes with tensors on any device.
        if devices and value.device not in devices and (value.dim() or value.device.type != "cpu"):
            raise InputError(
                f"example input {name} is on {value.device}, the model on {', '.join(map(str, devices))}; move the "
                "input there, or the model"
            )


def check_values(model: nn.Module) -> None:
    """Raises InputError where a parameter has no values yet, WeightError where it holds NaN or Inf, or a buffer NaN."""
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise InputError(f"{name} has no shape yet: the layer is lazy; run the model once before")
        if parameter.is_meta:
            raise InputError(f"{name} has no values, only a shape: it is on the meta device; load the weights before")
        _refuse(name, parameter, ~torch.isfinite(parameter), "NaN or Inf")
    for name, buffer in model.named_buffers():
        # Inf is the stuff of attention masks.
        for part in strided_parts(buffer):
            _refuse(name, part, torch.isnan(part), "NaN")


def _refuse(name: str, values: Tensor, bad: Tensor, what: str) -> None:
    if bool(bad.any()):
        raise WeightError(
            f"layer {name.rpartition('.')[0] or name}: {int(bad.sum())} of {values.numel()} values of {name} are "
            f"{what}; repair the checkpoint"
        )
