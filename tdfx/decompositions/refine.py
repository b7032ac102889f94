"""Refinement of factors in a metric, whatever the method.

The last factor of every method mixes filters that the others make: W~ = A K, K (q, n) the filters. Given K, the best A
is a least-squares solution, A = W S K^T (K S K^T)^-1, whatever the weights of the outputs. What remains is a function
of the other factors alone, whose gradient is that at the best A; L-BFGS minimises it, in coordinates in which the
input channels are white.

Source: Golub and Pereyra 1973, section 2 (variable projection); Byrd et al. 1995 for L-BFGS-B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from tdfx.decompositions.metric import Metric

WORK = 1e9  # floating-point operations of a step in the products with S; where one takes more, fewer are made
DAMPING = {torch.float64: 1e-9, torch.float32: 1e-6}  # of the mean diagonal of K S K^T, by precision of the products
LEAST_GAIN = 1e-6  # of a step, as a share of the weight's own norm, squared

Factors = tuple[Tensor, ...]
Filters = Callable[[Sequence[Tensor]], Tensor]
Vector = NDArray[np.float64]


def along(tensor: Tensor, dim: int, matrix: Tensor) -> Tensor:
    """The tensor with a matrix applied to one of its dimensions."""
    applied: Tensor = torch.tensordot(matrix, tensor, ([1], [dim])).movedim(0, dim)
    return applied


def refine(
    filters: Filters, weight: Tensor, factors: Sequence[Tensor], metric: Metric, steps: int, *, draft: bool = False
) -> Factors:
    """Factors at least as near to a float64 weight (out, in, *kernel) in the metric as those given.

    Args:
        filters: of a method, (q, in, *kernel) of all factors; the last one's values do not matter.
        weight: the weight.
        factors: where to start; the first has the input channels in dimension 1, the last the outputs in dimension 0.
        metric: the form to minimise.
        steps: of L-BFGS at most; fewer where they cost much.
        draft: solve for the last factor in the precision of the steps, which is single where the weight is large.
    """
    *others, last = factors
    shapes = [tuple(factor.shape) for factor in others]
    root, inverse = metric.channel_roots(weight.shape[1])
    problem = _Projection(weight, metric)
    start = [along(others[0], 1, root), *others[1:]]
    scales = [float(torch.linalg.vector_norm(factor)) or 1.0 for factor in start]

    def expand(vector: Vector) -> list[Tensor]:
        parts = np.split(vector, np.cumsum([np.prod(shape, dtype=int) for shape in shapes])[:-1])
        return [
            torch.from_numpy(part).reshape(shape) * scale
            for part, shape, scale in zip(parts, shapes, scales, strict=True)
        ]

    def colour(white: Sequence[Tensor]) -> list[Tensor]:
        return [along(white[0], 1, inverse), *white[1:]]

    def value_and_gradient(vector: Vector) -> tuple[float, Vector]:
        white = [factor.requires_grad_(True) for factor in expand(vector)]
        made = filters((*colour(white), last)).flatten(1)
        value, gradient = problem.value_and_gradient(made.detach())
        gradients = torch.autograd.grad(made, white, gradient)
        flat = [(g * scale).reshape(-1).numpy() for g, scale in zip(gradients, scales, strict=True)]
        return value, np.concatenate(flat)

    def left(factors: Factors) -> float:
        made = factors[-1].flatten(1) @ filters(factors).flatten(1)
        return metric.norm(weight.flatten(1) - made)

    flat = np.concatenate([(f / scale).reshape(-1).numpy() for f, scale in zip(start, scales, strict=True)])
    work = 2 * weight[0].numel() ** 2 * last[0].numel()
    most = min(steps, int(steps * WORK / work))
    if most:
        options = {"maxiter": most, "maxcor": 20, "ftol": LEAST_GAIN, "gtol": 0.0}
        flat = minimize(value_and_gradient, flat, jac=True, method="L-BFGS-B", options=options).x
    refined = colour(expand(flat))
    mixing = problem.mixing(filters((*refined, last)).flatten(1), draft)
    return min(tuple(factors), (*refined, mixing.reshape(last.shape)), key=left)


class _Projection:
    """Least squares for the mixing matrix, and what it leaves as a function of the filters."""

    def __init__(self, weight: Tensor, metric: Metric) -> None:
        self.metric = metric
        self.crossed, self.weighted, self.total = _crossed(weight, metric)

    def mixing(self, filters: Tensor, draft: bool) -> Tensor:
        """The best A, (out, q)."""
        _, factor = self._normal(filters, draft)
        return torch.cholesky_solve(filters @ self.crossed.T, factor).T

    def value_and_gradient(self, filters: Tensor) -> tuple[float, Tensor]:
        """Share of the weight's squared norm that is left, and its gradient (q, n)."""
        product, factor = self._normal(filters, True)
        right = filters @ self.weighted.T  # (q, out)
        mixing = torch.cholesky_solve(right, factor)
        value = 1 - float((right * mixing).sum()) / self.total
        return value, (mixing @ (mixing.T @ product - self.weighted)) * (2 / self.total)

    def _normal(self, filters: Tensor, draft: bool) -> tuple[Tensor, Tensor]:
        product = self.metric.times_in_cov(filters) if draft else filters @ self.metric.in_cov
        product = product + self.metric.floor * filters
        gram = product @ filters.T
        damping = DAMPING[torch.float32 if draft and self.metric.is_large else torch.float64]
        gram.diagonal().add_(damping * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
        return product, torch.linalg.cholesky(gram)


@lru_cache(maxsize=1)  # all methods and ranks of a site ask for it in turn
def _crossed(weight: Tensor, metric: Metric) -> tuple[Tensor, Tensor, float]:
    """W S (out, n), with S floored; G^1/2 W S; and tr(G W S W^T)."""
    matrix = weight.flatten(1)
    crossed = matrix @ metric.in_cov + metric.floor * matrix
    if metric.out_roots is None:
        return crossed, crossed, float((crossed * matrix).sum()) or 1.0
    root = metric.out_roots[0]
    weighted = root @ crossed
    return crossed, weighted, float((weighted * (root @ matrix)).sum()) or 1.0
