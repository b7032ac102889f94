"""Covariances of few observations, shrunk towards a multiple of the identity.

What a few observations did not show is not impossible: a sample covariance without full rank calls whole directions
free, and factors solved in it give them up.

Source: Chen, Wiesel, Eldar and Hero 2010, equation 23 (oracle approximating shrinkage).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tdfx.decompositions.metric import diagonal_blocks


def shrunk(covariance: Tensor, observations: int | None, groups: int = 1) -> Tensor:
    """The estimate of the true covariance from one of so many observations; None takes it as true.

    Args:
        covariance: (n, n), or its diagonal blocks (groups, n / groups, n / groups).
        observations: how many there were.
        groups: diagonal blocks that are estimated one by one; what lies between two shrinks with both.
    """
    if observations is None:
        return covariance
    blocks = diagonal_blocks(covariance, groups)
    shares = torch.stack([_share(block, observations) for block in blocks])
    means = blocks.diagonal(dim1=1, dim2=2).mean(1)
    if covariance.dim() == 3:
        kept, added = (
            (1 - shares)[:, None, None] * covariance,
            torch.diag_embed((shares * means)[:, None].expand(blocks.shape[:2])),
        )
        return kept + added
    kept = (1 - shares).sqrt().repeat_interleave(blocks.shape[1])
    return kept[:, None] * kept * covariance + torch.diag((shares * means).repeat_interleave(blocks.shape[1]))


def _share(covariance: Tensor, observations: int) -> Tensor:
    """Of the identity in the estimate."""
    size, trace, squares = len(covariance), covariance.trace(), covariance.square().sum()
    apart = squares - trace * trace / size  # zero for a multiple of the identity
    if not apart > 0:
        return torch.zeros_like(trace)
    return (((1 - 2 / size) * squares + trace * trace) / ((observations + 1 - 2 / size) * apart)).clamp_max(1.0)
