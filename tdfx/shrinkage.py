"""Covariances of few observations, shrunk towards a multiple of the identity.

What a few observations did not show is not impossible: a sample covariance without full rank calls whole directions
free, and factors solved in it give them up.

Source: Chen, Wiesel, Eldar and Hero 2010, equation 23 (oracle approximating shrinkage).
"""

from __future__ import annotations

import torch
from torch import Tensor


def shrunk(covariance: Tensor, observations: int | None) -> Tensor:
    """The estimate (n, n) of the true covariance from one of so many observations; None takes it as true."""
    if observations is None:
        return covariance
    size, trace, squares = len(covariance), float(covariance.trace()), float(covariance.square().sum())
    apart = squares - trace * trace / size  # zero for a multiple of the identity
    share = 1.0
    if apart > 0:
        share = min(((1 - 2 / size) * squares + trace * trace) / ((observations + 1 - 2 / size) * apart), 1.0)
    identity = torch.eye(size, dtype=covariance.dtype, device=covariance.device)
    return (1 - share) * covariance + share * trace / size * identity
