"""Any method for convolutions in groups: each group's weight factorized by itself, all at one rank.

The weight of a convolution in g groups is g weights (out / g, in / g, *kernel), one after another along the outputs.
Their factors, put one after another in the same way, are the weights of convolutions in g times as many groups as the
method's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from tdfx.decompositions.base import Decomposition, Factors
from tdfx.decompositions.chain import link
from tdfx.decompositions.metric import Metric
from tdfx.records.layer import LayerSpec, Rank, Site


@cache
def in_groups(method: Decomposition, groups: int) -> Decomposition:
    """The method for layers in so many groups; itself for one."""
    return method if groups == 1 else Grouped(method, groups)


class Grouped(Decomposition):
    """A method for convolutions in ``groups`` groups; its names, ranks and factors are those of the method.

    Attributes:
        method: what each group's weight is factorized by.
        groups: of the layer; at least 2.
    """

    def __init__(self, method: Decomposition, groups: int) -> None:
        self.method, self.groups = method, groups
        self.name, self.summary, self.source = method.name, method.summary, method.source
        self.max_ranks = method.max_ranks

    def unsupported(self, site: Site) -> str | None:
        part = self._part(site)
        refusal = self.method.unsupported(part)
        if refusal is not None or part.layer.in_channels > 1:
            return refusal
        first, *_, last = self.method.chain(part, self.method.clamp(part, (1,) * len(self.method.full_rank(part))))
        if math.prod(first.kernel_size) == 1 or (part.layer.out_channels == 1 and math.prod(last.kernel_size) == 1):
            return f"{self.name} mixes the channels of a group, and each of the {self.groups} groups has only one"
        return None

    def full_rank(self, site: Site) -> Rank:
        return self.method.full_rank(self._part(site))

    def chain(self, site: Site, rank: Rank) -> tuple[LayerSpec, ...]:
        specs = self.method.chain(self._part(site), rank)
        return link(site.layer, [replace(self._widened(spec), bias=False, calls=()) for spec in specs])

    def ranks(self, site: Site, multiple: int = 1) -> tuple[Rank, ...]:
        return self.method.ranks(self._part(site), multiple)

    def grid(self, site: Site, multiple: int) -> int:
        """1 where a group has fewer channels than the grid: no rank puts such a layer on it."""
        return multiple if min(self._part(site).layer.weight_shape[:2]) >= multiple else 1

    def clamp(self, site: Site, rank: Rank) -> Rank:
        return self.method.clamp(self._part(site), rank)

    def is_rank(self, site: Site, rank: Rank) -> bool:
        return self.method.is_rank(self._part(site), rank)

    def decompose(self, weight: Tensor, rank: Rank, *, seed: int = 0) -> Factors:
        return self.solve(weight, rank, None, seed=seed)

    def solve(
        self, weight: Tensor, rank: Rank, metric: Metric | None, *, seed: int = 0, draft: bool = False
    ) -> Factors:
        """Each group's factors are near in the metric's block of that group."""
        solved = (
            self.method.solve(part, rank, form, seed=seed, draft=draft)
            for part, form in zip(self._split(weight), self._forms(metric), strict=True)
        )
        return tuple(torch.cat(factors) for factors in zip(*solved, strict=True))

    def filters(self, factors: Sequence[Tensor]) -> Tensor:
        return torch.cat([self.method.filters(own) for own in self._split_all(factors)])

    def reconstruct(self, factors: Sequence[Tensor]) -> Tensor:
        return torch.cat([self.method.reconstruct(own) for own in self._split_all(factors)])

    def errors(
        self, weight: Tensor, ranks: Sequence[Rank], metric: Metric | None = None, *, seed: int = 0
    ) -> list[float]:
        """Of all groups together: squares add up, unless the metric has terms across groups."""
        if metric is not None and metric.crosses_groups:
            return super().errors(weight, ranks, metric, seed=seed)
        pairs = zip(self._split(weight), self._forms(metric), strict=True)
        return _norms([self.method.errors(part, ranks, form, seed=seed) for part, form in pairs])

    def guesses(self, weight: Tensor, ranks: Sequence[Rank]) -> list[float]:
        return _norms([self.method.guesses(part, ranks) for part in self._split(weight)])

    def unfoldings(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Those of the groups stacked, (groups, rows, columns)."""
        of_groups = (self.method.unfoldings(part) for part in self._split(weight))
        return tuple(torch.stack(matrices) for matrices in zip(*of_groups, strict=True))

    def _part(self, site: Site) -> Site:
        """The layer that one group is."""
        layer = site.layer
        shapes = (call.input_shape for call in layer.calls)
        channels, dims = layer.in_channels // self.groups, len(layer.kernel_size)
        part = replace(
            layer,
            in_channels=channels,
            out_channels=layer.out_channels // self.groups,
            groups=layer.groups // self.groups,
        )
        return Site.of(part.called_on(tuple((*shape[: -dims - 1], channels, *shape[-dims:]) for shape in shapes)))

    def _widened(self, spec: LayerSpec) -> LayerSpec:
        return replace(
            spec,
            in_channels=spec.in_channels * self.groups,
            out_channels=spec.out_channels * self.groups,
            groups=spec.groups * self.groups,
        )

    def _forms(self, metric: Metric | None) -> Sequence[Metric | None]:
        return (None,) * self.groups if metric is None else metric.parts

    def _split(self, weight: Tensor) -> tuple[Tensor, ...]:
        return weight.chunk(self.groups)

    def _split_all(self, factors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        return list(zip(*map(self._split, factors), strict=True))


def _norms(of_groups: Sequence[Sequence[float]]) -> list[float]:
    """By rank, the norm of what the groups have."""
    return [math.hypot(*values) for values in zip(*of_groups, strict=True)]
