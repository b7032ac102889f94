"""Refinement of factors in a metric, whatever the method.

The last factor of every method mixes filters that the others make: W~ = A K, K (q, n) the filters. Given K, the best A
is a least-squares solution, A = W S K^T (K S K^T)^-1, whatever the weights of the outputs. What remains is a function
of the other factors alone, whose gradient is that at the best A; L-BFGS minimises it, in coordinates in which the
input channels are white.

Source: Golub and Pereyra 1973, section 2 (variable projection); Byrd et al. 1995 for L-BFGS-B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from tdfx.decompositions.metric import Metric, along
from tdfx.parallel import last_call

WORK = 5e8  # floating-point operations of a step in the products with S; where one takes more, fewer are made
SINGLE = 512  # columns of the weight from which drafts are in float32
DAMPING = {torch.float64: 1e-9, torch.float32: 1e-6}  # of the mean diagonal of K S K^T, by precision of K S
LEAST_GAIN = 1e-6  # of a step, as a share of the weight's own norm, squared

Factors = tuple[Tensor, ...]
Filters = Callable[[Sequence[Tensor]], Tensor]
Vector = NDArray[np.float64]


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
        draft: to compare ranks by; in single precision where the weight is large, which no finer steps stand.
    """
    *others, last = factors
    shapes = [tuple(factor.shape) for factor in others]
    root, inverse = metric.channel_roots(weight.shape[1])
    is_single = draft and len(metric.in_cov) >= SINGLE
    problem = _Projection(weight, metric, torch.float32 if is_single else torch.float64)
    start = [along(others[0], 1, root), *others[1:]]

    def expand(vector: Vector, dtype: torch.dtype) -> list[Tensor]:
        parts = np.split(vector, np.cumsum([np.prod(shape, dtype=int) for shape in shapes])[:-1])
        return [torch.from_numpy(part).to(dtype).reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def colour(white: Sequence[Tensor]) -> list[Tensor]:
        return [along(white[0], 1, inverse.to(white[0])), *white[1:]]

    def value_and_gradient(vector: Vector) -> tuple[float, Vector]:
        white = [factor.requires_grad_(True) for factor in expand(vector, problem.dtype)]
        made = filters((*colour(white), last)).flatten(1)
        value, gradient = problem.value_and_gradient(made.detach())
        gradients = torch.autograd.grad(made, white, gradient)
        return value, np.concatenate([g.double().reshape(-1).numpy() for g in gradients])

    def left(factors: Factors) -> float:
        made = factors[-1].flatten(1) @ filters(factors).flatten(1)
        return metric.norm(weight.flatten(1) - made)

    # The last factor takes up the norms of the others.
    flat = np.concatenate([(f / (float(torch.linalg.vector_norm(f)) or 1.0)).reshape(-1).numpy() for f in start])
    work = 2 * weight[0].numel() ** 2 * last[0].numel()
    most = min(steps, int(steps * WORK / work))
    if most:
        options = {"maxiter": most, "maxcor": 20, "ftol": LEAST_GAIN, "gtol": 0.0}
        flat = minimize(value_and_gradient, flat, jac=True, method="L-BFGS-B", options=options).x
    refined = colour(expand(flat, torch.float64))
    mixing = problem.mixing(filters((*refined, last)).flatten(1), draft)
    found = (*refined, mixing.reshape(last.shape))
    return found if draft else min(tuple(factors), found, key=left)


class _Projection:
    """Least squares for the mixing matrix, and what it leaves as a function of the filters.

    Attributes:
        dtype: of the filters that the function and its gradient are wanted for.
        precision: of their products with S.
    """

    def __init__(self, weight: Tensor, metric: Metric, dtype: torch.dtype) -> None:
        self.metric, self.dtype = metric, dtype
        self.precision = torch.float32 if metric.is_large else dtype
        self.crossed, weighted = _crossed(weight, metric)
        self.weighted = weighted.to(dtype)

    def mixing(self, filters: Tensor, draft: bool) -> Tensor:
        """The best A, (out, q), for float64 filters."""
        if draft:
            _, factor = self._normal(filters, self.metric.times_in_cov(filters), self.precision)
        else:
            _, factor = self._normal(filters, filters @ self.metric.in_cov, torch.float64)
        return torch.cholesky_solve(filters @ self.crossed.T, factor).T

    def value_and_gradient(self, filters: Tensor) -> tuple[float, Tensor]:
        """Share of the weight's squared norm that is left, and its gradient (q, n)."""
        product, factor = self._normal(filters, self.metric.times_in_cov(filters), self.precision)
        right = filters @ self.weighted.T  # (q, out)
        mixing = torch.cholesky_solve(right.double(), factor)
        value = 1 - float((right * mixing).sum())
        mixing = mixing.to(self.dtype)
        return value, 2 * (mixing @ (mixing.T @ product - self.weighted))

    def _normal(self, filters: Tensor, product: Tensor, precision: torch.dtype) -> tuple[Tensor, Tensor]:
        """K S and the Cholesky factor of K S K^T, S floored."""
        product = product + self.metric.floor * filters
        gram = (product @ filters.T).double()
        gram.diagonal().add_(DAMPING[precision] * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
        return product, torch.linalg.cholesky(gram)


@last_call  # all methods and ranks of a site ask for it in turn
def _crossed(weight: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """W S (out, n), with S floored; G^1/2 W S for a weight of unit norm."""
    matrix = weight.flatten(1)
    crossed = matrix @ metric.in_cov + metric.floor * matrix
    root = None if metric.out_roots is None else metric.out_roots[0]
    weighted, colored = (crossed, matrix) if root is None else (root @ crossed, root @ matrix)
    total = float((weighted * colored).sum())
    return crossed, weighted / (math.sqrt(total) if total > 0 else 1.0)
