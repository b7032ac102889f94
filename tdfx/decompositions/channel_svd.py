"""Channel SVD: a convolution to R channels with the kernel's own extent, then 1 x 1.

The kernel (out, in, ...) is unfolded to rows out and columns (in, ...) and its SVD cut to rank R: fewer filters,
and their linear combinations.

Source: Zhang et al. 2016, section 3.1; Denton et al. 2014, section 3.2.
"""

from __future__ import annotations

import math

from tdfx.decompositions.chain import link, pointwise, spatial
from tdfx.decompositions.svd import SVD
from tdfx.records.layer import LayerSpec, Rank, Site


class ChannelSVD(SVD):
    """A convolution to fewer channels and a pointwise one from there."""

    name = "channel_svd"
    summary = "k x k conv -> k x k to R channels, 1 x 1"
    source = "Zhang et al. 2016, sec. 3.1"

    def unsupported(self, site: Site) -> str | None:
        if site.kind == "linear" or math.prod(site.layer.kernel_size) == 1:
            return "channel_svd takes convolutions with a kernel larger than 1"
        return None

    def chain(self, site: Site, rank: Rank) -> tuple[LayerSpec, ...]:
        layer, (r,) = site.layer, rank
        return link(
            layer,
            (spatial(layer, "filters", layer.in_channels, r), pointwise(layer, "expand", r, layer.out_channels)),
        )
