"""The quadratic form that a weight's error is measured in, and its solution without structure.

With a weight unfolded to (out, n) and its difference D, the form is tr(G D S D^T): S the covariance of the layer's
input, G that of the loss's gradient at its output. In the coordinates G^1/2 W S^1/2 it is the Frobenius norm, where the
best approximation of a rank is a truncated SVD.

Eigenvalues are floored at ``FLOOR`` of the largest before anything is inverted: fewer samples than inputs, and dead
channels, leave covariances without full rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

from tdfx.decompositions.spectrum import EXACT_UP_TO, thin_svd
from tdfx.parallel import last_call

FLOOR = 1e-6
LARGE = 1024  # columns from which products with S that need no more are in float32


@dataclass(frozen=True, eq=False)
class Metric:
    """tr(G D S D^T) of a difference D of weights.

    The weight of a layer in groups stands for the matrix (out, n) whose diagonal blocks are the groups' weights.

    Attributes:
        in_cov: S, (n, n) float64, n = in times the kernel's positions, in the order of the unfolded weight; or its
            diagonal blocks, (groups, n / groups, n / groups), or its diagonal, (n,), where what lies outside of them is
            taken for zero.
        out_cov: G, (out, out) float64; None for the identity.
        groups: of the layer.
    """

    in_cov: Tensor
    out_cov: Tensor | None = None
    groups: int = 1

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All that the metric is made of."""
        return self.in_cov, self.out_cov

    @property
    def crosses_groups(self) -> bool:
        """Whether the differences of two groups together count other than one by one."""
        return self.groups > 1 and self.in_cov.dim() == 2 and self.out_cov is not None

    @cached_property
    def parts(self) -> tuple[Metric, ...]:
        """The diagonal blocks: what each group's weight alone is measured in."""
        if self.groups == 1:
            return (self,)
        in_covs = diagonal_blocks(self.in_cov, self.groups)
        out_covs = [None] * self.groups if self.out_cov is None else diagonal_blocks(self.out_cov, self.groups)
        return tuple(Metric(*pair) for pair in zip(in_covs, out_covs, strict=True))

    def norm(self, difference: Tensor) -> float:
        """sqrt(tr(G D S D^T)) of a difference (out, ...), flattened after its first dimension."""
        matrix = difference.flatten(1)
        if self.crosses_groups:
            return self._norm_across(matrix)
        if self.groups > 1:
            return math.hypot(
                *(form.norm(part) for form, part in zip(self.parts, matrix.chunk(self.groups), strict=True))
            )
        energy = self.times_in_cov(matrix) * (matrix if self.out_cov is None else self.out_cov @ matrix)
        return math.sqrt(max(float(energy.sum()), 0.0))

    def _norm_across(self, matrix: Tensor) -> float:
        """The same for the blocks D_i, (out, n / groups) in all, of a difference."""
        assert self.out_cov is not None
        blocks = matrix.chunk(self.groups)
        left = torch.cat([d @ s for d, s in zip(blocks, self.in_cov.chunk(self.groups), strict=True)])
        right = torch.cat([g @ d for d, g in zip(blocks, self.out_cov.chunk(self.groups, 1), strict=True)], 1)
        return math.sqrt(max(float((left * right).sum()), 0.0))

    def times_in_cov(self, matrix: Tensor) -> Tensor:
        """M S for a matrix (m, n), in its precision; of float64 where n is ``LARGE`` to float32's precision."""
        if self.in_cov.dim() == 1:
            return matrix * self.in_cov
        if matrix.dtype == torch.float32:
            return matrix @ self._single
        if not self.is_large:
            return matrix @ self.in_cov
        scale = float(matrix.abs().max()) or 1.0  # a small difference must not vanish
        return ((matrix / scale).float() @ self._single).double() * scale

    @property
    def is_large(self) -> bool:
        """Whether ``times_in_cov`` is to single precision, whatever the matrix's."""
        return len(self.in_cov) >= LARGE

    @cached_property
    def _single(self) -> Tensor:
        return self.in_cov.float()

    @cached_property
    def floor(self) -> float:
        """``FLOOR`` of the largest eigenvalue of S, to be added to its diagonal; 1 where S is zero."""
        return FLOOR * _largest_eigenvalue(self.in_cov) or 1.0

    @cached_property
    def out_roots(self) -> tuple[Tensor, Tensor] | None:
        """G^1/2 and its inverse; None for the identity."""
        return None if self.out_cov is None else roots(self.out_cov)

    def whitened(self, weight: Tensor) -> Tensor:
        """A weight (out, in / groups, *kernel) in coordinates in which its outputs and input channels are white."""
        if self.groups == 1:
            return _whitened(self, weight)
        weights = weight.chunk(self.groups)
        return torch.cat([_whitened(form, part) for form, part in zip(self.parts, weights, strict=True)])

    def channel_roots(self, channels: int) -> tuple[Tensor, Tensor]:
        """S^1/2 and its inverse of the input channels alone, S averaged over the kernel's positions."""
        return _channel_roots(self, channels)


def diagonal_blocks(matrix: Tensor, groups: int) -> Tensor:
    """(groups, n / groups, n / groups) of (n, n), in shared memory; blocks are returned as they are."""
    if matrix.dim() == 3:
        return matrix
    size = len(matrix) // groups
    return matrix.reshape(groups, size, groups, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)


def along(tensor: Tensor, dim: int, matrix: Tensor) -> Tensor:
    """The tensor with a matrix applied to one of its dimensions."""
    applied: Tensor = torch.tensordot(matrix, tensor, ([1], [dim])).movedim(0, dim)
    return applied


def roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root and its exact inverse, eigenvalues floored; identities for a zero matrix.

    Of a diagonal, (n,), the diagonals.
    """
    if covariance.dim() == 1:
        root = covariance.clamp_min(FLOOR * float(covariance.max()) or 1.0).sqrt()
        return root, 1 / root
    values, vectors = torch.linalg.eigh(covariance)
    if not values[-1] > 0:
        identity = torch.eye(len(covariance), dtype=covariance.dtype)
        return identity, identity
    spread = values.clamp_min(FLOOR * values[-1]).sqrt()
    return (vectors * spread) @ vectors.T, (vectors / spread) @ vectors.T


def metric_svd(matrix: Tensor, metric: Metric | None) -> tuple[Tensor, Tensor, Tensor]:
    """Left (out, k), right (k, n) and the norms (k,): their first r columns and rows are the best rank-r approximation.

    What cutting at r leaves has the norm of ``norms[r:]`` in the metric; None is the Frobenius norm. A component has
    equal norms on both sides. Where there are no more outputs than inputs, the eigenvectors of W S W^T give all, as
    in Zhang et al. 2016, section 3.1, and S is not inverted. Columns of zeros stay so, exactly, where S is diagonal.
    """
    if metric is None:
        u, s, vt = thin_svd(matrix)
        return u * s.sqrt(), s.sqrt()[:, None] * vt * matrix.any(0), s
    root, inverse = metric.out_roots or (None, None)
    weighted = matrix if root is None else root @ matrix
    if matrix.shape[0] <= matrix.shape[1]:
        values, vectors = torch.linalg.eigh(times(weighted, metric.in_cov) @ weighted.T)
        vectors, energies = vectors.flip(-1), values.flip(-1).clamp_min(0)
        left, right = vectors, vectors.T @ weighted
    else:
        in_root, in_inverse = roots(metric.in_cov)
        u, s, vt = thin_svd(times(weighted, in_root))
        left, right = u * s, times(vt, in_inverse)
        vectors, energies = u, s.square() * (times(right, metric.in_cov) * right).sum(1)
    if inverse is not None:
        left = inverse @ left
        shares = inverse @ vectors  # of the form with G itself rather than G floored
        energies = energies * ((metric.out_cov @ shares) * shares).sum(0)
    if metric.in_cov.dim() == 1:
        right = right * matrix.any(0)
    norms = torch.linalg.vector_norm(left, dim=0), torch.linalg.vector_norm(right, dim=1)
    tiny = torch.finfo(matrix.dtype).tiny
    scale = (norms[1].clamp_min(tiny) / norms[0].clamp_min(tiny)).sqrt()
    dead = (norms[0] == 0) | (norms[1] == 0)
    scale = torch.where(dead, torch.ones_like(scale), scale)
    return left * scale, right / scale[:, None], energies.clamp_min(0).sqrt()


def times(matrix: Tensor, other: Tensor) -> Tensor:
    """The matrix times another one, or times the matrix of a diagonal, (n,)."""
    return matrix * other if other.dim() == 1 else matrix @ other


# All methods and ranks of a site ask for these in turn.
@last_call
def _whitened(metric: Metric, weight: Tensor) -> Tensor:
    if metric.in_cov.dim() == 1:
        white = weight * roots(metric.in_cov)[0]
    else:
        white = along(weight, 1, metric.channel_roots(weight.shape[1])[0])
    return white if metric.out_roots is None else along(white, 0, metric.out_roots[0])


@last_call
def _channel_roots(metric: Metric, channels: int) -> tuple[Tensor, Tensor]:
    kernel = len(metric.in_cov) // channels
    return roots(metric.in_cov.reshape(channels, kernel, channels, kernel).diagonal(dim1=1, dim2=3).mean(-1))


def _largest_eigenvalue(covariance: Tensor) -> float:
    if len(covariance) <= EXACT_UP_TO:
        return max(float(torch.linalg.eigvalsh(covariance)[-1]), 0.0)
    if not covariance.any():
        return 0.0
    start = np.random.default_rng(0).standard_normal(len(covariance))  # the same result every time
    return max(float(eigsh(covariance.numpy(), 1, v0=start, return_eigenvectors=False, tol=1e-3)[0]), 0.0)
