"""Decompositions against independent implementations (tensorly, NumPy) and against what optimality implies."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import tensorly as tl
import torch
from tensorly.decomposition import parafac, partial_tucker
from torch import Tensor

from tdfx.decompositions import registry, spectrum
from tdfx.decompositions.base import Decomposition, balance, spaced
from tdfx.decompositions.spectrum import leading_basis, tail_norms, thin_svd
from tdfx.records.layer import LayerSpec, Site

SVD, SPATIAL_SVD, TUCKER2, CP = (registry()[name] for name in ("svd", "spatial_svd", "tucker2", "cp"))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained_like(*shape: int, seed: int = 0) -> Tensor:
    """A kernel whose unfoldings have smoothly falling singular values, as those of trained layers have."""
    tensor = randn(*shape, seed=seed)
    for mode, size in enumerate(shape):
        basis, _ = torch.linalg.qr(randn(size, size, seed=seed + mode + 1))
        falling = basis * torch.arange(1, size + 1).double() ** -0.7
        tensor = torch.tensordot(tensor, falling, dims=([0], [1]))  # the modes return to their order after all four
    return tensor


def norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def error(method: Decomposition, weight: Tensor, *rank: int) -> float:
    return norm(weight - method.reconstruct(method.decompose(weight, rank)))


def numpy_tails(matrix: np.ndarray) -> np.ndarray:
    values = np.linalg.svd(matrix, compute_uv=False)
    return np.array([np.linalg.norm(values[rank:]) for rank in range(1, len(values) + 1)])


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (16, 16, 1, 1)])
def test_svd_leaves_the_tail_of_numpys_spectrum(shape: tuple[int, ...]) -> None:
    weight = trained_like(*shape)
    tails = numpy_tails(weight.numpy().reshape(shape[:2]))
    ranks = [(r,) for r in range(1, len(tails) + 1)]
    np.testing.assert_allclose(SVD.errors(weight, ranks), tails, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose([error(SVD, weight, *rank) for rank in ranks], tails, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(12, 8, 3, 3), (6, 10, 2, 5), (8, 8, 3, 1)])
def test_spatial_svd_leaves_the_tail_of_numpys_spectrum(shape: tuple[int, ...]) -> None:
    weight = trained_like(*shape)
    out_channels, in_channels, height, width = shape
    tails = numpy_tails(np.einsum("oihw->ihow", weight.numpy()).reshape(in_channels * height, out_channels * width))
    ranks = [(r,) for r in range(1, len(tails) + 1)]
    np.testing.assert_allclose(SPATIAL_SVD.errors(weight, ranks), tails, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose([error(SPATIAL_SVD, weight, *rank) for rank in ranks], tails, rtol=1e-10, atol=1e-12)


def test_no_pair_of_directional_kernels_near_or_far_is_closer_than_spatial_svd() -> None:
    weight, rank = trained_like(8, 6, 3, 3), 5
    vertical, horizontal = SPATIAL_SVD.decompose(weight, (rank,))
    least = norm(weight - SPATIAL_SVD.reconstruct((vertical, horizontal)))
    for seed in range(50):
        for step in (1e-1, 1e-3, 1e-5):
            moved = (
                vertical + step * randn(*vertical.shape, seed=seed),
                horizontal + step * randn(*horizontal.shape, seed=-seed),
            )
            assert norm(weight - SPATIAL_SVD.reconstruct(moved)) >= least * (1 - 1e-12)
    unfolded = torch.einsum("oihw->ihow", weight).reshape(18, 24)
    for seed in range(5):  # alternating least squares from anywhere
        right = randn(rank, 24, seed=seed)
        for _ in range(30):
            left = torch.linalg.lstsq(right.T, unfolded.T).solution.T
            right = torch.linalg.lstsq(left, unfolded).solution
        assert norm(unfolded - left @ right) >= least * (1 - 1e-12)


@pytest.mark.parametrize("rank", [(1, 1), (4, 8), (8, 8), (16, 12), (24, 24)])
@pytest.mark.parametrize("shape", [(32, 32, 3, 3), (24, 32, 5, 1)])
def test_tucker_is_as_close_as_tensorlys(shape: tuple[int, ...], rank: tuple[int, int]) -> None:
    weight = trained_like(*shape)
    (core, (basis_out, basis_in)), _ = partial_tucker(weight.numpy(), rank=list(rank), modes=[0, 1], init="svd")
    theirs = norm(weight - torch.from_numpy(np.einsum("rshw,or,is->oihw", core, basis_out, basis_in)))
    assert error(TUCKER2, weight, *rank) <= 1.0001 * theirs + 1e-12 * norm(weight)


@pytest.mark.parametrize("rank", [(3, 5), (12, 2), (10, 8)])
def test_what_tucker_leaves_is_the_norm_that_the_core_lacks(rank: tuple[int, int]) -> None:
    weight = trained_like(12, 8, 3, 3)
    reduce, core, expand = TUCKER2.decompose(weight, rank)
    for basis in (reduce.flatten(1).T, expand.flatten(1)):
        torch.testing.assert_close(
            basis.T @ basis,
            torch.eye(basis.shape[1], dtype=torch.float64) * basis.square().sum(0)[0],
            rtol=0,
            atol=1e-12,
        )
    size = norm(core) * float(reduce[0].norm() * expand[:, 0].norm())  # of the core between orthonormal bases
    lacking = norm(weight) ** 2 - size**2
    assert error(TUCKER2, weight, *rank) ** 2 == pytest.approx(lacking, rel=1e-9)


def test_tuckers_shortlist_is_the_front_of_cost_and_error(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LayerSpec("conv", "conv2d", 16, 12, (3, 3), (1, 1), (1, 1), dilation=(1, 1))
    site = Site.of(layer.called_on(((1, 16, 8, 8),)))
    ranks, weight = TUCKER2.ranks(site), trained_like(12, 16, 3, 3)
    monkeypatch.setattr(type(TUCKER2), "max_ranks", len(ranks))
    macs = {rank: sum(part.macs for part in TUCKER2.chain(site, rank)) for rank in ranks}
    errors = dict(zip(ranks, TUCKER2.errors(weight, ranks), strict=True))
    front = TUCKER2.shortlist(site, weight, ranks)
    assert 10 < len(front) < len(ranks)
    for cheap, dear in pairwise(front):
        assert macs[cheap] < macs[dear]
        assert errors[cheap] > errors[dear]
    for rank in ranks:  # HOOI lowers HOSVD's errors, by which ranks are listed, by a little
        assert any(macs[kept] <= macs[rank] and errors[kept] <= 1.01 * errors[rank] for kept in front)
    assert len(TUCKER2.shortlist(site, torch.zeros_like(weight), ranks)) == 1


@pytest.mark.filterwarnings("ignore:Trying to compute SVD with n_eigenvecs:UserWarning")
@pytest.mark.parametrize("rank", [4, 12, 32])
@pytest.mark.parametrize("seed", [0, 1])
def test_cp_is_as_close_as_tensorlys(rank: int, seed: int) -> None:
    weight = trained_like(32, 32, 3, 3, seed=10 * seed)
    tensor = weight.numpy().reshape(32, 32, 9)
    theirs = parafac(tensor, rank, init="svd", n_iter_max=100, tol=0, random_state=0)
    assert error(CP, weight, rank) <= 1.01 * np.linalg.norm(tensor - tl.cp_to_tensor(theirs))


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_the_gram_matrix_gives_the_same_truncations(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = trained_like(*shape)
    for weight in (matrix, torch.cat([matrix[:4]] * 3), torch.zeros_like(matrix), 1e-12 * matrix):
        tails = numpy_tails(weight.numpy())
        monkeypatch.setattr(spectrum, "EXACT_UP_TO", 4)
        ranks = [(r,) for r in range(1, len(tails) + 1)]
        found = [SVD.errors(weight, ranks), [error(SVD, weight, *rank) for rank in ranks]]
        for errors in found:
            np.testing.assert_allclose(errors, tails, rtol=1e-8, atol=1e-12 * norm(weight))
        monkeypatch.undo()


def test_thin_svd_is_descending_with_orthonormal_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    for matrix in (trained_like(20, 12), trained_like(12, 20)):
        for exact_up_to in (512, 4):
            monkeypatch.setattr(spectrum, "EXACT_UP_TO", exact_up_to)
            u, s, vt = thin_svd(matrix)
            eye = torch.eye(12, dtype=torch.float64)
            assert torch.equal(s, s.sort(descending=True).values)
            torch.testing.assert_close(u.T @ u, eye, rtol=0, atol=1e-8)
            torch.testing.assert_close(vt @ vt.T, eye, rtol=0, atol=1e-12)
            torch.testing.assert_close(u * s @ vt, matrix, rtol=0, atol=1e-12)


def test_leading_basis_spans_what_the_svd_spans() -> None:
    matrix = trained_like(10, 30)
    u = torch.linalg.svd(matrix, full_matrices=False).U[:, :4]
    basis = leading_basis(matrix, 4)
    torch.testing.assert_close(basis @ basis.T, u @ u.T, rtol=0, atol=1e-10)
    torch.testing.assert_close(abs(basis.T @ u), torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-10)


def test_tails_are_norms_of_the_rest() -> None:
    assert tail_norms(torch.tensor([12.0, 4.0, 3.0]), [0, 1, 2, 3, 4]) == pytest.approx([13, 5, 3, 0, 0], rel=1e-6)


def test_balance_equals_norms_and_keeps_the_product() -> None:
    factors = (1e6 * randn(3, 4), 1e-9 * randn(4, 5, seed=1), randn(5, 2, seed=2))
    balanced = balance(factors)
    torch.testing.assert_close(torch.linalg.multi_dot(balanced), torch.linalg.multi_dot(factors), rtol=1e-12, atol=0)
    assert [norm(factor) for factor in balanced] == pytest.approx([norm(balanced[0])] * 3, rel=1e-12)
    with_zero = (factors[0], torch.zeros(4, 5))
    assert all(a is b for a, b in zip(balance(with_zero), with_zero, strict=True))


def test_spaced_values_keep_the_ends_and_crowd_at_the_low_one() -> None:
    assert spaced(2, 9, 3, 5) == [2, 5, 8]
    assert spaced(4, 3, 1, 5) == []
    values = spaced(16, 16 * 100, 16, 10)
    assert values[0] == 16
    assert values[-1] == 1600
    assert len(values) <= 10
    assert all(value % 16 == 0 for value in values)
    gaps = [b - a for a, b in pairwise(values)]
    assert gaps == sorted(gaps)
    assert gaps[0] > 0
