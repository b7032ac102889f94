"""One weight that several layers share, each with a metric of its own: the errors of all uses add up.

The best factors of a weight W in a sum of two metrics have no closed form. Each use alone has one, a truncated SVD in
coordinates of its own; of these the one is taken that leaves least in all uses together. What W = L R leaves when it
is cut to rank r is D = L_t R_t, t the components from r on, and tr(G D S D^T) is the sum over t x t of the element-wise
product of L^T G L and R S R^T: one matrix gives the errors of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdfx.decompositions.metric import Metric, metric_svd, times
from tdfx.decompositions.spectrum import tail_norms


@dataclass(frozen=True, eq=False)
class TiedMetric(Metric):
    """The sum of the metrics of all uses; the attributes of a ``Metric`` are those of the first.

    Attributes:
        uses: metric of each layer, and whether its weight is the first one's transposed.
    """

    uses: tuple[tuple[Metric, bool], ...] = ()

    @classmethod
    def of(cls, uses: Sequence[tuple[Metric, bool]]) -> TiedMetric:
        """The metric of these uses."""
        return cls(uses[0][0].in_cov, uses[0][0].out_cov, uses=tuple(uses))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(tensor for form, _ in self.uses for tensor in form.tensors)

    def norm(self, difference: Tensor) -> float:
        return math.hypot(*(form.norm(difference.T if turned else difference) for form, turned in self.uses))

    def whitened(self, weight: Tensor) -> Tensor:
        """The weight as it is: no coordinates are white for all uses."""
        return weight

    def solutions(self, matrix: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Left (out, k), right (k, n) of every use's own SVD, and the norms that cutting them at 0, 1, ... k leaves."""
        found = []
        for form, turned in self.uses:
            left, right, _ = metric_svd(matrix.T if turned else matrix, form)
            left, right = (right.T, left.T) if turned else (left, right)
            products = sum((_products(left, right, *use) for use in self.uses), start=torch.zeros(()))
            tails = products.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
            found.append((left, right, torch.cat([tails, tails.new_zeros(1)]).clamp_min(0).sqrt()))
        return found


def truncated(matrix: Tensor, metric: Metric | None, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (out, rank) and (rank, n) of a matrix: the best in a metric, or the best of ``TiedMetric.solutions``."""
    if isinstance(metric, TiedMetric):
        left, right, _ = min(metric.solutions(matrix), key=lambda solution: float(solution[2][rank]))
    else:
        left, right, _ = metric_svd(matrix, metric)
    return left[:, :rank], right[:rank]


def truncation_errors(matrix: Tensor, metric: Metric | None, ranks: Sequence[int]) -> list[float]:
    """What ``truncated`` leaves at each rank, in the metric."""
    if isinstance(metric, TiedMetric):
        least = torch.stack([tails for _, _, tails in metric.solutions(matrix)]).amin(0)
        return [float(least[rank]) for rank in ranks]
    return tail_norms(metric_svd(matrix, metric)[2], list(ranks))


def _products(left: Tensor, right: Tensor, form: Metric, turned: bool) -> Tensor:
    """By pairs of components, what they add to the square of the norm in one use."""
    outer, inner = (right, left.T) if turned else (left.T, right)
    of_outputs = outer @ outer.T if form.out_cov is None else times(outer, form.out_cov) @ outer.T
    return of_outputs * (times(inner, form.in_cov) @ inner.T)
