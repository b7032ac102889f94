"""What follows a layer and is computed with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tdfx
from tdfx.passes.fused_operators import FusedOperators
from tdfx.passes.shape_prop import ShapeProp, bind
from tdfx.passes.sites import FindSites


class Network(nn.Module):
    """A convolution, and what a test lets follow it. Input (2, 4, 5, 5)."""

    def __init__(self, after: Callable[[Network, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.relu, self.after = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self, self.conv(x), x)


def found(
    network: nn.Module, example: Tensor, *, exported: bool = False, trainable: bool = False
) -> dict[str, tuple[str, ...]]:
    model = torch.export.export(network.eval(), (example,)) if exported else network.eval()
    captured = tdfx.capture(model, example, trainable=trainable)
    metas = ShapeProp(bind(captured.module, captured.args, captured.kwargs)).run(captured.module)
    sites, _ = FindSites(metas).run(captured.module)
    return dict(FusedOperators(sites, metas).run(captured.module))


@pytest.mark.parametrize(
    ("after", "fused"),
    [
        (lambda net, y, x: y, ""),
        (lambda net, y, x: net.relu(y), "relu"),
        (lambda net, y, x: F.relu(y), "relu"),
        (lambda net, y, x: y.relu(), "relu"),
        (lambda net, y, x: F.gelu(y), ""),
        (lambda net, y, x: y + x, "add"),
        (lambda net, y, x: torch.add(x, y), "add"),
        (lambda net, y, x: F.relu(x + y), "add_relu"),
        (lambda net, y, x: net.relu(x + y), "add_relu"),
        (lambda net, y, x: F.gelu(x + y), "add"),
        (lambda net, y, x: y * x, ""),
        (lambda net, y, x: y + 1.0, ""),
        (lambda net, y, x: y + x.mean((2, 3), keepdim=True), ""),
        (lambda net, y, x: F.relu(y) * y, ""),
        (lambda net, y, x: (s := x + y) * F.relu(s), "add"),
    ],
)
def test_what_follows(after: Callable[[Network, Tensor, Tensor], Tensor], fused: str) -> None:
    assert found(Network(after), torch.randn(2, 4, 5, 5)) == {"conv": (fused,)}


@pytest.mark.parametrize(
    ("after", "fused"),
    [
        (lambda net, y, x: net.relu(y), "relu"),
        (lambda net, y, x: F.relu(y), "relu"),
        (lambda net, y, x: y.relu_(), "relu"),
        (lambda net, y, x: F.relu(x + y), "add_relu"),
        (lambda net, y, x: y.add_(x), "add"),
        (lambda net, y, x: F.gelu(y), ""),
    ],
)
def test_what_follows_in_exported_programs(after: Callable[[Network, Tensor, Tensor], Tensor], fused: str) -> None:
    assert found(Network(after), torch.randn(2, 4, 5, 5), exported=True) == {"conv": (fused,)}


@pytest.mark.parametrize("exported", [False, True])
def test_a_batch_norm_in_between_is_folded_on_export(exported: bool) -> None:
    network = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    example = torch.randn(2, 4, 5, 5)
    assert found(network, example, exported=exported, trainable=True) == {"0": ("relu",)}


def test_every_call_has_its_own() -> None:
    network = Network(lambda net, y, x: net.conv(F.relu(y)) + x)
    assert found(network, torch.randn(2, 4, 5, 5)) == {"conv": ("relu", "add")}


class Residual(nn.Module):
    """Two convolutions whose outputs are added, as in a residual block that changes the size. Input (2, 4, 5, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.norm = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + self.down(x))


@pytest.mark.parametrize("trainable", [False, True])
def test_a_sum_of_two_layers_belongs_to_the_later_one(trainable: bool) -> None:
    example = torch.randn(2, 4, 5, 5)
    assert found(Residual(), example, trainable=trainable) == {"conv": ("",), "down": ("add_relu",)}
