"""CP with one operator per mode: 1 x 1 to R channels, depthwise k x 1, depthwise 1 x k, and 1 x 1 to the outputs.

The kernel as a tensor (out, in, height, width) is a sum of R outer products,
W[o, i, h, w] = sum_r A[o, r] B[i, r] H[h, r] V[w, r]. Each depthwise layer takes stride, padding and dilation of its
own direction.

Sources: Lebedev et al. 2015, section 3, equation 5; ``als`` for the algorithm.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import mul

from torch import Tensor

from tdfx.decompositions.als import alternate, balance_components, exact, exact_rank
from tdfx.decompositions.base import Factors
from tdfx.decompositions.chain import along_each, link, pointwise
from tdfx.decompositions.cp import CP
from tdfx.records.layer import LayerSpec, Rank, Site


class CP4(CP):
    """Pointwise, one depthwise convolution per direction, pointwise in place of a convolution."""

    name = "cp4"
    summary = "k x k conv -> 1 x 1, depthwise k x 1, depthwise 1 x k, 1 x 1"
    source = "Lebedev et al. 2015, eq. 5"
    max_ranks = 6

    def unsupported(self, site: Site) -> str | None:
        if len(site.layer.kernel_size) < 2 or min(site.layer.kernel_size) == 1:
            return "cp4 takes 2-d and 3-d convolutions with a kernel larger than 1 in every direction"
        return None

    def full_rank(self, site: Site) -> Rank:
        """Rank of the exact construction: one component per fibre along the largest mode."""
        layer = site.layer
        return (exact_rank((layer.out_channels, layer.in_channels, *layer.kernel_size)),)

    def chain(self, site: Site, rank: Rank) -> tuple[LayerSpec, ...]:
        layer, (r,) = site.layer, rank
        return link(
            layer,
            (
                pointwise(layer, "reduce", layer.in_channels, r),
                *along_each(layer, [r] * (len(layer.kernel_size) + 1), groups=r),
                pointwise(layer, "expand", r, layer.out_channels),
            ),
        )

    def _alternate(self, weight: Tensor, rank: Rank, seed: int, sweeps: int) -> Factors:
        (r,) = rank
        factors = exact(weight) if r == exact_rank(weight.shape) else alternate(weight, r, seed, sweeps)
        a, b, *kernel = balance_components(factors)
        dims = weight.dim() - 2
        ones = (1,) * dims
        depthwise = (
            factor.T.reshape(r, 1, *(len(factor) if d == dim else 1 for d in range(dims)))
            for dim, factor in enumerate(kernel)
        )
        return b.T.reshape(r, -1, *ones), *depthwise, a.reshape(-1, r, *ones)

    def filters(self, factors: Sequence[Tensor]) -> Tensor:
        *others, _ = factors
        return reduce(mul, others)  # (R, in, 1, 1), (R, 1, k, 1) and (R, 1, 1, k) broadcast to (R, in, k, k)
