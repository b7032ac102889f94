from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import build
from torch import Tensor, nn

from tdfx.decompositions import registry
from tdfx.errors import OptionError, PassError
from tdfx.passes.count import network_cost
from tdfx.passes.factorize import Factorize, Replacement
from tdfx.records.capture import Capture
from tdfx.records.profile import Profile
from tdfx.stages.capture import capture
from tdfx.stages.profile import profile
from tdfx.targets import find_target

METHODS = ["svd", "spatial_svd", "tucker2"]
DIRECT = ("svd", "channel_svd", "spatial_svd")
METRICS = ["weight:absolute", "weight:relative", "weight:scaled"]


@cache
def captured(name: str = "vgg") -> Capture:
    model, inputs = build(name)
    return capture(model, inputs)


@cache
def profiled(name: str = "vgg") -> Profile:
    return profile(captured(name), methods=METHODS)


def small(**options: Any) -> Profile:
    """The profile of one 3 x 3 convolution and one linear layer."""
    return profile(capture(network(), torch.zeros(2, 24, 5, 5)), **{"methods": METHODS, **options})


@cache
def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(24, 40, 3, padding=1), nn.Flatten(), nn.Linear(1000, 36))


def names(found: Sequence[Any]) -> list[str]:
    return [entry.name for entry in found]


def test_sites_are_in_order_of_execution_and_have_dense_first() -> None:
    found = profiled()
    assert names(found.sites) == ["features.0", "features.3", "features.5", "classifier.1", "classifier.4"]
    assert [c.site for c in found.candidates] == [site.name for site in found.sites for _ in found.of_site(site.name)]
    for site in found.sites:
        dense, *others = found.of_site(site.name)
        assert dense.is_dense and (dense.rank, dense.error, dense.caveat) == ((), 0.0, "")
        assert others and not any(candidate.is_dense for candidate in others)
        assert len({(candidate.method, candidate.rank) for candidate in others}) == len(others)


@pytest.mark.parametrize("name", ["vgg", "unet", "siamese", "resnet"])
def test_rest_and_dense_sites_are_the_normalized_network(name: str) -> None:
    found, target = profiled(name), find_target("ort-cpu")
    whole = found.rest
    for site in found.sites:
        whole = whole + found.of_site(site.name)[0].cost
    given = captured(name)
    normalized = network_cost(given.module, given.args, given.kwargs, target)
    assert (whole.params, whole.macs, whole.weight_bytes) == (
        normalized.params,
        normalized.macs,
        normalized.weight_bytes,
    )
    assert whole.latency_s == pytest.approx(normalized.latency_s, rel=1e-9)
    model, inputs = build(name)
    assert found.before == network_cost(model, inputs, {}, target)


def test_each_candidate_costs_what_the_network_with_it_costs_more() -> None:
    given = captured("siamese")
    target = find_target("ort-cpu")
    found = profiled("siamese")
    whole = network_cost(given.module, given.args, given.kwargs, target)
    for site in found.sites:
        for candidate in found.of_site(site.name)[1::4]:
            method = registry()[candidate.method]
            layer: Any = given.module.get_submodule(site.name)
            factors = method.decompose(layer.weight.detach().double(), candidate.rank)
            chain = method.build(site, candidate.rank, factors, layer.bias)
            spliced = Factorize({site.name: Replacement(method.name, chain)}).run(given.module)
            counted = network_cost(spliced, given.args, given.kwargs, target)
            expected = whole - found.of_site(site.name)[0].cost + candidate.cost
            assert (counted.params, counted.macs, counted.weight_bytes) == (
                expected.params, expected.macs, expected.weight_bytes,
            )  # fmt: skip
            assert counted.latency_s == pytest.approx(expected.latency_s, rel=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_errors_are_what_the_decompositions_leave(metric: str) -> None:
    found = small(metric=metric)
    model: Any = network()
    weights = {name: model.get_submodule(name).weight.detach().double() for name in ("0", "2")}
    assert found.metric == metric
    for candidate in found.candidates:
        if candidate.is_dense:
            continue
        weight, method = weights[candidate.site], registry()[candidate.method]
        difference = weight - method.reconstruct(method.decompose(weight, candidate.rank))
        scale = {"weight:absolute": 1.0, "weight:relative": float(weight.norm()), "weight:scaled": weight.numel()}[
            metric
        ]
        norm = float(weight.norm())
        assert candidate.metric == metric
        rtol = 1e-6 if method.name in DIRECT else 0.05  # interpolated
        assert candidate.error == pytest.approx(float(difference.norm()) / scale, rel=rtol, abs=1e-12 * norm / scale)


def test_plain_candidates_are_on_the_grid_and_not_slower_than_dense() -> None:
    found = profiled()
    assert found.rank_multiple == 16
    for site in found.sites:
        dense, *others = found.of_site(site.name)
        for candidate in others:
            off_grid = any(rank % 16 for rank in candidate.rank)
            assert candidate.cost.latency_s is not None and dense.cost.latency_s is not None
            slower = candidate.cost.latency_s >= dense.cost.latency_s
            assert bool(candidate.caveat) == (off_grid or slower)
            assert ("off the grid of 16" in candidate.caveat) == off_grid
            assert ("slower than dense" in candidate.caveat) == slower
    plain = [candidate for candidate in found.candidates if not candidate.caveat and not candidate.is_dense]
    assert 0 < len(plain) < len(found.candidates) - len(found.sites)


def test_without_a_target_there_is_no_latency_and_no_grid() -> None:
    found = small(target=None)
    assert (found.target, found.latency_source, found.rank_multiple) == (None, None, 1)
    assert {candidate.cost.latency_s for candidate in found.candidates} == {None}
    assert found.before.latency_s is None and found.rest.latency_s is None
    assert {candidate.caveat for candidate in found.candidates} == {""}
    assert any(rank % 16 for candidate in found.candidates for rank in candidate.rank)


@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_a_grid_of_ones_own(multiple: int) -> None:
    found = small(rank_multiple=multiple)
    assert found.rank_multiple == multiple
    plain = [c for c in found.candidates if "grid" not in c.caveat]
    assert math.gcd(*(rank for candidate in plain for rank in candidate.rank)) == multiple
    assert any("grid" in candidate.caveat for candidate in found.candidates) == (multiple > 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_multiple": 0}, "rank_multiple is 0; expected a positive integer, or None"),
        ({"rank_multiple": 2.0}, "rank_multiple is 2.0"),
        ({"rank_multiple": True}, "rank_multiple is True"),
        ({"seed": -1}, "seed is -1; expected a whole number from 0 to"),
        ({"seed": "1"}, "seed is '1'"),
        ({"seed": True}, "seed is True"),
        ({"target": "gpu"}, "target is 'gpu', expected one of 'ort-cpu', a file of tdfx latency-fit, or None"),
        ({"ranks": "vmbf", "methods": "svd"}, "ranks is 'vmbf': unknown rule 'vmbf'; did you mean 'vbmf'"),
        ({"ranks": "vbmf"}, "methods names svd, spatial_svd, tucker2; expected exactly one method with ranks"),
        ({"metric": "los"}, "unknown metric 'los'"),
        ({"methods": ["sv"]}, "unknown method 'sv'"),
        ({"include": "nothing*"}, r"include: 'nothing\*' matches no layer; the model has 0, 2"),
        ({"exclude": ["0", "1"]}, "exclude: '1' matches no layer"),
        ({"overrides": {"fc": {"rank": 8}}}, "overrides: 'fc' matches no layer"),
        ({"overrides": {"fc": {"ranks": 8}}}, "has 'ranks'; understood are"),
        (
            {"overrides": {"0": {"rank": 500}}},
            "no method takes rank 500 at 0: kernel is 3x3; .*; no rank of spatial_svd",
        ),
        ({"overrides": {"2": {"rank": [8, 8]}}}, "no method takes rank 8x8 at 2"),
        ({"overrides": {"0": {"rank": 8, "methods": "svd"}}}, "no method takes rank 8 at 0"),
    ],
)
def test_options_that_are_not_understood(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        small(**options)


def test_layers_left_alone_have_reasons_and_count_to_the_rest() -> None:
    everything = small()
    found = small(exclude="2")
    assert names(found.sites) == ["0"]
    assert [(entry.layer, entry.reason) for entry in found.skipped] == [("2", "excluded (2)")]
    assert {candidate.site for candidate in found.candidates} == {"0"}
    assert found.rest.macs == everything.rest.macs + everything.of_site("2")[0].cost.macs
    assert names(small(include=["2"]).sites) == names(small(overrides={"0": {"skip": True}}).sites) == ["2"]


def test_a_layer_that_no_method_helps_is_skipped_with_reasons() -> None:
    found = small(methods=["svd"])
    assert names(found.sites) == ["2"]
    assert [(entry.layer, entry.reason) for entry in found.skipped] == [
        ("0", "kernel is 3x3; svd takes linear layers and 1x1 convolutions")
    ]
    everything = small()
    assert found.rest.macs == everything.rest.macs + everything.of_site("0")[0].cost.macs
    tiny = profile(capture(nn.Linear(1, 1), torch.zeros(2, 1)))
    assert tiny.sites == () and tiny.candidates == ()


def test_a_layer_that_the_graph_does_not_show_may_be_named() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.used(x)
            return y

    found = profile(capture(Half(), torch.zeros(2, 64)), methods=["svd"], exclude=["unused"])
    assert names(found.sites) == ["used"]
    assert [entry.layer for entry in found.skipped] == ["unused"]


def test_a_rule_gives_every_site_one_rank_off_the_grid() -> None:
    found = small(methods="svd", overrides={"0": {"methods": "tucker2"}}, ranks="ratio = 30%")
    assert [(c.site, c.method, c.rank) for c in found.candidates] == [("0", "tucker2", (12, 7)), ("2", "svd", (11,))]
    assert (found.rank_rule, found.rank_multiple) == ("ratio=0.3", 1)
    on_grid = small(methods="svd", overrides={"0": {"methods": "tucker2"}}, ranks="ratio=0.3", rank_multiple=8)
    assert [c.rank for c in on_grid.candidates] == [(16, 8), (8,)]
    assert on_grid.rank_multiple == 8
    assert small().rank_rule is None


def test_a_pinned_rank_is_the_only_choice() -> None:
    found = small(overrides={"0": {"rank": 7}, "2": {"rank": [36], "methods": ["svd"]}}, rank_multiple=16)
    assert [(c.site, c.method, c.rank, c.caveat) for c in found.candidates] == [
        ("0", "spatial_svd", (7,), ""),
        ("2", "svd", (36,), ""),
    ]
    pair = small(overrides={"0": {"rank": [7, 5]}}).of_site("0")
    assert [(candidate.method, candidate.rank) for candidate in pair] == [("tucker2", (7, 5))]


def test_methods_by_layer() -> None:
    found = small(overrides={"0": {"methods": ["tucker2"]}})
    assert {(c.site, c.method) for c in found.candidates} == {
        ("0", "dense"),
        ("0", "tucker2"),
        ("2", "dense"),
        ("2", "svd"),
    }


def test_steps_are_reported() -> None:
    steps: list[tuple[str, int, int]] = []
    small(progress=lambda description, done, total: steps.append((description, done, total)))
    assert [(done, total) for _, done, total in steps] == [(0, 2), (1, 2), (2, 2)]
    assert {description for description, _, _ in steps} == {"decomposing", "decomposed 0", "decomposed 2"}


def test_errors_are_kept_between_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = small(cache_dir=tmp_path)

    def never(*args: object, **kwargs: object) -> list[float]:
        raise AssertionError("decomposed again")

    for name in METHODS:
        monkeypatch.setattr(type(registry()[name]), "errors", never)
    assert small(cache_dir=tmp_path) == first
    assert small(cache_dir=str(tmp_path), metric="weight:absolute").of_site("2")[1].error > first.of_site("2")[1].error
    for options in ({"cache_dir": tmp_path, "seed": 1}, {}):
        with pytest.raises(PassError, match="decomposed again"):
            small(**options)


def test_the_same_twice() -> None:
    assert small() == small() == small(methods=None, exclude=None, overrides={"*": {"methods": METHODS}})
