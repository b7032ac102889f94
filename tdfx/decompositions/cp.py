"""CP: a convolution as 1 x 1 to R channels, one depthwise kernel on each, and 1 x 1 to the outputs.

The kernel as a three-way tensor (out, in, k k) is a sum of R outer products,
W[o, i, p] = sum_r A[o, r] B[i, r] C[p, r]: the spatial modes stay together, unlike in the four-operator form.

Sources: Lebedev et al. 2015, section 3, for CP of convolutions; ``als`` for the algorithm.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

from torch import Tensor

from tdfx.decompositions.als import SWEEPS, alternate, balance_chain, balance_components, exact, exact_rank, flops
from tdfx.decompositions.base import Decomposition, Factors
from tdfx.decompositions.chain import link, pointwise, spatial
from tdfx.records.layer import LayerSpec, Rank, Site

MEMORY = 2**31  # bytes of the largest intermediate, kernel x channels x rank in float32
SWEEP_FLOPS = 6e9  # of the costliest sweep
START_SWEEPS = 16  # before refinement, which ends lower from there than from where alternation has converged


class CP(Decomposition):
    """Pointwise, depthwise, pointwise in place of a convolution."""

    name = "cp"
    summary = "k x k conv -> 1 x 1, depthwise k x k, 1 x 1"
    source = "Lebedev et al. 2015, sec. 3; Kolda & Bader 2009, sec. 3.4"
    steps = 40
    max_ranks = 10

    def unsupported(self, site: Site) -> str | None:
        if site.kind == "linear" or math.prod(site.layer.kernel_size) == 1:
            return "cp takes convolutions with a kernel larger than 1"
        return None

    def full_rank(self, site: Site) -> Rank:
        """Rank of the exact construction: one component per fibre along the largest mode."""
        layer = site.layer
        return (exact_rank((layer.out_channels, layer.in_channels, math.prod(layer.kernel_size))),)

    def ranks(self, site: Site, multiple: int = 1) -> tuple[Rank, ...]:
        """Ranks that cost less than the dense layer, by equal factors, as far as alternating least squares affords.

        A sweep takes time in proportion to the rank: ranks by equal steps would spend nearly all of it on the highest.
        """
        layer, (most,) = site.layer, self.full_rank(site)
        channels, kernel = max(layer.in_channels, layer.out_channels), math.prod(layer.kernel_size)
        least_flops = flops(layer.weight_shape, 1)
        affordable = min(most, MEMORY // (4 * kernel * channels), int(SWEEP_FLOPS / least_flops))
        grid = range(multiple, affordable + 1, multiple)
        cheaper = bisect_left(grid, True, key=lambda rank: not self.saves(site, (rank,)))
        if cheaper <= self.max_ranks:
            return tuple((rank,) for rank in grid[:cheaper])
        # The lowest, and from a sixteenth of the highest on.
        start, steps = max(cheaper / 16, 1), self.max_ranks - 2
        numbers = {1, *(round(start * (cheaper / start) ** (step / steps)) for step in range(steps + 1))}
        return tuple((grid[number - 1],) for number in sorted(numbers))

    def chain(self, site: Site, rank: Rank) -> tuple[LayerSpec, ...]:
        layer, (r,) = site.layer, rank
        return link(
            layer,
            (
                pointwise(layer, "reduce", layer.in_channels, r),
                spatial(layer, "depthwise", r, r, groups=r),
                pointwise(layer, "expand", r, layer.out_channels),
            ),
        )

    def decompose(self, weight: Tensor, rank: Rank, *, seed: int = 0) -> Factors:
        return self._alternate(weight, rank, seed, SWEEPS)

    def start(self, weight: Tensor, rank: Rank, *, seed: int) -> Factors:
        return self._alternate(weight, rank, seed, START_SWEEPS)

    def _alternate(self, weight: Tensor, rank: Rank, seed: int, sweeps: int) -> Factors:
        (r,) = rank
        tensor = weight.flatten(2)
        factors = exact(tensor) if r == exact_rank(tensor.shape) else alternate(tensor, r, seed, sweeps)
        a, b, c = balance_components(factors)
        ones = (1,) * (weight.dim() - 2)
        return b.T.reshape(r, -1, *ones), c.T.reshape(r, 1, *weight.shape[2:]), a.reshape(-1, r, *ones)

    def filters(self, factors: Sequence[Tensor]) -> Tensor:
        reduce, depthwise, _ = factors
        return reduce * depthwise  # (R, in, 1, 1) and (R, 1, k, k) broadcast to (R, in, k, k)

    def balanced(self, factors: Factors) -> Factors:
        return balance_chain(factors)
