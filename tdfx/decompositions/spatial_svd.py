"""Spatial SVD: a k x k convolution as k x 1 to R channels, then 1 x k.

The kernel (out, in, h, w) is unfolded to rows (in, h) and columns (out, w) and its SVD cut to rank R:
W[o, i, h, w] = sum_r V[r, i, h] H[o, r, w]. Each factor takes stride, padding and dilation of its own direction.

Source: Jaderberg, Vedaldi and Zisserman 2014, section 2.2 (scheme 2); Tai et al. 2016, theorem 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdfx.decompositions.base import Decomposition, Factors
from tdfx.decompositions.chain import along_each, link
from tdfx.decompositions.metric import Metric
from tdfx.decompositions.spectrum import tail_norms, thin_svd
from tdfx.parallel import last_call
from tdfx.records.layer import LayerSpec, Rank, Site


class SpatialSVD(Decomposition):
    """A vertical and a horizontal convolution in place of a 2-d one."""

    name = "spatial_svd"
    summary = "k x k conv -> k x 1, 1 x k"
    source = "Jaderberg et al. 2014, sec. 2.2"

    def unsupported(self, site: Site) -> str | None:
        if len(site.layer.kernel_size) != 2 or min(site.layer.kernel_size) == 1:
            return "spatial_svd takes 2-d convolutions with a kernel larger than 1 in both directions"
        return None

    def full_rank(self, site: Site) -> Rank:
        height, width = site.layer.kernel_size
        return (min(site.layer.in_channels * height, site.layer.out_channels * width),)

    def chain(self, site: Site, rank: Rank) -> tuple[LayerSpec, ...]:
        layer, (r,) = site.layer, rank
        return link(
            layer,
            along_each(layer, (layer.in_channels, r, layer.out_channels)),
        )

    def decompose(self, weight: Tensor, rank: Rank, *, seed: int = 0) -> Factors:
        (r,) = rank
        out_channels, in_channels, height, width = weight.shape
        u, s, vt = _svd(weight)
        root = s[:r].sqrt()
        vertical = (u[:, :r] * root).T.reshape(r, in_channels, height, 1)
        horizontal = (root[:, None] * vt[:r]).reshape(r, out_channels, 1, width).transpose(0, 1)
        return vertical, horizontal

    def filters(self, factors: Sequence[Tensor]) -> Tensor:
        """One a vertical filter and column of the kernel, zero in the other columns."""
        vertical, horizontal = factors
        width = horizontal.shape[3]
        columns = torch.eye(width, dtype=vertical.dtype, device=vertical.device).reshape(1, width, 1, 1, width)
        return (vertical.unsqueeze(1) * columns).flatten(0, 1)

    def guesses(self, weight: Tensor, ranks: Sequence[Rank]) -> list[float]:
        """What the truncated SVD leaves."""
        return tail_norms(_svd(weight)[1], [r for (r,) in ranks])

    def unfoldings(self, weight: Tensor) -> tuple[Tensor, ...]:
        return (_unfold(weight),)

    def errors(
        self, weight: Tensor, ranks: Sequence[Rank], metric: Metric | None = None, *, seed: int = 0
    ) -> list[float]:
        return self.guesses(weight, ranks) if metric is None else super().errors(weight, ranks, metric, seed=seed)


@last_call  # all ranks ask for it in turn
def _svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return thin_svd(_unfold(weight))


def _unfold(weight: Tensor) -> Tensor:
    """(out, in, h, w) -> (in h, out w)."""
    out_channels, in_channels, height, width = weight.shape
    return weight.permute(1, 2, 0, 3).reshape(in_channels * height, out_channels * width)
