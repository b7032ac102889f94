"""What stands in for a layer inside Python code: its options, and parameters that only describe themselves."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdfx.errors import CaptureError
from tdfx.passes.stand_in import StandIn, fixed_layers


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(6, 3, 1, bias=False), nn.Conv2d(3, 4, 3, 2, 1))


def test_options_are_those_of_the_layer() -> None:
    layer = nn.Conv2d(6, 4, 3, stride=2, padding=1, padding_mode="circular")
    layer.note = "kept"  # type: ignore[assignment]
    stand_in = StandIn(layer, "channel_svd", chain())
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(stand_in, name) == getattr(layer, name)
    assert (stand_in.padding_mode, stand_in.note) == ("circular", "kept")
    assert list(stand_in.state_dict()) == [f"channel_svd.{name}" for name in ("0.weight", "1.weight", "1.bias")]
    linear = StandIn(nn.Linear(5, 7, bias=False), "svd", nn.Sequential(nn.Linear(5, 2), nn.Linear(2, 7)))
    assert (linear.in_features, linear.out_features, linear.bias) == (5, 7, None)
    with pytest.raises(AttributeError, match="in_channels"):
        _ = linear.in_channels


def test_parameters_tell_shape_dtype_and_device_and_nothing_else() -> None:
    layer = nn.Conv2d(6, 4, 3, stride=2, padding=1)
    stand_in = StandIn(layer, "channel_svd", chain()).double()
    for other in (stand_in, copy.deepcopy(stand_in), pickle.loads(pickle.dumps(stand_in))):
        weight, bias = other.weight, other.bias
        assert isinstance(weight, Tensor)
        assert (weight.shape, weight.size(1), weight.dim(), len(weight)) == ((4, 6, 3, 3), 6, 4, 4)
        assert (weight.dtype, weight.device, bias.shape) == (torch.float64, torch.device("cpu"), (4,))
        assert repr(weight) == "Described((4, 6, 3, 3), torch.float64)"
        for compute in (
            lambda weight=weight: weight + 1,
            lambda weight=weight: F.conv2d(torch.ones(1, 6, 5, 5), weight),
            lambda weight=weight: torch.cat([weight, weight]),
            lambda weight=weight: weight.tolist(),
            lambda bias=bias: bias.clone(),
        ):
            with pytest.raises(CaptureError, match=r"computes with the (weight|bias) of a Conv2d layer that was"):
                compute()


def test_layers_with_hooks_that_are_needed_are_fixed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].register_forward_hook(lambda module, args, output: output + 1)
    assert fixed_layers(model, (torch.ones(2, 3),), {}) == {"1": "it has hooks, without which the model does not run"}


class Classes(nn.Module):
    """Goes by the class of what it holds, and calls one of it inside a map."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) if isinstance(self.first, nn.Linear) else x
        found: Tensor = torch.vmap(self.last)(y)
        return found


def test_what_goes_by_classes_or_maps_over_the_batch_is_fixed() -> None:
    assert fixed_layers(Classes(), (torch.ones(2, 3),), {}) == {
        "first": "forward computes something else with another module in its place, as code that asks for its class "
        "does; call it whatever it is",
        "last": "forward calls it inside torch.vmap, where its inputs are not seen; call it on the whole batch",
    }
