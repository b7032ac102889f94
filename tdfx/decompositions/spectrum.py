"""Truncated SVDs and orthonormal bases, accurate enough for exact errors and fast enough for large layers."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_UP_TO = 512  # smaller side up to which the full SVD is cheap


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V^T of a float64 matrix (m, n), k = min(m, n), singular values descending.

    Above ``EXACT_UP_TO`` columns and rows the eigenvectors of the smaller Gram matrix are used: about ten times
    faster. U * S is then the projection M V on an orthonormal V, so what truncation leaves is still exact, and at most
    1e-8 of the largest singular value above the least.
    """
    if min(matrix.shape) <= EXACT_UP_TO:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        return u, s, vt
    if matrix.shape[0] < matrix.shape[1]:
        v, s, ut = thin_svd(matrix.T)
        return ut.T, s, v.T
    _, basis = torch.linalg.eigh(matrix.T @ matrix)
    basis = basis.flip(-1)
    projected = matrix @ basis
    s = torch.linalg.vector_norm(projected, dim=0)
    return projected / s.clamp_min(torch.finfo(s.dtype).tiny), s, basis.T


def leading_basis(matrix: Tensor, rank: int) -> Tensor:
    """Orthonormal basis (m, rank) of the dominant left singular subspace of a matrix (m, n), by a Gram matrix.

    A Gram matrix cannot tell singular values below 1e-8 of the largest from 0: where rows are more than columns, the
    basis is made of the matrix's own columns, so that from rank n on it spans them all.
    """
    rows, columns = matrix.shape
    if columns < rows:
        _, vectors = torch.linalg.eigh(matrix.T @ matrix)
        spanning: Tensor = torch.linalg.qr(matrix @ vectors.flip(-1), "complete" if rank > columns else "reduced")[0]
        return spanning[:, :rank]
    _, vectors = torch.linalg.eigh(matrix @ matrix.T)
    leading: Tensor = vectors[:, -rank:].flip(-1)
    return leading


def tail_norms(singular_values: Tensor, ranks: list[int]) -> list[float]:
    """Frobenius norms of what truncation to each rank leaves (Eckart-Young)."""
    tails = singular_values.square().flip(0).cumsum(0).flip(0).sqrt()
    return [float(tails[rank]) if rank < len(tails) else 0.0 for rank in ranks]
