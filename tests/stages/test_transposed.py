"""Networks of transposed convolutions, from capture to ONNX Runtime."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tdfx
from tdfx.chains import solve
from tdfx.moments import Moments
from tdfx.passes.base import layer_at
from tdfx.passes.candidates import site_weight
from tdfx.scoring import Scoring, taken_means


class Generator(nn.Sequential):
    """As DCGAN's: from (batch, 20, 1, 1) to images (batch, 3, 16, 16)."""

    def __init__(self) -> None:
        widths = (20, 32, 24, 16)
        layers: list[nn.Module] = []
        for place, (inputs, outputs) in enumerate(pairwise(widths)):
            stride, padding = (2, 1) if place else (1, 0)
            layers.append(nn.ConvTranspose2d(inputs, outputs, 4, stride, padding, bias=False))
            layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*layers[:-1], nn.LeakyReLU(0.2), nn.Conv2d(16, 3, 3, padding=1), nn.Tanh())


class UNet(nn.Module):
    """Two levels down and up again with skips; the ways up without overlap, in groups, and with output padding."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
        self.up2 = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.up1 = nn.ConvTranspose2d(32, 16, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = F.relu(self.down1(x))
        coarse = F.relu(self.down2(fine))
        up = torch.cat((F.relu(self.up2(coarse)), fine), 1)
        y: Tensor = self.head(F.relu(self.norm(self.up1(up))))
        return y


class Volumes(nn.Sequential):
    """Of three dimensions, up in all of them and in two; from (batch, 6, 2, 4, 4) to (batch, 2, 4, 16, 16)."""

    def __init__(self) -> None:
        super().__init__(
            nn.ConvTranspose3d(6, 16, (3, 4, 4), (1, 2, 2), 1, bias=False),
            nn.BatchNorm3d(16),
            nn.ReLU(),
            nn.ConvTranspose3d(16, 12, 2, stride=2),
            nn.ReLU(),
            nn.Conv3d(12, 2, 1),
        )


class Waves(nn.Sequential):
    """As a vocoder's, of one dimension; from (batch, 8, 6) to (batch, 1, 24)."""

    def __init__(self) -> None:
        super().__init__(
            nn.ConvTranspose1d(8, 24, 4, stride=2, padding=1),
            nn.LeakyReLU(0.1),
            nn.ConvTranspose1d(24, 16, 3, stride=2, padding=1, output_padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv1d(16, 1, 3, padding=1),
        )


def images(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return F.interpolate(coarse, 16, mode="bilinear") + 0.1 * torch.randn(count, 3, 16, 16, generator=generator) + 0.3


def drawn(*shape: int) -> Callable[[int, int], Tensor]:
    return lambda count, seed: torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Tensor]]] = {
    "Generator": (Generator, drawn(20, 1, 1)),
    "UNet": (UNet, images),
    "Volumes": (Volumes, drawn(6, 2, 4, 4)),
    "Waves": (Waves, drawn(8, 6)),
}
LOSS = [(name, "loss") for name in ("UNet", "Volumes", "Waves")]
METHODS = ("channel_svd", "spatial_svd", "tucker2")
SITES = {"Generator": ("3", "6"), "UNet": ("up2", "up1"), "Volumes": ("0", "3"), "Waves": ("0", "2")}


def data(name: str, count: int = 96, seed: int = 0) -> Tensor:
    return NETWORKS[name][1](count, seed)


@cache
def network(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = NETWORKS[name][0]()
        for parameter in net.parameters():
            parameter.data.mul_(1.5)
        for _ in range(20):
            net(data(name))
        return net.eval()


@cache
def captured(name: str) -> tdfx.Capture:
    return tdfx.capture(network(name), data(name)[:2])


@cache
def moments(name: str) -> Moments:
    return tdfx.calibrate(captured(name), data(name), metric="loss")


@cache
def profiled(name: str, metric: str) -> tdfx.Profile:
    return tdfx.profile(
        captured(name), methods=METHODS, metric=metric, moments=moments(name), target=None, rank_multiple=1
    )


def run(path: Path, x: Tensor) -> Tensor:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (value,) = session.get_inputs()
    (output,) = session.run(None, {value.name: x.numpy()})
    return torch.from_numpy(np.asarray(output))


@pytest.mark.parametrize(("name", "metric"), [("Generator", "weight"), ("Generator", "loss"), *LOSS])
def test_a_network_is_compressed_exported_and_loaded(name: str, metric: str, tmp_path: Path) -> None:
    options = {"calibration": moments(name)} if metric != "weight" else {}
    result = tdfx.compress(
        network(name), data(name)[:2], budget="flops=60%", metric=metric, methods=METHODS, target=None,
        rank_multiple=1, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    chosen = {candidate.site: candidate for candidate in result.plan.candidates}
    assert set(SITES[name]) <= chosen.keys()
    assert any(not chosen[site].is_dense for site in SITES[name])
    assert result.after.macs <= 0.6 * result.before.macs
    x = data(name, 3, 5)
    with torch.no_grad():
        expected = result.module(x)
        torch.testing.assert_close(
            tdfx.apply(network(name), data(name)[:2], result.plan, factors=result.module.state_dict()).module(x),
            expected, rtol=0, atol=0,
        )  # fmt: skip
        tdfx.export_onnx(result.module, tmp_path / "model.onnx", data(name)[:2])
        torch.testing.assert_close(run(tmp_path / "model.onnx", x), expected, rtol=1e-4, atol=1e-5)
        tdfx.save(result, tmp_path / "saved")
        torch.testing.assert_close(tdfx.load(tmp_path / "saved").module(x), expected, rtol=0, atol=0)


def test_nothing_is_left_of_the_batch_norms() -> None:
    kinds = {type(module) for name in NETWORKS for module in captured(name).module.modules()}
    assert nn.BatchNorm2d not in kinds and nn.ConvTranspose2d in kinds


PLACES = [
    (name, site, method)
    for name in NETWORKS
    for site in SITES[name]
    for method in METHODS
    if method != "spatial_svd" or name in ("Generator", "UNet")  # it takes two dimensions
]


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize(("name", "site", "method"), PLACES)
def test_feature_errors_are_output_errors_measured_on_the_layer(
    name: str, site: str, method: str, correct: bool
) -> None:
    """Root mean square over all output positions, whatever taps of the kernel reach them."""
    scoring = Scoring("feature:absolute", moments(name), taken_means(moments(name)) if correct else {})
    (place,) = (s for s in profiled(name, "feature").sites if s.name == site)
    candidate = next(c for c in profiled(name, "feature").of_site(site) if c.method == method)
    solved = solve(captured(name).module, place, candidate, scoring, 0)
    dense = copy.deepcopy(layer_at(captured(name).module, site)).double()
    chain = solved.replacements()[site].chain.double()
    with torch.no_grad():
        x = inputs_of(name, site)
        left = (dense(x) - chain(x)).movedim(1, -1).flatten(0, -2)
    measured = float(left.square().sum(1).mean().sqrt())
    assert solved.error(site_weight(captured(name).module, place), scoring) == pytest.approx(measured, rel=1e-2)
    if correct:
        assert float(left.mean(0).norm()) <= 1e-3 * measured


def inputs_of(name: str, site: str) -> Tensor:
    """What the layer sees in the original."""
    seen: list[Tensor] = []
    module = captured(name).module
    handle = module.get_submodule(site).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        module(data(name))
    handle.remove()
    return seen[0].double()
