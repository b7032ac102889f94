from __future__ import annotations

import pytest
import torch

from tdfx.decompositions.spectrum import leading_basis


def graded(rows: int, columns: int) -> torch.Tensor:
    """Singular values from 1 down to 1e-10: below 1e-8 a Gram matrix, which squares them, holds rounding alone."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(n, min(rows, columns), generator=generator, dtype=torch.float64))[0]
        for n in (rows, columns)
    )
    return left * torch.logspace(0, -10, min(rows, columns), dtype=torch.float64) @ right.T


@pytest.mark.parametrize("shape", [(12, 5), (6, 6), (5, 12)])
def test_a_basis_of_full_rank_loses_nothing(shape: tuple[int, int]) -> None:
    matrix = graded(*shape)
    basis = leading_basis(matrix, min(shape))
    assert float((matrix - basis @ (basis.T @ matrix)).abs().max()) <= 1e-15


@pytest.mark.parametrize(("shape", "rank"), [((12, 5), 1), ((12, 5), 3), ((12, 5), 9), ((5, 12), 1), ((5, 12), 3)])
def test_a_basis_is_orthonormal_and_dominant(shape: tuple[int, int], rank: int) -> None:
    for matrix in (graded(*shape), torch.zeros(shape, dtype=torch.float64)):
        basis = leading_basis(matrix, rank)
        assert tuple(basis.shape) == (shape[0], rank)
        assert float((basis.T @ basis - torch.eye(rank, dtype=torch.float64)).abs().max()) <= 1e-12
        left = matrix - basis @ (basis.T @ matrix)
        tail = torch.linalg.svdvals(matrix)[rank:]
        assert float(torch.linalg.vector_norm(left)) <= float(torch.linalg.vector_norm(tail)) + 1e-8
