"""Channel SVD: a convolution to R channels with the kernel's own extent, then 1 x 1.

The kernel (out, in, ...) is unfolded to rows out and columns (in, ...) and its SVD cut to rank R: fewer filters,
and their linear combinations.

Source: Zhang et al. 2016, section 3.1; Denton et al. 2014, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from tdfx.decompositions.base import Decomposition, Factors
from tdfx.decompositions.chain import link, pointwise, spatial
from tdfx.decompositions.metric import Metric, metric_svd
from tdfx.decompositions.spectrum import tail_norms
from tdfx.records.layer import LayerSpec, Rank, Site


class ChannelSVD(Decomposition):
    """A convolution to fewer channels and a pointwise one from there."""

    name = "channel_svd"
    summary = "k x k conv -> k x k to R channels, 1 x 1"
    source = "Zhang et al. 2016, sec. 3.1"

    def unsupported(self, site: Site) -> str | None:
        if site.kind == "linear" or math.prod(site.layer.kernel_size) == 1:
            return "channel_svd takes convolutions with a kernel larger than 1"
        return None

    def full_rank(self, site: Site) -> Rank:
        out_channels, *others = site.layer.weight_shape
        return (min(out_channels, math.prod(others)),)

    def chain(self, site: Site, rank: Rank) -> tuple[LayerSpec, ...]:
        layer, (r,) = site.layer, rank
        return link(
            layer,
            (spatial(layer, "filters", layer.in_channels, r), pointwise(layer, "expand", r, layer.out_channels)),
        )

    def decompose(self, weight: Tensor, rank: Rank, *, seed: int = 0) -> Factors:
        return self.solve(weight, rank, None)

    def solve(
        self, weight: Tensor, rank: Rank, metric: Metric | None, *, seed: int = 0, draft: bool = False
    ) -> Factors:
        (r,) = rank
        ones = (1,) * (weight.dim() - 2)
        left, right, _ = metric_svd(weight.flatten(1), metric)
        return right[:r].reshape(r, *weight.shape[1:]), left[:, :r].reshape(-1, r, *ones)

    def filters(self, factors: Sequence[Tensor]) -> Tensor:
        return factors[0]

    def unfoldings(self, weight: Tensor) -> tuple[Tensor, ...]:
        return (weight.flatten(1),)

    def errors(
        self, weight: Tensor, ranks: Sequence[Rank], metric: Metric | None = None, *, seed: int = 0
    ) -> list[float]:
        return tail_norms(metric_svd(weight.flatten(1), metric)[2], [r for (r,) in ranks])
