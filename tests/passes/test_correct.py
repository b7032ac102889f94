"""Mean and spread given back: against statistics recomputed on the corrected network."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tdfx.passes.correct import FindCorrections, OutputSpread, ReestimateBatchNorm, spread
from tdfx.stages.capture import capture

LAYERS = ("first", "second", "head")
X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions, then a linear layer over channels of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.second(F.relu(self.first(x))))
        z: Tensor = self.head(y.permute(0, 2, 3, 1))
        return z


def network() -> fx.GraphModule:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return capture(Net(), X[:2]).module


def damaged(module: fx.GraphModule, names: tuple[str, ...] = LAYERS) -> fx.GraphModule:
    """The same network with other weights in these layers."""
    other = copy.deepcopy(module)
    for index, name in enumerate(names):
        layer = other.get_submodule(name)
        assert isinstance(layer.weight, Tensor)
        noise = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(index))
        layer.weight.data.mul_(0.4).add_(0.1 * noise)
    return other


def moved(
    module: fx.GraphModule, power: float, names: tuple[str, ...] = LAYERS
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The damaged network before and after its corrections are put into its layers."""
    other = damaged(module, names)
    wanted = OutputSpread(names, (X,)).run(module)
    corrected = copy.deepcopy(other)
    for name, found in FindCorrections(wanted, (X,), power).run(other).items():
        layer = corrected.get_submodule(name)
        assert isinstance(layer.weight, Tensor) and isinstance(layer.bias, Tensor)
        layer.weight.data.mul_(found.gain.float().reshape(-1, *[1] * (layer.weight.dim() - 1)))
        layer.bias.data.mul_(found.gain.float()).add_(found.shift.float())
    return other, corrected


def test_spread_is_that_of_every_channel() -> None:
    found = spread(X, 1)
    torch.testing.assert_close(found.mean, X.double().mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.deviation, X.double().std((0, 2, 3), correction=0), rtol=1e-5, atol=0)


def test_power_1_gives_mean_and_spread_back_in_every_layer() -> None:
    module = network()
    _, corrected = moved(module, 1.0)
    wanted, found = (OutputSpread(LAYERS, (X,)).run(net) for net in (module, corrected))
    for name in LAYERS:
        torch.testing.assert_close(found[name].mean, wanted[name].mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[name].deviation, wanted[name].deviation, rtol=1e-4, atol=1e-5)


def test_power_0_gives_the_mean_back_alone() -> None:
    module = network()
    before, corrected = moved(module, 0.0, ("first",))
    wanted, spoilt, found = (OutputSpread(LAYERS, (X,)).run(net)["first"] for net in (module, before, corrected))
    torch.testing.assert_close(found.mean, wanted.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.deviation, spoilt.deviation, rtol=1e-5, atol=1e-6)


def test_the_half_power_is_the_geometric_mean() -> None:
    module = network()
    other = damaged(module, ("first",))
    wanted = OutputSpread(("first",), (X,)).run(module)
    gains = [FindCorrections(wanted, (X,), power).run(other)["first"].gain for power in (1.0, 0.5)]
    torch.testing.assert_close(gains[1].square(), gains[0], rtol=1e-12, atol=0)


def test_a_dead_channel_stays_as_it_is() -> None:
    module = network()
    other = damaged(module, ("first",))
    layer = other.get_submodule("first")
    assert isinstance(layer.weight, Tensor) and isinstance(layer.bias, Tensor)
    layer.weight.data[0] = 0
    found = FindCorrections(OutputSpread(("first",), (X,)).run(module), (X,), 1.0).run(other)["first"]
    assert float(found.gain[0]) == 1.0
    assert bool(found.gain.isfinite().all() and found.shift.isfinite().all())


def test_gains_are_bounded() -> None:
    module = network()
    other = damaged(module, ("first",))
    layer = other.get_submodule("first")
    assert isinstance(layer.weight, Tensor)
    layer.weight.data[0] *= 1e-6
    found = FindCorrections(OutputSpread(("first",), (X,)).run(module), (X,), 1.0).run(other)["first"]
    assert float(found.gain[0]) == 4.0


class Twice(nn.Module):
    """One layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(F.relu(self.layer(x)))
        return y


def test_layers_called_twice_are_left_alone() -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    assert OutputSpread(("layer",), (x,)).run(capture(Twice(), x).module) == {}


class Normalised(nn.Module):
    """Two BatchNorms, the second behind the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.second, self.norm2 = nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        return y


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_is_estimated_anew_in_order(training: bool) -> None:
    module = capture(Normalised(), X[:2], trainable=True).module.train(training)
    state = copy.deepcopy(module.state_dict())
    estimated = ReestimateBatchNorm((X,)).run(module)
    with torch.no_grad():
        output = copy.deepcopy(estimated).eval()(X)
    torch.testing.assert_close(output.mean((0, 2, 3)), torch.zeros(5), rtol=0, atol=1e-4)
    torch.testing.assert_close(output.std((0, 2, 3), correction=0), torch.ones(5), rtol=1e-3, atol=0)
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
