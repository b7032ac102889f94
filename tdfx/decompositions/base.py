"""What a decomposition is: the contract that every method file fulfils and the conformance tests check."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from tdfx.decompositions.chain import build_layer
from tdfx.decompositions.interpolation import from_knots
from tdfx.decompositions.metric import Metric, along
from tdfx.decompositions.refine import refine
from tdfx.records.layer import LayerSpec, Rank, Site

KNOTS = 5  # ranks whose errors are computed, to interpolate those of the others
POLISH = 300  # steps of refinement for what is built

Factors = tuple[Tensor, ...]


class Decomposition(ABC):
    """Replaces a layer by a chain of cheaper layers whose weights are the factors of its weight.

    Weights and factors have the layouts of torch: (out, in) for linear, (out, in / groups, *kernel) for
    convolutions; transposed ones are as the convolutions that they equal (``tdfx.transposed``). ``decompose`` takes
    and returns float64; ``build`` casts to the layer's dtype.

    Attributes:
        name: as users write it and as it stands in a plan.
        summary: one line for ``tdfx methods``: what is replaced by what.
        source: paper, section and equation.
        max_ranks: the most ranks offered for one site.
        steps: of refinement in a metric, to compare candidates.
    """

    name: str
    summary: str
    source: str
    max_ranks: int = 24
    steps: ClassVar[int] = 10

    @abstractmethod
    def unsupported(self, site: Site) -> str | None:
        """Why the method does not apply to this site, or None if it does."""

    @abstractmethod
    def full_rank(self, site: Site) -> Rank:
        """Least rank at which the method reproduces every weight of this shape."""

    @abstractmethod
    def chain(self, site: Site, rank: Rank) -> tuple[LayerSpec, ...]:
        """The layers that replace the site, first to last; names are those of the factors."""

    def chains(self, site: Site, rank: Rank) -> tuple[tuple[LayerSpec, ...], ...]:
        """A chain for each layer of a site, of which ``chain`` knows the first; the others' weights are the first's."""
        return tuple(self.chain(Site.of(layer), rank) for layer in site.layers)

    @abstractmethod
    def decompose(self, weight: Tensor, rank: Rank, *, seed: int = 0) -> Factors:
        """Factors of a float64 weight at this rank, one weight per layer of ``chain``; near in the Frobenius norm."""

    @abstractmethod
    def filters(self, factors: Sequence[Tensor]) -> Tensor:
        """Filters (q, in, *kernel) made by all factors but the last, which mixes them; only its shape counts here."""

    def reconstruct(self, factors: Sequence[Tensor]) -> Tensor:
        """The weight that the chain with these factors computes with, in the layer's layout."""
        filters = self.filters(factors)
        return (factors[-1].flatten(1) @ filters.flatten(1)).reshape(-1, *filters.shape[1:])

    def solve(
        self, weight: Tensor, rank: Rank, metric: Metric | None, *, seed: int = 0, draft: bool = False
    ) -> Factors:
        """Factors near in a metric, None for the Frobenius norm; a draft is as near as comparing candidates takes.

        Here: those of the weight with outputs and input channels made white, refined.
        """
        if metric is None:
            return self.decompose(weight, rank, seed=seed)
        first, *middle, last = self.start(metric.whitened(weight), rank, seed=seed)
        if metric.out_roots is not None:
            last = along(last, 0, metric.out_roots[1])
        start = (along(first, 1, metric.channel_roots(weight.shape[1])[1]), *middle, last)
        return self.balanced(refine(self.filters, weight, start, metric, self.steps if draft else POLISH, draft=draft))

    def start(self, weight: Tensor, rank: Rank, *, seed: int) -> Factors:
        """Factors to refine from; near, if need not be as near as those of ``decompose``."""
        return self.decompose(weight, rank, seed=seed)

    def balanced(self, factors: Factors) -> Factors:
        """The same weight from factors of equal norms, which keeps their ranges alike for quantization."""
        return balance(factors)

    def ranks(self, site: Site, multiple: int = 1) -> tuple[Rank, ...]:
        """Ranks worth offering, ascending: multiples of ``multiple`` that cost less than the dense layer."""
        (most,) = self.full_rank(site)
        grid = range(multiple, most + 1, multiple)
        # Costs grow with the rank, so those that save anything come first.
        cheaper = bisect_left(grid, True, key=lambda rank: not self.saves(site, (rank,)))
        return tuple((grid[index],) for index in spaced(0, cheaper - 1, 1, self.max_ranks))

    def grid(self, site: Site, multiple: int) -> int:
        """What ranks are to be multiples of, on a target whose grid is ``multiple``."""
        return multiple

    def ranks_below(self, site: Site, multiple: int) -> tuple[Rank, ...]:
        """Powers of two under a grid of ``multiple``, equal in all modes: the cheapest the method can be made."""
        full = self.full_rank(site)
        powers = (1 << exponent for exponent in range((multiple - 1).bit_length()))
        ranks = dict.fromkeys(tuple(min(power, most) for most in full) for power in powers)
        return tuple(rank for rank in ranks if self.saves(site, rank))

    def errors(
        self, weight: Tensor, ranks: Sequence[Rank], metric: Metric | None = None, *, seed: int = 0
    ) -> list[float]:
        """Norms of what ``solve`` leaves at each rank, of a draft, in the metric; float64 weight.

        Here: of ``KNOTS`` of the ranks, and for those between by ``guesses``.
        """

        def left(rank: Rank) -> float:
            factors = self.solve(weight, rank, metric, seed=seed, draft=True)
            return norm_in(metric, weight - self.reconstruct(factors))

        if len(ranks) <= KNOTS:
            return [left(rank) for rank in ranks]
        return from_knots(left, ranks, self.guesses(whitened(weight, metric), ranks), KNOTS)

    def guesses(self, weight: Tensor, ranks: Sequence[Rank]) -> list[float]:
        """A number for each rank that its error is about proportional to, quickly computed; not negative.

        Here for one rank R: log(2 R_max / R), near to how errors of CP fall on trained weights.
        """
        most = max(r for (r,) in ranks)
        return [math.log(2 * most / r) for (r,) in ranks]

    def shortlist(self, site: Site, weight: Tensor, ranks: Sequence[Rank]) -> tuple[Rank, ...]:
        """The ranks whose errors are worth computing for this weight, in coordinates in which it is white.

        A single rank: all. Several: the Pareto front of MACs against ``guesses``, thinned to ``max_ranks``.
        """
        if not ranks or len(ranks[0]) == 1:
            return tuple(ranks)
        return self.pareto_front(site, dict(zip(ranks, self.guesses(weight, ranks), strict=True)))

    def unfoldings(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Matrices of the weight's elements whose ranks the method's rank is about; what rank rules look at.

        One per entry of the rank, where cutting the matrix to that rank is what the method does; or, for a single
        rank that no matrix tells, several, of which the largest counts. Here, as for CP: rows out, and rows in.
        """
        return weight.flatten(1), weight.transpose(0, 1).flatten(1)

    def clamp(self, site: Site, rank: Rank) -> Rank:
        """The valid rank nearest to this one."""
        return tuple(min(max(r, 1), most) for r, most in zip(rank, self.full_rank(site), strict=True))

    def is_rank(self, site: Site, rank: Rank) -> bool:
        """Whether this is a valid rank of the method for the site."""
        full = self.full_rank(site)
        return len(rank) == len(full) and all(1 <= r <= most for r, most in zip(rank, full, strict=True))

    def build(self, site: Site, rank: Rank, factors: Sequence[Tensor], bias: Tensor | None) -> nn.Sequential:
        """The chain as ordinary layers in the site's dtype; ``bias`` goes to the last layer."""
        specs = self.chain(site, rank)
        biases = [None] * (len(specs) - 1) + [bias]
        return nn.Sequential(
            OrderedDict(
                (spec.name, build_layer(spec, weight, b))
                for spec, weight, b in zip(specs, factors, biases, strict=True)
            )
        )

    def pareto_front(self, site: Site, losses: Mapping[Rank, float]) -> tuple[Rank, ...]:
        """Ranks that no other one beats in both MACs and loss, by ascending MACs, thinned to ``max_ranks``."""
        macs = {rank: sum(layer.macs for layer in self.chain(site, rank)) for rank in losses}
        front: list[Rank] = []
        for rank in sorted(losses, key=lambda rank: (macs[rank], losses[rank], rank)):
            if not front or losses[rank] < losses[front[-1]]:
                front.append(rank)
        return tuple(front[i] for i in spaced(0, len(front) - 1, 1, self.max_ranks))

    def saves(self, site: Site, rank: Rank) -> bool:
        """Whether the chains have fewer MACs or fewer parameters than the dense layers."""
        chain = [layer for of_layer in self.chains(site, rank) for layer in of_layer]
        return sum(layer.macs for layer in chain) < sum(layer.macs for layer in site.layers) or sum(
            layer.params for layer in chain
        ) < sum(layer.params for layer in site.layers)


def spaced(least: int, most: int, step: int, count: int) -> list[int]:
    """At most ``count`` values least, least + step, ... <= most, denser at the low end (quadratic spacing)."""
    total = (most - least) // step + 1
    if total <= 0:
        return []
    if total <= count:
        return [least + step * i for i in range(total)]
    picks = {round((i / (count - 1)) ** 2 * (total - 1)) for i in range(count)}
    return [least + step * i for i in sorted(picks)]


def balance(factors: Sequence[Tensor]) -> Factors:
    """The same product with equal Frobenius norms; factors with a zero among them are returned as they are."""
    norms = [float(torch.linalg.vector_norm(factor)) for factor in factors]
    if min(norms) == 0.0:
        return tuple(factors)
    mean = math.exp(sum(map(math.log, norms)) / len(norms))
    return tuple(factor * (mean / norm) for factor, norm in zip(factors, norms, strict=True))


def norm_in(metric: Metric | None, difference: Tensor) -> float:
    """Norm of a difference of weights in a metric, None for the Frobenius norm."""
    return float(torch.linalg.vector_norm(difference)) if metric is None else metric.norm(difference)


def whitened(weight: Tensor, metric: Metric | None) -> Tensor:
    """The weight in coordinates in which the metric is near to the Frobenius norm."""
    return weight if metric is None else metric.whitened(weight)
