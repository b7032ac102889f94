"""Tensor train: a convolution as 1 x 1, one convolution along each spatial direction, and 1 x 1.

The kernel with its modes in the order in, height, width, out is a train of cores,
W[o, i, h, w] = sum G1[i, a] G2[a, h, b] G3[b, w, c] G4[c, o]; ranks are (a, b, c). TT-SVD from left to right: each core
is the dominant subspace of what is left, unfolded; all but the last are orthonormal. Each spatial core takes stride,
padding and dilation of its own direction.

Source: Oseledets 2011, section 2, algorithm 1 (TT-SVD) and theorem 2.2 (error of the unfoldings).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from tdfx.decompositions.base import Decomposition, Factors, balance, spaced
from tdfx.decompositions.chain import along_each, link, pointwise
from tdfx.decompositions.spectrum import leading_basis
from tdfx.records.layer import LayerSpec, Rank, Site

COMBINATIONS = 150  # of ranks, at most, before the shortlist


class TensorTrain(Decomposition):
    """Pointwise, one convolution per direction, pointwise in place of a convolution."""

    name = "tt"
    summary = "k x k conv -> 1 x 1, k x 1, 1 x k, 1 x 1"
    source = "Oseledets 2011, alg. 1"
    max_ranks = 16

    def unsupported(self, site: Site) -> str | None:
        if len(site.layer.kernel_size) < 2 or min(site.layer.kernel_size) == 1:
            return "tt takes 2-d and 3-d convolutions with a kernel larger than 1 in every direction"
        return None

    def full_rank(self, site: Site) -> Rank:
        modes = (site.layer.in_channels, *site.layer.kernel_size, site.layer.out_channels)
        return tuple(min(math.prod(modes[:bond]), math.prod(modes[bond:])) for bond in range(1, len(modes)))

    def is_rank(self, site: Site, rank: Rank) -> bool:
        """Besides being within full rank, no bond may exceed its left neighbour times the kernel between them."""
        growth = zip(rank, rank[1:], site.layer.kernel_size, strict=False)
        return super().is_rank(site, rank) and all(right <= left * size for left, right, size in growth)

    def unfoldings(self, weight: Tensor) -> tuple[Tensor, ...]:
        """One per bond: the modes on its left against those on its right."""
        train = weight.movedim(0, -1)
        return tuple(train.flatten(0, bond - 1).flatten(1) for bond in range(1, train.dim()))

    def clamp(self, site: Site, rank: Rank) -> Rank:
        """From left to right, since no bond may grow beyond its left neighbour times the kernel between them."""
        left, *others = super().clamp(site, rank)
        clamped = [left]
        for right, size in zip(others, site.layer.kernel_size, strict=True):
            clamped.append(min(right, clamped[-1] * size))
        return tuple(clamped)

    def ranks(self, site: Site, multiple: int = 1) -> tuple[Rank, ...]:
        full = self.full_rank(site)
        bonds = (spaced(multiple, most, multiple, int(COMBINATIONS ** (1 / len(full)))) for most in full)
        return tuple(rank for rank in product(*bonds) if self.is_rank(site, rank) and self.saves(site, rank))

    def guesses(self, weight: Tensor, ranks: Sequence[Rank]) -> list[float]:
        """The bounds of theorem 2.2."""
        tails = []
        for unfolded in self.unfoldings(weight):
            gram = unfolded.T @ unfolded if unfolded.shape[0] > unfolded.shape[1] else unfolded @ unfolded.T
            tails.append([0.0, *torch.linalg.eigvalsh(gram).clamp_min(0).cumsum(0).tolist()][::-1])
        return [sum(tail[r] for tail, r in zip(tails, rank, strict=True)) ** 0.5 for rank in ranks]

    def chain(self, site: Site, rank: Rank) -> tuple[LayerSpec, ...]:
        layer = site.layer
        return link(
            layer,
            (
                pointwise(layer, "reduce", layer.in_channels, rank[0]),
                *along_each(layer, rank),
                pointwise(layer, "expand", rank[-1], layer.out_channels),
            ),
        )

    def decompose(self, weight: Tensor, rank: Rank, *, seed: int = 0) -> Factors:
        dims = weight.dim() - 2
        rest = weight.movedim(0, -1).flatten(1)  # (in, kernel out)
        cores = []
        left = 1
        for r, size in zip(rank, (weight.shape[1], *weight.shape[2:]), strict=True):
            rest = rest.reshape(left * size, -1)
            basis = leading_basis(rest, r)
            cores.append(basis.reshape(left, size, r))
            rest, left = basis.T @ rest, r
        first, *middle = cores
        ones = (1,) * dims
        factors = [first[0].T.reshape(rank[0], -1, *ones)]
        for dim, core in enumerate(middle):
            shape = [core.shape[1] if d == dim else 1 for d in range(dims)]
            factors.append(core.permute(2, 0, 1).reshape(core.shape[2], core.shape[0], *shape))
        return balance((*factors, rest.T.reshape(-1, left, *ones)))

    def filters(self, factors: Sequence[Tensor]) -> Tensor:
        first, *middle, _ = factors
        train = first.flatten(1).T  # (in, bond)
        for core in middle:
            train = torch.tensordot(train, core.flatten(2).permute(1, 2, 0), 1)  # (in, kernel so far, bond)
        return train.movedim(-1, 0)
