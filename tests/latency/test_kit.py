"""What is timed for a profile is what its plans build."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from torch import nn

import tdfx
from tdfx.latency import runner
from tdfx.latency.grid import WIDTHS
from tdfx.latency.kit import Kit, kit_of
from tdfx.records.profile import Profile

INPUT = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))


def network(bias: bool) -> nn.Module:
    """A layer whose input has an unknown mean, one that BatchNorm gives a bias, and one whose input's mean is known."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(16, 16, 3, bias=bias), nn.Conv2d(16, 16, 3, bias=bias), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(16, 16, 3, bias=bias)).eval()


@cache
def profiled(bias: bool, correct: bool) -> Profile:
    captured = tdfx.capture(network(bias), INPUT)
    return tdfx.profile(captured, overrides={"*": {"rank": 4, "methods": ["spatial_svd"]}}, correct=correct)


def kit(profile: Profile, *, with_grid: bool = False) -> Kit:
    return kit_of(profile, {site.name: ("",) for site in profile.sites}, with_grid=with_grid)


@pytest.mark.parametrize(
    ("bias", "correct", "wanted"),
    [(True, True, [True] * 3), (False, True, [False, True, True]), (False, False, [False, True, False])],
)
def test_chains_have_a_bias_where_they_get_one(bias: bool, correct: bool, wanted: list[bool]) -> None:
    profile = profiled(bias, correct)
    found = kit(profile)
    chains = {site: found.pieces[pairs[0][1]].layers for site, method, _, pairs in found.rows if method != "dense"}
    assert [chain[-1].bias for chain in chains.values()] == wanted
    assert not any(layer.bias for *others, _ in chains.values() for layer in others)
    built = tdfx.apply(network(bias), INPUT, plan=tdfx.plan(profile, "flops=100%")).module
    for site, chain in chains.items():
        layers = [module for name, module in built.named_modules() if name.startswith(f"{site}.spatial_svd.")]
        assert [module.bias is not None for module in layers] == [spec.bias for spec in chain]


def test_layers_as_they_are_keep_theirs() -> None:
    found = kit(profiled(False, True))
    dense = [found.pieces[pairs[0][1]].layers[0].bias for _, method, _, pairs in found.rows if method == "dense"]
    assert dense == [False, True, False]


def test_the_grids_models_are_in_the_kit_where_it_is_asked_for() -> None:
    assert kit(profiled(True, True)).listing["grid"] == []
    found = kit(profiled(True, True), with_grid=True)
    listing = json.loads(json.dumps(found.listing))
    assert [width for _, width, _ in listing["grid"]] == list(WIDTHS)
    assert all(found.pieces[key].macs == macs for key, _, macs in listing["grid"])
    assert found.pieces.keys() == listing["bytes"].keys() == {key for keys in runner.groups_of(listing) for key in keys}
