"""Covariances of few observations, shrunk towards a multiple of the identity.

What a few observations did not show is not impossible: a sample covariance without full rank calls whole directions
free, and factors solved in it give them up.

Of how often rows of a table are looked up, each row gets half a lookup more: rows that were never seen stay what they
are as far as others leave room.

Sources: Chen, Wiesel, Eldar and Hero 2010, equation 23 (oracle approximating shrinkage); Krichevsky and Trofimov 1981
(half a count more).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tdfx.decompositions.metric import diagonal_blocks


def shrunk(covariance: Tensor, observations: int | None, groups: int = 1) -> Tensor:
    """The estimate of the true covariance from one of so many observations; None takes it as true.

    Args:
        covariance: (n, n), its diagonal blocks (groups, n / groups, n / groups), or the diagonal of lookups, (n,).
        observations: how many there were.
        groups: diagonal blocks that are estimated one by one; what lies between two shrinks with both.
    """
    if observations is None:
        return covariance
    if covariance.dim() == 1:
        share = len(covariance) / (len(covariance) + 2 * observations)
        return (1 - share) * covariance + share * covariance.mean()
    blocks = diagonal_blocks(covariance, groups)
    size = blocks.shape[1]
    shares = torch.stack([_share(block, observations) for block in blocks])
    kept, added = 1 - shares, shares * blocks.diagonal(dim1=1, dim2=2).mean(1)
    if covariance.dim() == 3:
        found = kept[:, None, None] * covariance
        found.diagonal(dim1=1, dim2=2).add_(added[:, None])
        return found
    roots = kept.sqrt().repeat_interleave(size)
    found = roots[:, None] * roots * covariance if groups > 1 else kept * covariance
    found.diagonal().add_(added.repeat_interleave(size))
    return found


def _share(covariance: Tensor, observations: int) -> Tensor:
    """Of the identity in the estimate."""
    size, trace, squares = len(covariance), covariance.trace(), covariance.square().sum()
    apart = squares - trace * trace / size  # zero for a multiple of the identity
    if not apart > 0:
        return torch.zeros_like(trace)
    return (((1 - 2 / size) * squares + trace * trace) / ((observations + 1 - 2 / size) * apart)).clamp_max(1.0)
