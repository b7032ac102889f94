"""Tucker-2: a convolution as 1 x 1 to S channels, a kernel-sized core from S to R channels, and 1 x 1 from R.

W[o, i, ...] = sum_{r, s} A[o, r] G[r, s, ...] B[i, s], the kernel's spatial modes left whole. Ranks are written in the
order of the weight's layout: (R for out, S for in). HOSVD bases from the Gram matrices of the two unfoldings,
improved by higher-order orthogonal iteration; A and B are orthonormal, so ||W - W~||^2 = ||W||^2 - ||G||^2.

Source: Kim et al. 2016, section 3.1, equations 2 to 5; De Lathauwer et al. 2000 for HOSVD and HOOI.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tdfx.decompositions.base import Decomposition, Factors, balance, spaced
from tdfx.decompositions.chain import link, pointwise, spatial
from tdfx.decompositions.spectrum import leading_basis
from tdfx.records.layer import LayerSpec, Rank, Site

SWEEPS = 2  # of HOOI; more change the error by less than 1e-3 of itself on trained kernels
RANKS_PER_MODE = 12


class Tucker2(Decomposition):
    """Three convolutions in place of one: reduce channels, convolve, expand channels."""

    name = "tucker2"
    summary = "k x k conv -> 1 x 1, k x k core, 1 x 1"
    source = "Kim et al. 2016, sec. 3.1"
    max_ranks = 16

    def unsupported(self, site: Site) -> str | None:
        if site.kind == "linear" or math.prod(site.layer.kernel_size) == 1:
            return "tucker2 takes convolutions with a kernel larger than 1"
        return None

    def full_rank(self, site: Site) -> Rank:
        layer = site.layer
        kernel = math.prod(layer.kernel_size)
        return (
            min(layer.out_channels, layer.in_channels * kernel),
            min(layer.in_channels, layer.out_channels * kernel),
        )

    def ranks(self, site: Site, multiple: int = 1) -> tuple[Rank, ...]:
        most_out, most_in = self.full_rank(site)
        pairs = (
            (r, s)
            for r in spaced(multiple, most_out, multiple, RANKS_PER_MODE)
            for s in spaced(multiple, most_in, multiple, RANKS_PER_MODE)
        )
        return tuple(pair for pair in pairs if self.saves(site, pair))

    def guesses(self, weight: Tensor, ranks: Sequence[Rank]) -> list[float]:
        """Errors of the truncated HOSVD."""
        basis_out = leading_basis(weight.flatten(1), max(r for r, _ in ranks))
        basis_in = leading_basis(weight.transpose(0, 1).flatten(1), max(s for _, s in ranks))
        energy = _project(weight, basis_out, basis_in).flatten(2).square().sum(2).cumsum(0).cumsum(1)
        left = weight.square().sum() - energy
        return [max(float(left[r - 1, s - 1]), 0.0) ** 0.5 for r, s in ranks]

    def chain(self, site: Site, rank: Rank) -> tuple[LayerSpec, ...]:
        layer, (r, s) = site.layer, rank
        return link(
            layer,
            (
                pointwise(layer, "reduce", layer.in_channels, s),
                spatial(layer, "core", s, r),
                pointwise(layer, "expand", r, layer.out_channels),
            ),
        )

    def decompose(self, weight: Tensor, rank: Rank, *, seed: int = 0) -> Factors:
        r, s = rank
        basis_in = leading_basis(weight.transpose(0, 1).flatten(1), s)
        for _ in range(SWEEPS):
            basis_out = leading_basis(torch.einsum("oi...,is->os...", weight, basis_in).flatten(1), r)
            basis_in = leading_basis(torch.einsum("oi...,or->ir...", weight, basis_out).flatten(1), s)
        core = _project(weight, basis_out, basis_in)
        ones = (1,) * (weight.dim() - 2)
        return balance((basis_in.T.reshape(s, -1, *ones), core, basis_out.reshape(-1, r, *ones)))

    def filters(self, factors: Sequence[Tensor]) -> Tensor:
        reduce, core, _ = factors
        filters: Tensor = torch.tensordot(core, reduce.flatten(1), ([1], [0])).movedim(-1, 1)
        return filters


def _project(weight: Tensor, basis_out: Tensor, basis_in: Tensor) -> Tensor:
    return torch.einsum("oi...,or,is->rs...", weight, basis_out, basis_in)
