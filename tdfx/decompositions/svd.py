"""Truncated SVD of a linear layer, a 1 x 1 convolution or an embedding.

W = U S V^T (out x in) is cut to rank R and split into a layer in -> R with weight S^1/2 V^T and a layer R -> out
with weight U S^1/2. Stride and padding of a 1 x 1 convolution go to the first factor: sampling positions before
mixing channels is exact and cheaper by the stride.

An embedding, a linear layer of one-hot inputs, becomes a narrower table and a linear layer to the old width. A sum or
mean of rows may be taken of either, so bags are of the narrow rows. A row of zeros stays one, exactly.

Source: Eckart and Young 1936; for layers Denil et al. 2013 and Xue et al. 2013, section 2; for embeddings Lan et al.
2020, section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from tdfx.decompositions.base import Decomposition, Factors
from tdfx.decompositions.chain import link, pointwise, spatial
from tdfx.decompositions.metric import Metric
from tdfx.decompositions.spectrum import tail_norms, thin_svd
from tdfx.decompositions.tied import truncated, truncation_errors
from tdfx.records.layer import LayerSpec, Rank, Site


class SVD(Decomposition):
    """Two layers in place of a linear layer, a 1 x 1 convolution or an embedding."""

    name = "svd"
    summary = "Linear, 1x1 conv -> two of the same; Embedding -> narrower one, Linear"
    source = "Eckart & Young 1936"

    def unsupported(self, site: Site) -> str | None:
        if site.kind != "linear" and math.prod(site.layer.kernel_size) != 1:
            return (
                f"kernel is {'x'.join(map(str, site.layer.kernel_size))}; svd takes linear layers and 1x1 convolutions"
            )
        return None

    def full_rank(self, site: Site) -> Rank:
        out_channels, *others = site.layer.weight_shape
        return (min(out_channels, math.prod(others)),)

    def chain(self, site: Site, rank: Rank) -> tuple[LayerSpec, ...]:
        layer, (r,) = site.layer, rank
        return link(
            layer,
            (spatial(layer, "reduce", layer.in_channels, r), pointwise(layer, "expand", r, layer.out_channels)),
        )

    def decompose(self, weight: Tensor, rank: Rank, *, seed: int = 0) -> Factors:
        return self.solve(weight, rank, None)

    def solve(
        self, weight: Tensor, rank: Rank, metric: Metric | None, *, seed: int = 0, draft: bool = False
    ) -> Factors:
        (r,) = rank
        ones = (1,) * (weight.dim() - 2)
        left, right = truncated(weight.flatten(1), metric, r)
        return right.reshape(r, *weight.shape[1:]), left.reshape(-1, r, *ones)

    def filters(self, factors: Sequence[Tensor]) -> Tensor:
        return factors[0]

    def guesses(self, weight: Tensor, ranks: Sequence[Rank]) -> list[float]:
        """What the truncated SVD leaves."""
        return tail_norms(thin_svd(weight.flatten(1))[1], [r for (r,) in ranks])

    def unfoldings(self, weight: Tensor) -> tuple[Tensor, ...]:
        return (weight.flatten(1),)

    def errors(
        self, weight: Tensor, ranks: Sequence[Rank], metric: Metric | None = None, *, seed: int = 0
    ) -> list[float]:
        return truncation_errors(weight.flatten(1), metric, [r for (r,) in ranks])
