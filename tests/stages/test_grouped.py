"""Networks of convolutions in groups, from capture to ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tdfx
from tdfx.latency.kit import kit_of
from tdfx.moments import Moments
from tdfx.passes.base import layer_at
from tdfx.passes.fused_operators import FusedOperators
from tdfx.passes.input_means import InputMeans
from tdfx.passes.shape_prop import ShapeProp
from tdfx.passes.sites import FindSites


class ResNeXt(nn.Module):
    """Two bottlenecks with convolutions in groups, one of them strided, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(24, 32, 1, bias=False),
                nn.BatchNorm2d(32),
                nn.ReLU(),
                nn.Conv2d(32, 32, 3, stride=stride, padding=1, groups=4, bias=False, padding_mode=mode),
                nn.BatchNorm2d(32),
                nn.ReLU(),
                nn.Conv2d(32, 24, 1, bias=False),
                nn.BatchNorm2d(24),
            )
            for stride, mode in ((1, "reflect"), (2, "zeros"))
        )
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem_norm(self.stem(x)))
        y = F.relu(y + self.blocks[0](y))
        y = F.relu(self.blocks[1](y))
        z: Tensor = self.head(y.mean((2, 3)))
        return z


class MobileNet(nn.Module):
    """An inverted bottleneck with a depthwise 5 x 5 convolution, and one with 3 x 3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(16, 48, 1, bias=False),
                nn.BatchNorm2d(48),
                nn.Hardswish(),
                nn.Conv2d(48, 48, kernel, padding=kernel // 2, groups=48, bias=False),
                nn.BatchNorm2d(48),
                nn.Hardswish(),
                nn.Conv2d(48, 16, 1, bias=False),
                nn.BatchNorm2d(16),
            )
            for kernel in (5, 3)
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.stem_norm(self.stem(x)))
        for block in self.blocks:
            y = y + block(y)
        z: Tensor = self.head(y.mean((2, 3)))
        return z


NETWORKS: dict[str, Callable[[], nn.Module]] = {"ResNeXt": ResNeXt, "MobileNet": MobileNet}
GROUPED = {"ResNeXt": ("blocks.0.3", "blocks.1.3"), "MobileNet": ("blocks.0.3",)}
METHODS = ("svd", "channel_svd", "spatial_svd", "tucker2")


def images(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return F.interpolate(coarse, 14, mode="bilinear") + 0.1 * torch.randn(count, 3, 14, 14, generator=generator)


DATA = images(64, 0)


@cache
def network(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = NETWORKS[name]()
        for _ in range(20):
            net(DATA)
        return net.eval()


@cache
def moments(name: str) -> Moments:
    return tdfx.calibrate(tdfx.capture(network(name), DATA[:2]), DATA, metric="loss")


def compressed(name: str, budget: str = "flops=60%", **options: object) -> tdfx.Result:
    given = {"methods": METHODS, "target": None, "rank_multiple": 1, **options}
    return tdfx.compress(network(name), DATA[:2], budget=budget, **given)  # type: ignore[arg-type]


def overrides(name: str) -> dict[str, dict[str, object]]:
    """Ranks that put a chain in place of every convolution in groups."""
    methods = {
        "ResNeXt": {"methods": ["tucker2"], "rank": (3, 4)},
        "MobileNet": {"methods": ["spatial_svd"], "rank": 1},
    }
    return {site: dict(methods[name]) for site in GROUPED[name]}


def run(path: Path, x: Tensor) -> Tensor:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (value,) = session.get_inputs()
    (output,) = session.run(None, {value.name: x.numpy()})
    return torch.from_numpy(np.asarray(output))


@pytest.mark.parametrize("metric", ["loss", "weight", "feature"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_compressed_exported_and_loaded(name: str, metric: str, tmp_path: Path) -> None:
    options = {"calibration": moments(name)} if metric != "weight" else {}
    result = compressed(name, metric=metric, overrides=overrides(name), **options)
    chosen = {candidate.site: candidate for candidate in result.plan.candidates}
    assert all(not chosen[site].is_dense for site in GROUPED[name])
    assert result.after.macs <= 0.6 * result.before.macs
    assert result.after.params == sum(parameter.numel() for parameter in result.module.parameters())
    x = images(5, 1)
    with torch.no_grad():
        wanted = result.module(x)
    tdfx.export_onnx(result.module, tmp_path / "net.onnx", DATA[:2])
    torch.testing.assert_close(run(tmp_path / "net.onnx", x), wanted, rtol=1e-4, atol=1e-5)
    tdfx.save(result, tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(tdfx.load(tmp_path / "saved").module(x), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_method_at_full_rank_is_the_network(name: str) -> None:
    result = compressed(name, "flops=90%", methods=None, verify="full")
    checked = result.report.verification["full_rank"]
    methods = ("channel_svd", "cp", "cp4", "spatial_svd", "tt", "tucker2") if name == "ResNeXt" else ("spatial_svd",)
    assert {key for key in checked if key.startswith("blocks.0.3")} == {f"blocks.0.3.{method}" for method in methods}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_trainable_result_learns(name: str) -> None:
    result = compressed(name, trainable=True, overrides=overrides(name), calibration=DATA, metric="loss")
    module = result.module.train()
    module(DATA[:8]).square().sum().backward()
    for site in GROUPED[name]:
        gradients = [p.grad for p in module.get_submodule(site).parameters()]
        assert gradients and all(gradient is not None and bool(gradient.any()) for gradient in gradients)


def test_depthwise_layers_become_two_of_one_direction_each() -> None:
    result = compressed("MobileNet", overrides=overrides("MobileNet"))
    vertical, horizontal = result.module.get_submodule("blocks.0.3.spatial_svd").children()
    assert isinstance(vertical, nn.Conv2d) and isinstance(horizontal, nn.Conv2d)
    for layer, kernel in ((vertical, (5, 1)), (horizontal, (1, 5))):
        assert (layer.groups, layer.in_channels, layer.out_channels, layer.kernel_size) == (48, 48, 48, kernel)
    weight = network("MobileNet").get_submodule("blocks.0.3").weight.detach()
    norm = network("MobileNet").get_submodule("blocks.0.4")
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None and isinstance(weight, Tensor)
    folded = weight * (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()[:, None, None, None]
    u, s, vt = torch.linalg.svd(folded[:, 0].double())
    best = s[:, 0, None, None] * u[:, :, :1] @ vt[:, :1]
    torch.testing.assert_close((vertical.weight * horizontal.weight)[:, 0].double(), best, rtol=1e-4, atol=1e-6)
    (reason,) = (entry.reason for entry in result.plan.skipped if entry.layer == "blocks.1.3")
    assert reason == "a depthwise 3 x 3 convolution is cheap already; kernels of 5 x 5 and more are decomposed"


def test_depthwise_layers_are_offered_on_the_target_without_a_caveat() -> None:
    profile = tdfx.profile(tdfx.capture(network("MobileNet"), DATA[:2]), target="ort-cpu", methods=METHODS)
    found = [candidate for candidate in profile.of_site("blocks.0.3") if not candidate.is_dense]
    assert {(c.method, c.rank) for c in found} == {("spatial_svd", (1,)), ("spatial_svd", (2,))}
    assert not any("off the grid" in candidate.caveat for candidate in found)


def test_errors_in_the_cache_are_of_one_number_of_groups(tmp_path: Path) -> None:
    """A weight (16, 4, 3, 3) of 4 inputs in one group, and of 8 in two."""
    errors = []
    weight = torch.randn(16, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for folder in (tmp_path, tmp_path / "other"):
        for groups in (1, 2):
            net = nn.Sequential(nn.Conv2d(4 * groups, 16, 3, groups=groups)).eval()
            net.load_state_dict({"0.weight": weight, "0.bias": torch.zeros(16)})
            captured = tdfx.capture(net, torch.randn(2, 4 * groups, 8, 8))
            pinned = {"0": {"methods": ["channel_svd"], "rank": 2}}
            profile = tdfx.profile(captured, overrides=pinned, target=None, cache_dir=folder)
            errors += [candidate.error for candidate in profile.candidates]
    assert len(errors) == 4 and errors[:2] == errors[2:] and errors[0] != errors[1]


@pytest.mark.parametrize("name", NETWORKS)
def test_means_without_data_correct_the_bias(name: str) -> None:
    """On an input that is its own mean everywhere, layer and chain agree in the mean over positions."""
    (site, *_), captured = GROUPED[name], tdfx.capture(network(name), DATA[:2])
    metas = ShapeProp((DATA[:2],)).run(captured.module)
    sites, _ = FindSites(metas).run(captured.module)
    layer = layer_at(captured.module, site)
    columns = InputMeans(sites, metas).run(captured.module)[site].reshape(layer.weight.shape[1] * layer.groups, -1)
    size = next(s.layer.calls[0].input_shape[-2:] for s in sites if s.name == site)
    channels = columns[:, columns.shape[1] // 2]
    x = channels.float()[None, :, None, None].expand(1, -1, *size)
    apart = []
    for correct in (False, True):
        chain = compressed(name, overrides=overrides(name), correct=correct).module.get_submodule(site)
        with torch.no_grad():
            apart.append(float((layer(x) - chain(x)).mean((0, 2, 3)).norm()))
    assert apart[1] < 1e-4 * apart[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_timed_are_the_grouped_layers(name: str) -> None:
    captured = tdfx.capture(network(name), DATA[:2])
    profile = tdfx.profile(captured, target=None, rank_multiple=1, methods=METHODS)
    fused = FusedOperators(profile.sites, ShapeProp((DATA[:2],)).run(captured.module)).run(captured.module)
    kit = kit_of(profile, fused)
    for site, method, _, pairs in kit.rows:
        if site not in GROUPED[name] or method == "dense":
            continue
        for _, key in pairs:
            piece = kit.pieces[key]
            nodes = onnx.load_from_string(piece.model()).graph.node
            groups = [a.i for node in nodes if node.op_type == "Conv" for a in node.attribute if a.name == "group"]
            assert groups == [layer.groups for layer in piece.layers]
            session = ort.InferenceSession(piece.model(), providers=["CPUExecutionProvider"])
            feed = {v.name: np.ones(v.shape, np.float32) for v in session.get_inputs()}
            (output,) = session.run(None, feed)
            assert output.shape == piece.layers[-1].calls[0].output_shape


@pytest.mark.parametrize("metric", ["feature", "loss"])
def test_moments_take_no_more_room_than_depthwise_layers_need(metric: str, tmp_path: Path) -> None:
    """All 1200 inputs of the layer would take 11.5 MB, its channels' own 25 take 240 kB."""
    captured = tdfx.capture(network("MobileNet"), DATA[:2])
    found = tdfx.calibrate(captured, DATA, metric=metric, memory_limit="800KB")
    assert found.sites["blocks.0.3"].in_cov.shape == (48, 25, 25)
    assert "blocks.0.3" not in {entry.layer for entry in found.skipped}
    found.save(tmp_path / "moments")
    assert Moments.load(tmp_path / "moments").fingerprint == found.fingerprint
    sites = {"blocks.0.3": replace(found.sites["blocks.0.3"], observations=24)}
    assert "24 independent inputs of 25 values" in str(replace(found, sites=sites).scarcity())
    assert replace(found, sites={"a": replace(sites["blocks.0.3"], observations=25)}).scarcity() is None
