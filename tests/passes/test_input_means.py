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


def means(model: nn.Module, *, trainable: bool = False, x: Tensor = X, tier: str = "auto") -> dict[str, Tensor]:
    module = capture(model, x, trainable=trainable, capture=tier).module
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


class Sequences(nn.Module):
    """A linear layer on the last dimension of what BatchNorm normalised along another one, of the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.linear = nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.norm(self.first(x)))
        return y


def test_features_are_not_channels() -> None:
    assert means(Sequences().eval(), x=torch.randn(2, 3, 4)) == {}


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


@pytest.mark.parametrize("tier", ["fx", "export"])
def test_values_overwritten_in_place_are_followed(tier: str) -> None:
    wanted = means(InPlace(lambda y: None), trainable=True)["after"]
    for change in (F.relu_, lambda y: F.relu(y, inplace=True), torch.relu_):
        found = means(InPlace(change), trainable=True, tier=tier).get("after")
        assert found is None or float((found - wanted).norm()) > 0.1 * float(wanted.norm())
    assert "after" not in means(InPlace(lambda y: y.mul_(3.0)), trainable=True, tier=tier)


def test_operators_of_torch_export_are_followed_as_functions_are() -> None:
    parts = (nn.GELU(), lambda x: F.avg_pool2d(F.hardswish(x), 3, 1))
    nets: list[nn.Module] = [Net(between).eval() for between in parts]
    nets += [Drawn(2, FLATTENED[name], nn.Linear(100, 2)).eval() for name in ("view", "average")]
    for net in (*nets, Residual().eval()):
        traced, exported = (means(net, trainable=True, tier=tier) for tier in ("fx", "export"))
        assert traced
        torch.testing.assert_close(exported, traced)


class Drawn(nn.Module):
    """A convolution of noise without padding, BatchNorm, something, and a layer."""

    def __init__(self, dims: int, between: Callable[[Tensor], Tensor], last: nn.Module, *, affine: bool = True) -> None:
        super().__init__()
        kind, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[dims - 1]
        self.first, self.norm = kind(3, 4, 2), norm(4, affine=affine, momentum=None)
        self.between, self.last = between, last

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.between(self.norm(self.first(x))))
        return y


def assert_means_are_those_measured(net: Drawn, dims: int, *, trainable: bool, size: int = 6) -> None:
    """On noise, from which BatchNorm has its statistics."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
        noise = torch.randn(8000, 3, *[size] * dims, generator=generator)
        net.train()(noise)
        seen: list[Tensor] = []
        net.eval().last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        net(noise)
        wanted = im2col(seen[0], layer_at(net, "last")).mean(0).double()
    found = means(net, trainable=trainable, x=noise[:2])
    torch.testing.assert_close(found["last"], wanted, rtol=0.02, atol=0.03)


@pytest.mark.parametrize("trainable", [False, True])
def test_means_without_affine_parameters(trainable: bool) -> None:
    net = Drawn(2, F.relu, nn.Conv2d(4, 2, 3), affine=False)
    assert_means_are_those_measured(net, 2, trainable=trainable)
    found = means(net, trainable=trainable, x=torch.zeros(2, 3, 6, 6))["last"]
    half_normal = torch.full((36,), (2 * torch.pi) ** -0.5, dtype=torch.float64)
    torch.testing.assert_close(found, half_normal, rtol=1e-2, atol=0)


FLATTENED: dict[str, Callable[[Tensor], Tensor]] = {
    "function": lambda x: torch.flatten(F.relu(x), 1),
    "module": nn.Sequential(nn.Flatten(), nn.ReLU()),
    "method": lambda x: F.relu(x).flatten(1),
    "view": lambda x: F.relu(x).view(x.size(0), -1),
    "reshape": lambda x: torch.reshape(F.relu(x), (x.shape[0], -1)),
    "average": lambda x: F.adaptive_avg_pool2d(F.relu(x), (5, 5)).flatten(1),
}


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", FLATTENED)
def test_means_behind_flattening(name: str, trainable: bool) -> None:
    assert_means_are_those_measured(Drawn(2, FLATTENED[name], nn.Linear(100, 2)), 2, trainable=trainable)


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.permute(0, 2, 3, 1).reshape(-1, 100),
        lambda x: x.permute(0, 2, 3, 1).flatten(1),
        lambda x: F.relu(x).view(-1, 25),
        lambda x: F.relu(x).flatten(2),
    ],
)
def test_other_reshapings_are_not_followed(between: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 3, 6, 6)
    last = nn.Linear(between(torch.zeros(2, 4, 5, 5)).shape[-1], 2)
    assert "last" not in means(Drawn(2, between, last).eval(), x=x)


AVERAGED: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "module 1d": (1, nn.AvgPool1d(2)),
    "module 2d": (2, nn.AvgPool2d(2, 1)),
    "module 3d": (3, nn.AvgPool3d(2, ceil_mode=True)),
    "function 1d": (1, lambda x: F.avg_pool1d(x, 3, 1, 1, False, False)),
    "function 2d": (2, lambda x: F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)),
    "function 3d": (3, lambda x: F.avg_pool3d(x, 2, padding=0)),
    "padded module": (2, nn.AvgPool2d(3, 2, padding=1, count_include_pad=False)),
    "adaptive": (2, nn.AdaptiveAvgPool2d(3)),
    "sum": (2, lambda x: F.avg_pool2d(x, 2) + F.adaptive_avg_pool2d(x, 2)),
    "one dimension": (2, lambda x: x.mean(-1, keepdim=True)),
}


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", AVERAGED)
def test_means_behind_averages(name: str, trainable: bool) -> None:
    dims, average = AVERAGED[name]
    last = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](4, 2, 1)
    between = nn.Sequential(nn.SiLU(), average) if isinstance(average, nn.Module) else lambda x: average(F.silu(x))
    net = Drawn(dims, between, last)
    assert_means_are_those_measured(net, dims, trainable=trainable, size=5 if dims == 3 else 6)


@pytest.mark.parametrize(
    "between",
    [
        lambda x: F.avg_pool2d(x, 3, 1, 1),
        lambda x: F.avg_pool2d(x, 3, 1, (0, 1)),
        nn.AvgPool2d(3, 1, 1),
        lambda x: F.avg_pool2d(x, 2, divisor_override=3),
        nn.AvgPool2d(2, divisor_override=3),
        lambda x: F.relu(F.avg_pool2d(x, 2)),  # of a variance that is not known
        lambda x: F.relu(x.mean((2, 3), keepdim=True)),
        lambda x: F.relu(F.avg_pool2d(x, 2) + F.max_pool2d(x, 2)),
        lambda x: F.relu(F.avg_pool2d(x, 2) + F.avg_pool2d(F.relu(x), 2)),
        lambda x: x.mean((1, 2), keepdim=True).expand(-1, 4, -1, -1),
    ],
)
def test_averages_that_lower_the_mean_or_what_follows_are_not_known(between: Callable[[Tensor], Tensor]) -> None:
    net = Drawn(2, between, nn.Conv2d(4, 2, 1)).eval()
    assert "last" not in means(net, x=torch.randn(2, 3, 6, 6))


@pytest.mark.parametrize(
    "between", [lambda x: x.mean(1), lambda x: F.avg_pool2d(x, 3, 1, 1, False, False), lambda x: x.mean().view(1, 1)]
)
def test_averages_over_channels_are_none_over_positions(between: Callable[[Tensor], Tensor]) -> None:
    """In one dimension with as many positions as channels, where shapes do not tell them apart."""
    net = Drawn(1, between, nn.Linear(between(torch.zeros(2, 4, 4)).shape[-1], 2)).eval()
    assert "last" not in means(net, x=torch.randn(2, 3, 5))


def test_positions_alone_flattened_are_not_followed() -> None:
    net = Drawn(2, lambda x: x.flatten(2), nn.Conv1d(4, 2, 1)).eval()
    assert "last" not in means(net, x=torch.randn(2, 3, 6, 6))


def test_a_module_is_known_by_its_type_not_its_name() -> None:
    class Averaging(Drawn):
        mean: nn.Module

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.mean(self.norm(self.first(x))))
            return y

    net = Averaging(2, F.relu, nn.Conv2d(4, 2, 1))
    net.mean = nn.AvgPool2d(2)
    assert "last" in means(net.eval(), x=torch.randn(2, 3, 6, 6))


class Sizes(Net):
    """Hands a size on beside its output."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.first(x))
        return self.second(y), (y.size(0), y.shape)  # type: ignore[return-value]


def test_values_that_are_no_tensors_are_passed_by() -> None:
    assert "second" in means(Sizes(F.relu).eval())
