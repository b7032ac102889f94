"""CP: the exact construction, the alternating least squares, and the bounds on both."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tdfx.decompositions import als, cp
from tdfx.decompositions.als import Factors
from tdfx.decompositions.cp import CP
from tdfx.records.layer import LayerSpec, Site

METHOD = CP()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained_like(out_channels: int, in_channels: int, *kernel: int) -> Tensor:
    """A kernel with falling energy over its channel directions and smooth over space."""
    kernels = torch.einsum(
        "or,is,rsp->oip",
        torch.linalg.qr(randn(out_channels, out_channels, seed=1)).Q * torch.arange(1, out_channels + 1) ** -0.7,
        torch.linalg.qr(randn(in_channels, in_channels, seed=2)).Q * torch.arange(1, in_channels + 1) ** -0.7,
        randn(out_channels, in_channels, math.prod(kernel)).cumsum(2),
    )
    return kernels.reshape(out_channels, in_channels, *kernel)


def norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def error(weight: Tensor, rank: int, seed: int = 0) -> float:
    """Relative to the norm of the weight."""
    return norm(weight - METHOD.reconstruct(METHOD.decompose(weight, (rank,), seed=seed))) / norm(weight)


def component_norms(factors: tuple[Tensor, ...]) -> Tensor:
    """Norms (3, rank) of the columns of the three factors."""
    reduce, depthwise, expand = factors
    return torch.stack(
        [
            torch.linalg.vector_norm(reduce.flatten(1), dim=1),
            torch.linalg.vector_norm(depthwise.flatten(1), dim=1),
            torch.linalg.vector_norm(expand.flatten(1), dim=0),
        ]
    )


def plain_als(tensor: Tensor, rank: int, sweeps: int) -> float:
    """Relative error of alternating least squares as in textbooks, from singular vectors and random columns."""
    factors = []
    for mode, size in enumerate(tensor.shape):
        basis = torch.linalg.svd(tensor.movedim(mode, 0).flatten(1), full_matrices=False).U[:, :rank]
        factors.append(torch.cat([basis, randn(size, rank - basis.shape[1], seed=mode)], 1))
    for _ in range(sweeps):
        for mode in range(3):
            first, second = (factors[other] for other in range(3) if other != mode)
            khatri_rao = torch.einsum("ir,jr->ijr", first, second).flatten(0, 1)
            factors[mode] = torch.linalg.lstsq(khatri_rao, tensor.movedim(mode, 0).flatten(1).T).solution.T
    return norm(tensor - torch.einsum("or,ir,pr->oip", *factors)) / norm(tensor)


@pytest.mark.parametrize("rank", [6, 12, 24])
def test_extrapolated_sweeps_come_closer_than_twenty_plain_ones(rank: int) -> None:
    weight = trained_like(16, 20, 3, 3)
    assert error(weight, rank) < plain_als(weight.flatten(2), rank, 20)


def test_extrapolation_comes_closer_than_as_many_sweeps_without(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = trained_like(16, 20, 3, 3)
    with_it = error(weight, 24)
    monkeypatch.setattr(als, "STEP", 0.0)
    assert with_it < 0.995 * error(weight, 24)


def test_extrapolation_that_overshoots_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = trained_like(16, 20, 3, 3)
    usual = error(weight, 12)
    monkeypatch.setattr(als, "STEP", 8.0)
    monkeypatch.setattr(als, "STEP_MOST", 8.0)
    assert error(weight, 12) < 1.05 * usual


@pytest.mark.parametrize("shape", [(12, 3, 5), (3, 12, 5), (3, 5, 12), (5, 5, 5), (4, 1, 9), (7, 6, 3)])
def test_exact_construction_reproduces_whichever_mode_is_largest(shape: tuple[int, int, int]) -> None:
    tensor = randn(*shape)
    a, b, c = als.exact(tensor)
    least, middle, _ = sorted(shape)
    assert [factor.shape for factor in (a, b, c)] == [(size, least * middle) for size in shape]
    torch.testing.assert_close(torch.einsum("or,ir,pr->oip", a, b, c), tensor, rtol=0, atol=0)
    site = Site.of(LayerSpec("conv", "conv1d", shape[1], shape[0], (shape[2],), (1,), (0,), dilation=(1,)))
    assert METHOD.full_rank(site) == (least * middle,)
    assert error(tensor, least * middle) <= 1e-14


@pytest.mark.parametrize("rank", [1, 5, 24])
def test_zero_gives_zeros(rank: int) -> None:
    for factor in METHOD.decompose(torch.zeros(6, 4, 3, 3, dtype=torch.float64), (rank,)):
        assert not factor.any()


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_rank_one_tensor_is_met(rank: int, scale: float) -> None:
    weight = scale * torch.einsum("o,i,h,w->oihw", randn(8), randn(6, seed=1), randn(3, seed=2), randn(3, seed=3))
    assert error(weight, rank) <= 1e-6


@pytest.mark.parametrize("rank", [4, 40])
def test_components_are_balanced_over_the_factors(rank: int) -> None:
    norms = component_norms(METHOD.decompose(1e5 * trained_like(8, 12, 3, 3), (rank,)))
    torch.testing.assert_close(norms, norms[:1].expand_as(norms), rtol=1e-10, atol=0)


def test_a_component_without_weight_is_zero_in_every_factor() -> None:
    weight = randn(5, 4, 3, 3)
    weight[:, 1] = 0
    norms = component_norms(METHOD.decompose(weight, METHOD.full_rank(site_of(5, 4))))
    assert (norms == 0).any()
    assert torch.equal(norms[0] == 0, norms[1] == 0)
    assert torch.equal(norms[0] == 0, norms[2] == 0)


@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cancelling_components_are_bounded(rank: int, seed: int) -> None:
    """A tensor of rank 3 and border rank 2: no approximation of rank 2 is best, components grow as the error falls."""
    (a, b), (c, d), (e, f) = (randn(2, n, seed=seed + n) for n in (8, 6, 9))
    terms = [torch.einsum("o,i,p->oip", *vectors) for vectors in ((a, c, f), (a, d, e), (b, c, e))]
    weight = torch.stack(terms).sum(0).reshape(8, 6, 3, 3)
    sizes = component_norms(METHOD.decompose(weight, (rank,))).prod(0)
    assert norm(weight) < float(sizes.sum()) < 50 * norm(weight)
    assert error(weight, rank) < 0.02


def site_of(out_channels: int, in_channels: int) -> Site:
    layer = LayerSpec("conv", "conv2d", in_channels, out_channels, (3, 3), (1, 1), (0, 0), dilation=(1, 1))
    return Site.of(layer.called_on(((1, in_channels, 8, 8),)))


@pytest.mark.parametrize(("limit", "value"), [("MEMORY", 4 * 9 * 24 * 20), ("SWEEP_FLOPS", 4 * 24 * 16 * 9 * 20)])
def test_ranks_beyond_memory_or_time_are_not_offered(monkeypatch: pytest.MonkeyPatch, limit: str, value: int) -> None:
    site = site_of(24, 16)
    assert max(METHOD.ranks(site)) > (20,)
    monkeypatch.setattr(cp, limit, value)
    assert max(METHOD.ranks(site)) == (20,)


def test_ranks_grow_by_equal_factors_up_to_the_last_that_saves() -> None:
    site = site_of(160, 160)
    ranks = [rank for (rank,) in METHOD.ranks(site, 16)]
    assert ranks[0] == 16
    assert METHOD.saves(site, (ranks[-1],))
    assert not METHOD.saves(site, (ranks[-1] + 16,))
    assert len(ranks) <= METHOD.max_ranks
    assert all(1.1 < following / rank <= 1.6 for rank, following in pairwise(ranks[1:]))
    few = METHOD.ranks(site_of(32, 32), 16)
    assert [rank for (rank,) in few] == [16 * index for index in range(1, len(few) + 1)]


def test_larger_tensors_take_fewer_sweeps() -> None:
    assert als.sweeps((64, 64, 9), 64) == als.SWEEPS
    assert als.LEAST_SWEEPS < als.sweeps((256, 256, 9), 256) < als.SWEEPS
    assert als.sweeps((512, 512, 9), 1000) == als.LEAST_SWEEPS


def test_seeds_fill_up_modes_shorter_than_the_rank() -> None:
    weight = trained_like(12, 8, 3, 3)
    one, other = (METHOD.decompose(weight, (20,), seed=seed)[1] for seed in (0, 1))
    assert not torch.equal(one, other)
    assert error(weight, 20, seed=1) == pytest.approx(error(weight, 20, seed=0), rel=0.2)


def test_sweeps_end_where_a_plain_one_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tensor that the rank meets, where rounding in float32 stops the error from falling."""
    starts: list[Factors] = []
    sweep = als._sweep

    def watched(slices: Tensor, factors: Factors) -> tuple[Factors, float]:
        starts.append(factors)
        return sweep(slices, factors)

    monkeypatch.setattr(als, "_sweep", watched)
    weight = METHOD.reconstruct((randn(4, 20, 1, 1), randn(4, 1, 3, 3, seed=1), randn(16, 4, 1, 1, seed=2)))
    assert error(weight, 8) < 1e-3
    assert 5 < len(starts) < als.SWEEPS
    assert all(one is not other for one, other in pairwise(starts))


def test_the_error_of_a_sweep_is_that_of_its_factors() -> None:
    tensor = randn(7, 5, 9)
    tensor = tensor / torch.linalg.vector_norm(tensor)
    factors, squared = als._sweep(tensor.permute(2, 0, 1).float(), (randn(7, 4), randn(5, 4), randn(9, 4)))
    actual = norm(tensor - torch.einsum("or,ir,pr->oip", *factors)) ** 2
    assert squared == pytest.approx(actual, abs=1e-6)
