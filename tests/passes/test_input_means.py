"""Means of inputs without data: against the mean of what a BatchNorm's normal outputs become."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdfx.im2col import im2col
from tdfx.passes.base import layer_at
from tdfx.passes.input_means import InputMeans
from tdfx.passes.shape_prop import ShapeProp
from tdfx.passes.sites import FindSites
from tdfx.stages.capture import capture

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def means(model: nn.Module, *, trainable: bool = False, x: Tensor = X) -> dict[str, Tensor]:
    module = capture(model, x, trainable=trainable).module
    metas = ShapeProp((x,)).run(module)
    return InputMeans(FindSites(metas).run(module)[0], metas).run(module)


def normal_batch_norm(channels: int, seed: int = 1) -> nn.BatchNorm2d:
    generator = torch.Generator().manual_seed(seed)
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(channels, generator=generator) + 0.5)
        norm.bias.copy_(torch.randn(channels, generator=generator))
    return norm


class Net(nn.Module):
    """Convolution and BatchNorm, something, a convolution with padding."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1), normal_batch_norm(4)
        self.between = between
        self.second = nn.Conv2d(4, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.between(self.norm(self.first(x))))
        return y


def drawn(norm: nn.BatchNorm2d, count: int = 40_000) -> Tensor:
    """Values of normal channels, (count, channels, 1, 1)."""
    noise = torch.randn(count, norm.num_features, generator=torch.Generator().manual_seed(2))
    return (norm.bias + norm.weight.abs() * noise).detach()[:, :, None, None]


FUNCTIONS = {
    "relu": F.relu,
    "module": nn.ReLU6(),
    "gelu": nn.GELU(),
    "silu": F.silu,
    "method": lambda x: x.relu(),
    "slope": lambda x: F.leaky_relu(x, 0.2),
    "identity": lambda x: x,
    "twice": lambda x: F.hardswish(F.relu(x)),
}


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_means_behind_functions(name: str, trainable: bool) -> None:
    net = Net(FUNCTIONS[name]).eval()
    channel = FUNCTIONS[name](drawn(net.norm)).mean((0, 2, 3))
    sample = channel.reshape(1, 4, 1, 1).expand(1, 4, 6, 6)
    wanted = im2col(sample.double(), net.second).mean(0)
    found = means(net, trainable=trainable)
    assert set(found) == {"second"}  # nothing is known of the network's own input
    torch.testing.assert_close(found["second"], wanted.detach(), rtol=0.02, atol=0.03)


def test_padding_counts() -> None:
    found = means(Net(F.relu).eval())["second"].reshape(4, 3, 3)
    torch.testing.assert_close(found[:, 0, 1] / found[:, 1, 1], torch.full((4,), 5 / 6, dtype=torch.float64))
    torch.testing.assert_close(found[:, 0, 0] / found[:, 1, 1], torch.full((4,), 25 / 36, dtype=torch.float64))


@pytest.mark.parametrize(
    "between", [lambda x: F.max_pool2d(x, 1), lambda x: x * 2, lambda x: x[:, :, :4], lambda x: x + 1.0, torch.softmax]
)
def test_what_is_not_followed_is_not_known(between: Callable[..., Tensor]) -> None:
    function = (lambda x: torch.softmax(x, 1)) if between is torch.softmax else between
    assert means(Net(function).eval()) == {}


class Residual(nn.Module):
    """The sum of two normalised branches, its average, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.norms = nn.ModuleList([normal_batch_norm(4, 3), normal_batch_norm(4, 4)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.left(x)) + self.norms[1](self.right(x)))
        z: Tensor = self.head(y.mean((2, 3)))
        return z


def test_sums_and_averages() -> None:
    net = Residual().eval()
    left, right = net.norms
    assert isinstance(left, nn.BatchNorm2d) and isinstance(right, nn.BatchNorm2d)
    wanted = F.relu(drawn(left) + drawn(right).flip(0)).mean((0, 2, 3)).double()
    torch.testing.assert_close(means(net)["head"], wanted, rtol=0.02, atol=0.03)


class Twice(nn.Module):
    """A layer that is called on two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.twice = nn.Conv2d(3, 4, 1), normal_batch_norm(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.twice(F.relu(self.twice(F.relu(self.norm(self.first(x))))))
        return y


def test_a_layer_with_several_inputs_has_no_one_mean() -> None:
    assert "twice" not in means(Twice().eval())


def test_columns_are_those_of_the_layer() -> None:
    net = Net(F.relu).eval()
    module = capture(net, X).module
    assert means(net)["second"].shape == (layer_at(module, "second").weight[0].numel(),)


class InPlace(nn.Module):
    """A BatchNorm whose output is overwritten, by an operation whose own result nobody reads."""

    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), normal_batch_norm(8)
        self.after, self.change = nn.Conv2d(8, 4, 1), change

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        self.change(y)
        z: Tensor = self.after(y)
        return z


def test_values_overwritten_in_place_are_followed() -> None:
    for change in (F.relu_, lambda y: F.relu(y, inplace=True), torch.relu_):
        found = means(InPlace(change), trainable=True).get("after")
        wanted = means(InPlace(lambda y: None), trainable=True)["after"]
        assert found is None or float((found - wanted).norm()) > 0.1 * float(wanted.norm())
    assert "after" not in means(InPlace(lambda y: y.mul_(3.0)), trainable=True)
