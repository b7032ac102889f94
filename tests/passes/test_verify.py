"""Verification: right chains pass, every kind of wrong one is named with its numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import build
from torch import Tensor, fx, nn

from tdfx.decompositions import registry
from tdfx.decompositions.base import Factors
from tdfx.decompositions.svd import SVD
from tdfx.errors import PassError, VerificationError
from tdfx.passes.base import describe
from tdfx.passes.factorize import Factorize, Replacement
from tdfx.passes.shape_prop import ShapeProp
from tdfx.passes.sites import FindSites
from tdfx.passes.verify import VerifyChains, VerifyFullRank, relative_difference, with_reconstructed_weights
from tdfx.records.layer import Rank, Site
from tdfx.stages.capture import capture

METHODS = tuple(registry())
X = torch.randn(2, 6, 9, 9, generator=torch.Generator().manual_seed(0))


def convolution(**options: Any) -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.Conv2d(6, 8, 3, **options))


def sites_of(module: fx.GraphModule, args: tuple[Tensor, ...]) -> tuple[Site, ...]:
    return FindSites(ShapeProp(args).run(module)).run(module)[0]


def replacement(module: fx.GraphModule, site: Site, name: str, rank: Rank | None = None) -> Replacement:
    method, layer = registry()[name], module.get_submodule(site.name)
    bias: Any = layer.bias
    rank = rank or tuple(max(1, full // 2) for full in method.full_rank(site))
    factors = method.decompose(layer.get_parameter("weight").detach().double(), rank)
    return Replacement(name, method.build(site, rank, factors, bias), factors)


def case(
    name: str = "tucker2", model: nn.Module | None = None, x: Tensor = X
) -> tuple[fx.GraphModule, dict[str, Replacement]]:
    """A captured network of one site and its chain."""
    module = capture(convolution(padding=1) if model is None else model, x).module
    (site,) = sites_of(module, (x,))
    return module, {site.name: replacement(module, site, name)}


def refused(module: fx.GraphModule, chains: dict[str, Replacement], x: Tensor = X) -> VerificationError:
    with pytest.raises(VerificationError) as caught:
        VerifyChains((x,), chains).run(module)
    error = caught.value
    numbers = re.escape(f"{error.max_abs_diff:.3g} ({error.max_rel_diff:.3g} of its largest output, allowed 1e-09)")
    assert re.match(rf"layer 1: its chain differs from the layer by {numbers}", str(error))
    return error


OPTIONS: list[dict[str, Any]] = [
    {},
    {"stride": (2, 1), "padding": (1, 2)},
    {"dilation": 2, "padding": "same", "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "reflect", "bias": False},
    {"padding": (0, 2), "padding_mode": "replicate", "dtype": torch.bfloat16},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"svd"}))
def test_right_chains_of_convolutions_pass(name: str, options: dict[str, Any]) -> None:
    x = X.to(options.get("dtype", torch.float32))
    module, chains = case(name, convolution(**options), x)
    before = describe(module)
    for entry in (chains["1"], Replacement(name, chains["1"].chain)):
        (found,) = VerifyChains((x,), {"1": entry}).run(module).items()
        assert found[0] == "1"
        assert 0 <= found[1] <= 1e-12
    assert describe(module) == before


@pytest.mark.parametrize("layer", [nn.Linear(6, 8), nn.Linear(6, 8, bias=False), nn.Linear(6, 8, dtype=torch.float16)])
def test_right_chains_of_linear_layers_pass(layer: nn.Linear) -> None:
    x = torch.randn(3, 6, dtype=layer.weight.dtype)
    module, chains = case("svd", nn.Sequential(nn.Identity(), layer), x)
    assert VerifyChains((x,), chains).run(module)["1"] <= 1e-12


def test_all_chains_of_a_network_pass_and_shared_layers_are_compared() -> None:
    model, args = build("siamese")
    module = capture(model, args).module
    chains = {
        site.name: replacement(module, site, "svd" if site.kind == "linear" else "tucker2")
        for site in sites_of(module, args)
    }
    found = VerifyChains(args, chains).run(module)
    assert found.keys() == chains.keys()
    assert max(found.values()) <= 1e-12


Mistake = Callable[[Any], None]


def scale(chain: Any) -> None:
    chain[0].weight.data *= 1.01


def scale_last(chain: Any) -> None:
    chain[-1].weight.data *= 1.01


def drop_bias(chain: Any) -> None:
    chain[-1].bias = None


def swap_stride(chain: Any) -> None:
    chain[1].stride = (1, 2)


def drop_padding_mode(chain: Any) -> None:
    chain[1].padding_mode = "zeros"


def drop_dilation(chain: Any) -> None:
    chain[1].dilation = (1, 1)
    chain[1].padding = (1, 1)
    chain[1]._reversed_padding_repeated_twice = [1, 1, 1, 1]


def bias_too_early(chain: Any) -> None:
    chain[0].bias = nn.Parameter(torch.ones(chain[0].out_channels))


def not_finite(chain: Any) -> None:
    chain[1].weight.data[0, 0] = math.nan


MISTAKES: dict[Mistake, dict[str, Any]] = {
    scale: {},
    scale_last: {},
    drop_bias: {},
    swap_stride: {"stride": (2, 1)},
    drop_padding_mode: {"padding": 1, "padding_mode": "reflect"},
    drop_dilation: {"padding": 2, "dilation": 2},
    bias_too_early: {},
    not_finite: {},
}


@pytest.mark.parametrize("blank", [False, True])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_chains_are_named_whatever_the_example_inputs(mistake: Mistake, blank: bool) -> None:
    x = torch.zeros_like(X) if blank else X
    module, chains = case("tucker2", convolution(**MISTAKES[mistake]), x)
    mistake(chains["1"].chain)
    error = refused(module, chains, x)
    assert error.max_abs_diff > 1e-4
    assert error.max_rel_diff > 1e-4


def test_a_scaled_factor_is_off_by_its_scale() -> None:
    module, chains = case(model=convolution(bias=False))
    scale(chains["1"].chain)
    assert refused(module, chains).max_rel_diff == pytest.approx(0.01, rel=1e-5)


def test_the_factors_of_another_layer_are_wrong() -> None:
    module, chains = case()
    _, others = case(model=convolution(padding=1))
    refused(module, {"1": Replacement("tucker2", others["1"].chain, chains["1"].factors)})


@pytest.mark.parametrize("lengths", [(5, 1), (1, 5)])
def test_a_mistake_that_shows_in_one_call_alone_is_found(lengths: tuple[int, int]) -> None:
    """Of an input of one position, padded, a kernel sees the same whatever its dilation."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv1d(4, 4, 3, padding=1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            total: Tensor = self.layer(x).sum() + self.layer(y).sum()
            return total

    x, y = (torch.randn(2, 4, length) for length in lengths)
    module = capture(Twice(), (x, y)).module
    (site,) = sites_of(module, (x, y))
    entry = replacement(module, site, "tucker2")
    core: Any = entry.chain[1]
    core.padding = core.dilation = (2,)
    with pytest.raises(VerificationError, match="layer layer: its chain"):
        VerifyChains((x, y), {"layer": entry}).run(module)


def test_a_chain_with_a_bias_of_its_own_is_compared_with_it() -> None:
    module, chains = case(model=convolution(bias=False))
    last: Any = chains["1"].chain[-1]
    last.bias = nn.Parameter(torch.ones(8))
    assert VerifyChains((X,), chains).run(module)["1"] <= 1e-12
    reconstructed: Any = with_reconstructed_weights(module, chains).get_submodule("1")
    torch.testing.assert_close(reconstructed.bias, last.bias, rtol=0, atol=0)


def test_a_chain_that_does_not_run_is_an_error_of_the_pass() -> None:
    module, chains = case()
    del chains["1"].chain[1]
    with pytest.raises(PassError, match="pass VerifyChains failed"):
        VerifyChains((X,), chains).run(module)


def test_example_inputs_and_random_state_are_left_alone() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(9, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(torch.nn.functional.dropout(x.mul_(2)))
            return y

    x = X.clone()
    module, chains = case("svd", Writing(), x)
    kept = torch.random.get_rng_state()
    VerifyChains((x,), chains).run(module)
    torch.testing.assert_close(x, X, rtol=0, atol=0)
    torch.testing.assert_close(torch.random.get_rng_state(), kept, rtol=0, atol=0)


def test_the_graph_with_reconstructed_weights_computes_what_the_chains_do() -> None:
    model, args = build("resnet")
    module = capture(model, args).module
    before, expected = describe(module), module(*args)
    chains = {
        site.name: replacement(module, site, "svd" if site.kind == "linear" else "tucker2", None)
        for site in sites_of(module, args)
        if site.name in ("stem.0", "layer2.conv1", "fc")
    }
    dense, compressed = with_reconstructed_weights(module, chains), Factorize(chains).run(module)
    torch.testing.assert_close(dense(*args), compressed(*args), rtol=1e-4, atol=1e-4)
    assert (dense(*args) - expected).abs().max() > 1e-2
    assert [node.target for node in dense.graph.nodes] == [node.target for node in module.graph.nodes]
    assert describe(module) == before
    torch.testing.assert_close(module(*args), expected, rtol=0, atol=0)


def test_reconstructed_weights_are_in_the_dtype_of_the_layer() -> None:
    module, chains = case(model=convolution().bfloat16(), x=X.bfloat16())
    layer = with_reconstructed_weights(module, chains).get_submodule("1")
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}


# Full rank


@pytest.mark.parametrize("name", ["audio", "siamese", "mobilenet"])
def test_every_method_is_the_identity_at_full_rank(name: str) -> None:
    model, args = build(name)
    module = capture(model, args).module
    sites = sites_of(module, args)
    before = describe(module)
    found = VerifyFullRank(args, sites, tuple(registry().values())).run(module)
    assert found.keys() == {
        f"{site.name}.{name}" for site in sites for name, m in registry().items() if m.unsupported(site) is None
    }
    assert max(found.values()) <= 1e-8
    assert describe(module) == before


class Truncating(SVD):
    """One rank short of the identity."""

    name = "truncating"

    def full_rank(self, site: Site) -> Rank:
        (full,) = super().full_rank(site)
        return (full - 1,)


class Transposing(SVD):
    """Right by its shapes alone."""

    name = "transposing"

    def decompose(self, weight: Tensor, rank: Rank, *, seed: int = 0) -> Factors:
        return super().decompose(weight.T, rank, seed=seed)


@pytest.mark.parametrize("method", [Truncating(), Transposing()])
def test_a_method_that_is_not_the_identity_at_full_rank_is_named(method: SVD) -> None:
    x = torch.randn(3, 6)
    module = capture(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), x).module
    with pytest.raises(
        VerificationError, match=rf"layer 0: {method.name} at full rank differs .*allowed 1e-08"
    ) as caught:
        VerifyFullRank((x,), sites_of(module, (x,)), (SVD(), method)).run(module)
    assert caught.value.max_abs_diff > 1e-4
    assert caught.value.max_rel_diff > 1e-4


def test_only_methods_that_apply_are_checked() -> None:
    module, _ = case()
    found = VerifyFullRank((X,), sites_of(module, (X,)), tuple(registry().values()), seed=3).run(module)
    assert found.keys() == {f"1.{name}" for name in registry() if name != "svd"}


# Differences

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("reference", "other", "expected"),
    [
        ([1.0, -4.0], [1.0, -4.0], (0.0, 0.0)),
        ([1.0, -4.0], [1.5, -4.0], (0.5, 0.125)),
        ([1.0, -4.0], [1.0, -2.0], (2.0, 0.5)),
        ([0.0, 0.0], [0.0, 0.0], (0.0, 0.0)),
        ([0.0, 0.0], [0.0, 1.0], (1.0, INF)),
        ([], [], (0.0, 0.0)),
        ([1.0], [1.0, 1.0], (INF, INF)),
        ([-INF, 2.0], [-INF, 1.0], (1.0, 0.5)),
        ([-INF, 2.0], [INF, 2.0], (INF, INF)),
        ([-INF, 2.0], [-1.0, 2.0], (INF, INF)),
        ([1.0, 2.0], [1.0, INF], (INF, INF)),
        ([1.0, NAN], [1.0, 2.0], (INF, INF)),
        ([1.0, 2.0], [1.0, NAN], (INF, INF)),
        ([1.0, NAN], [1.0, NAN], (INF, INF)),
    ],
)
def test_relative_difference(reference: list[float], other: list[float], expected: tuple[float, float]) -> None:
    assert relative_difference(torch.tensor(reference), torch.tensor(other)) == expected


def test_relative_difference_of_other_dtypes() -> None:
    assert relative_difference(torch.tensor([True, True]), torch.tensor([True, False])) == (1.0, 1.0)
    assert relative_difference(torch.tensor([3, 2**53 + 1]), torch.tensor([3, 2**53 + 1])) == (0.0, 0.0)
    big = torch.tensor([60000.0], dtype=torch.float16)
    assert relative_difference(big, -big) == (120000.0, 2.0)
    assert relative_difference(big, big.float()) == (INF, INF)
