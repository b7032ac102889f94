from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import Decimal

import numpy as np
import pytest
import torch
from torch import Tensor

from tdfx.decompositions import method_for, registry
from tdfx.decompositions.base import Decomposition
from tdfx.decompositions.svd import SVD
from tdfx.errors import OptionError
from tdfx.rank_rules import RankRule, to_multiple
from tdfx.records.layer import LayerSpec, Rank, Site

RULES = ("vbmf", "energy=0.9", "ratio=0.33", "compression=60%")


def conv(inputs: int, outputs: int, kernel: tuple[int, int] = (3, 3), groups: int = 1) -> Site:
    layer = LayerSpec("conv", "conv2d", inputs, outputs, kernel, (1, 1), (1, 1), dilation=(1, 1), groups=groups)
    return Site.of(layer.called_on(((1, inputs, 8, 8),)))


def linear(inputs: int, outputs: int) -> Site:
    return Site.of(LayerSpec("fc", "linear", inputs, outputs, bias=True).called_on(((1, inputs),)))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(site: Site, rank: int = 3, noise: float = 0.2) -> Tensor:
    """``rank`` separable terms and noise."""
    shape = site.layer.weight_shape
    letters = "abcd"[: len(shape)]
    terms = torch.einsum(
        ",".join(f"{letter}r" for letter in letters) + f"->{letters}",
        *(randn(n, rank, seed=n + i) for i, n in enumerate(shape)),
    )
    return terms + noise * randn(*shape, seed=9)


def error_of(method: Decomposition, weight: Tensor) -> Callable[[Rank], float]:
    return lambda rank: method.errors(weight, [rank])[0]


def rank_of(text: str, name: str, site: Site, weight: Tensor | None = None) -> Rank:
    method = method_for(site, name)
    weight = torch.zeros(site.layer.weight_shape) if weight is None else weight
    return RankRule.parse(text).rank(method, site, weight, error_of(method, weight))


def sites() -> list[tuple[Decomposition, Site]]:
    shapes = [conv(24, 16), conv(3, 16), conv(12, 20, (3, 5)), conv(20, 14, (1, 1)), linear(30, 20)]
    shapes += [conv(24, 16, groups=2), conv(6, 6, (5, 5), groups=6)]
    pairs = [(method_for(site, name), site) for name in registry() for site in shapes]
    return [(method, site) for method, site in pairs if method.unsupported(site) is None]


@pytest.mark.parametrize(
    ("channels", "cp", "tucker"),
    [
        (64, (28, 69, 138, 206, 248), (14, 26, 39, 49, 54)),
        (512, (229, 573, 1145, 1718, 2062), (115, 205, 310, 390, 432)),
    ],
)
def test_compression_is_the_published_table(channels: int, cp: Sequence[int], tucker: Sequence[int]) -> None:
    site, rates = conv(channels, channels), (90, 75, 50, 25, 10)
    assert [rank_of(f"compression={rate}%", "cp4", site) for rate in rates] == [(r,) for r in cp]
    assert [rank_of(f"compression={rate}%", "tucker2", site) for rate in rates] == [(r, r) for r in tucker]


@pytest.mark.parametrize("rate", [10, 25, 50, 75, 90])
@pytest.mark.parametrize("name", list(registry()))
def test_compression_is_the_nearest_on_the_ray(name: str, rate: int) -> None:
    method, site = registry()[name], linear(96, 48) if name == "svd" else conv(48, 96)
    wanted = (1 - rate / 100) * math.prod(site.layer.weight_shape)
    rank, full = rank_of(f"compression={rate}%", name, site), method.full_rank(site)

    def distance(rank: Rank) -> float:
        return abs(sum(math.prod(layer.weight_shape) for layer in method.chain(site, rank)) - wanted)

    assert (
        max(abs(r / most - rank[0] / full[0]) * most for r, most in zip(rank, full, strict=True)) <= max(full) / full[0]
    )
    for step in (-1, 1):
        moved = method.clamp(
            site, tuple(round(r + step * most / min(full)) for r, most in zip(rank, full, strict=True))
        )
        assert distance(rank) <= distance(moved)


def test_compression_does_not_count_the_bias() -> None:
    site = linear(40, 40)
    assert rank_of("compression=50%", "svd", site) == (10,)


@pytest.mark.parametrize(
    ("name", "site", "rank"),
    [
        ("svd", linear(30, 20), (7,)),
        ("channel_svd", conv(24, 16), (5,)),
        ("spatial_svd", conv(24, 16), (16,)),
        ("tucker2", conv(24, 16), (5, 8)),
        ("tucker2", conv(3, 16), (5, 1)),
        ("tt", conv(24, 16), (8, 16, 5)),
        ("cp", conv(24, 16), (8,)),
        ("cp4", conv(3, 64), (21,)),
    ],
)
def test_ratio_is_of_each_modes_size(name: str, site: Site, rank: Rank) -> None:
    assert rank_of("ratio=0.33", name, site) == rank


def least_energy_rank(matrix: Tensor, share: float) -> int:
    energy = np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2
    return next(r for r in range(1, len(energy) + 1) if energy[:r].sum() >= share * energy.sum())


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_energy_is_the_least_rank_of_each_unfolding(share: float) -> None:
    site = conv(12, 10)
    weight = low_rank(site, noise=1.0)
    by_out, by_in = weight.flatten(1), weight.transpose(0, 1).flatten(1)
    assert rank_of(f"energy={share}", "tucker2", site, weight) == (
        least_energy_rank(by_out, share),
        least_energy_rank(by_in, share),
    )
    assert rank_of(f"energy={share}", "channel_svd", site, weight) == (least_energy_rank(by_out, share),)


@pytest.mark.parametrize("name", ["cp", "cp4"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_energy_of_cp_is_the_least_rank_whose_error_leaves_it(name: str, share: float) -> None:
    site = conv(12, 10)
    weight, method = low_rank(site, noise=0.6), registry()[name]
    (rank,) = rank_of(f"energy={share}", name, site, weight)
    errors = method.errors(weight, [(r,) for r in range(1, rank + 1)])
    kept = [1 - (error / float(weight.norm())) ** 2 for error in errors]
    assert kept[-1] >= share
    assert rank == 1 or kept[-2] < share


def test_energy_is_sought_on_errors_from_the_unfoldings_rank_on() -> None:
    site, method, asked = conv(12, 10), registry()["cp"], list[Rank]()
    weight = randn(*site.layer.weight_shape)

    def error(rank: Rank) -> float:
        asked.append(rank)
        return error_of(method, weight)(rank)

    bound = max(least_energy_rank(m, 0.9) for m in method.unfoldings(weight))
    (rank,) = RankRule.parse("energy=0.9").rank(method, site, weight, error)
    assert asked[0] == (bound,)
    assert bound < rank
    assert min(asked) == (bound,)
    assert len(asked) <= 2 * math.log2(rank)


def test_energy_that_no_cheaper_rank_keeps_is_answered_without_costly_errors() -> None:
    site, method, asked = conv(12, 10), registry()["cp"], list[Rank]()

    def error(rank: Rank) -> float:
        asked.append(rank)
        return math.inf

    rank = RankRule.parse("energy=0.99").rank(method, site, randn(10, 12, 3, 3), error)
    assert not method.saves(site, rank)
    assert all(method.saves(site, rank) for rank in asked)
    asked.clear()
    assert RankRule.parse("energy=0.99").rank(method, conv(1, 1), randn(1, 1, 3, 3), error) == (1,)
    assert asked == []


class OwnUnfolding(SVD):
    """A method that says nothing of its unfoldings, of which that by rows out and that by rows in are too high."""

    name = "own"
    unfoldings = Decomposition.unfoldings

    def errors(self, weight: Tensor, ranks: Sequence[Rank], *, seed: int = 0) -> list[float]:
        return super().errors(weight, [(min(2 * r, 20),) for (r,) in ranks])


def test_energy_of_a_method_without_an_unfolding_is_found_below_that_of_others() -> None:
    site, weight = linear(30, 20), randn(20, 30)
    half = -(-least_energy_rank(weight, 0.7) // 2)
    method = OwnUnfolding()
    assert RankRule.parse("energy=0.7").rank(method, site, weight, error_of(method, weight)) == (half,)


@pytest.mark.parametrize(
    ("name", "rank"), [("channel_svd", (3,)), ("tucker2", (3, 3)), ("tt", (3, 3, 3)), ("cp", (3,)), ("cp4", (3,))]
)
def test_vbmf_finds_the_terms_behind_the_noise(name: str, rank: Rank) -> None:
    site = conv(24, 20)
    assert rank_of("vbmf", name, site, low_rank(site)) == rank


def test_vbmf_of_noise_is_0_and_one_unfolding_of_noise_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    site = conv(24, 20)
    weight = randn(20, 24, 3, 3)
    assert rank_of("vbmf", "tucker2", site, weight) == (0, 0)
    assert rank_of("vbmf", "cp", site, weight) == (0,)
    monkeypatch.setattr("tdfx.rank_rules.vbmf_rank", lambda matrix: 0 if len(matrix) == 24 else 5)
    assert rank_of("vbmf", "tucker2", site, weight) == (5, 0)
    assert rank_of("vbmf", "cp", site, weight) == (0,)


@pytest.mark.parametrize("text", RULES)
@pytest.mark.parametrize(("method", "site"), sites(), ids=lambda value: getattr(value, "name", "?"))
def test_every_method_gets_a_valid_rank(method: Decomposition, site: Site, text: str) -> None:
    for weight in (low_rank(site), torch.zeros(site.layer.weight_shape).double(), randn(*site.layer.weight_shape)):
        rank = rank_of(text, method.name, site, weight)
        assert method.is_rank(site, rank) or (text == "vbmf" and 0 in rank)
        for multiple in (1, 4, 16):
            assert method.is_rank(site, method.clamp(site, to_multiple(rank, multiple)))


@pytest.mark.parametrize("name", ["channel_svd", "tucker2", "tt"])
def test_groups_share_the_largest_rank_that_one_of_them_takes(name: str) -> None:
    site, part = conv(24, 16, groups=2), conv(12, 8)
    weight = torch.cat([low_rank(part, 1, 0.05), low_rank(part, 4, 0.05)])
    found = rank_of("energy=0.9", name, site, weight)
    of_groups = [rank_of("energy=0.9", name, part, weights) for weights in weight.chunk(2)]
    assert of_groups[0] != of_groups[1]
    assert found == tuple(map(max, zip(*of_groups, strict=True)))


def test_multiples_are_the_nearest_and_at_least_one() -> None:
    assert to_multiple((1, 7, 8, 23, 24, 25, 40), 16) == (16, 16, 16, 16, 32, 32, 48)
    assert to_multiple((1, 7, 30), 1) == (1, 7, 30)


@pytest.mark.parametrize(
    ("text", "rule", "written"),
    [
        ("vbmf", RankRule("vbmf"), "vbmf"),
        (" VBMF ", RankRule("vbmf"), "vbmf"),
        ("energy=0.95", RankRule("energy", Decimal("0.95")), "energy=0.95"),
        ("energy = 90%", RankRule("energy", Decimal("0.9")), "energy=0.9"),
        ("ratio=0.33", RankRule("ratio", Decimal("0.33")), "ratio=0.33"),
        ("compression=75%", RankRule("compression", Decimal("0.75")), "compression=75%"),
        ("compression=0.9", RankRule("compression", Decimal("0.9")), "compression=90%"),
        ("compression=12.5 %", RankRule("compression", Decimal("0.125")), "compression=12.5%"),
    ],
)
def test_rules_are_read_and_written(text: str, rule: RankRule, written: str) -> None:
    assert RankRule.parse(text) == rule
    assert str(rule) == written
    assert RankRule.parse(written) == rule


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("vmbf", "unknown rule 'vmbf'; did you mean 'vbmf'"),
        ("rank", "unknown rule 'rank'"),
        ("", "unknown rule ''"),
        ("vbmf=3", "vbmf takes no amount"),
        ("energy", "expected a share such as energy=0.95"),
        ("energy=", "expected a share"),
        ("energy=high", "expected a share"),
        ("energy=nan", "greater than 0 and less than 1"),
        ("energy=1", "greater than 0 and less than 1"),
        ("ratio=0", "greater than 0 and less than 1"),
        ("ratio=-0.5", "greater than 0 and less than 1"),
        ("compression=75", "greater than 0 and less than 1, or 100%"),
        ("compression=100%", "greater than 0 and less than 1"),
        (0.5, "expected text"),
        (None, "expected text"),
    ],
)
def test_what_is_not_understood_is_named(text: str, problem: str) -> None:
    with pytest.raises(
        OptionError, match=f"ranks is .*{problem}.*'vbmf', 'energy=0.95', 'ratio=0.33', 'compression=75%'"
    ):
        RankRule.parse(text)
