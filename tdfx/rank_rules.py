"""Ranks by a rule instead of a budget, as in ``ranks="vbmf"``: one rank per layer, from its weight or its shape.

- ``vbmf``: what empirical variational Bayesian matrix factorization keeps of each unfolding; 0 means dense.
- ``energy=0.95``: the least rank that keeps this share of each unfolding's squared norm.
- ``ratio=0.33``: this share of each mode's size.
- ``compression=75%``: the rank that leaves a quarter of the layer's parameters, its bias not counted.

Sources: Kim et al. 2016, section 3.2 (VBMF on the unfoldings of out and in); De Lathauwer et al. 2000 (energy of the
unfoldings).
"""

from __future__ import annotations

import difflib
import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

import torch
from torch import Tensor

from tdfx.decompositions.base import Decomposition
from tdfx.errors import OptionError
from tdfx.records.layer import Rank, Site
from tdfx.vbmf import vbmf_rank

Error = Callable[[Rank], float]
"""The norm ||W - W~||_F that a method leaves at a rank."""

ROUNDING = 1e-9  # of the norm: an error this much above what is allowed comes from the arithmetic
_EXAMPLES = {"vbmf": "vbmf", "energy": "energy=0.95", "ratio": "ratio=0.33", "compression": "compression=75%"}


@dataclass(frozen=True)
class RankRule:
    """How the rank of every layer is found.

    Attributes:
        name: "vbmf", "energy", "ratio" or "compression".
        share: what stands behind the equals sign, between 0 and 1; 0 for vbmf, which takes none.
    """

    name: str
    share: Decimal = Decimal(0)

    @classmethod
    def parse(cls, text: str) -> RankRule:
        """The rule written as e.g. "vbmf", "energy=0.95" or "compression=75%".

        Raises:
            OptionError: the text is not understood; the message says what was found and what is.
        """
        if not isinstance(text, str):
            raise _refusal(text, "expected text")
        name, equals, amount = (part.strip() for part in text.lower().partition("="))
        if name not in _EXAMPLES:
            near = difflib.get_close_matches(name, _EXAMPLES, 1)
            raise _refusal(text, f"unknown rule {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if name == "vbmf":
            if equals:
                raise _refusal(text, "vbmf takes no amount")
            return cls(name)
        try:
            share = Decimal(amount.removesuffix("%")).scaleb(-2 if amount.endswith("%") else 0)
        except InvalidOperation:
            raise _refusal(text, f"expected a share such as {_EXAMPLES[name]}") from None
        if not share.is_finite() or not 0 < share < 1:
            raise _refusal(text, "the share must be greater than 0 and less than 1, or 100%")
        return cls(name, share)

    def __str__(self) -> str:
        if not self.share:
            return self.name
        if self.name == "compression":
            return f"{self.name}={self.share.scaleb(2).normalize():f}%"
        return f"{self.name}={self.share.normalize():f}"

    def rank(self, method: Decomposition, site: Site, weight: Tensor, error: Error) -> Rank:
        """The rank for a site that the method supports, valid but for entries of 0, which vbmf may give.

        Args:
            method: whose rank it is.
            site: the place to compress.
            weight: its weight in float64.
            error: of the method at a rank, asked only where unfoldings do not tell.
        """
        if self.name == "compression":
            return _by_parameters(method, site, float(1 - self.share))
        if self.name == "vbmf":
            rank = _of_unfoldings(method, site, weight, vbmf_rank)
            return rank if 0 in rank else method.clamp(site, rank)
        if self.name == "ratio":
            return method.clamp(site, self._ratio(method, site, weight))
        rank = _of_unfoldings(method, site, weight, self._energy_rank)
        if len(rank) == 1 < len(method.unfoldings(weight)):
            rank = self._by_error(method, site, weight, error, rank[0])
        return method.clamp(site, rank)

    def _ratio(self, method: Decomposition, site: Site, weight: Tensor) -> Rank:
        sizes, matrices = method.full_rank(site), method.unfoldings(weight)
        if len(matrices) > len(sizes):
            sizes = (max(matrix.shape[-2] for matrix in matrices),)
        return tuple(round(float(self.share) * size) for size in sizes)

    def _energy_rank(self, matrix: Tensor) -> int:
        energy = torch.linalg.svdvals(matrix).square().cumsum(0)
        return int(torch.searchsorted(energy, float(self.share) * energy[-1] * (1 - ROUNDING))) + 1

    def _by_error(self, method: Decomposition, site: Site, weight: Tensor, error: Error, start: int) -> Rank:
        """The least rank whose actual error leaves the share: at least ``start`` for CP, but sought below it too."""
        (full,) = method.full_rank(site)
        # A rank that saves nothing is no use, and its error may take long to find. Costs grow with the rank.
        useless = bisect_left(range(full + 1), True, lo=1, key=lambda rank: not method.saves(site, (rank,)))
        if useless == 1:
            return (useless,)
        allowed = (math.sqrt(1 - self.share) + ROUNDING) * float(torch.linalg.vector_norm(weight))

        def keeps(rank: int) -> bool:
            return error((rank,)) <= allowed

        low, high = 0, min(start, useless - 1)
        while not keeps(high):
            if high == useless - 1:
                return (useless,)
            low, high = high, min(2 * high, useless - 1)
        return (bisect_left(range(high), True, lo=low + 1, key=keeps),)


def to_multiple(rank: Rank, multiple: int) -> Rank:
    """Each entry rounded to the nearest multiple, the larger of two as near, and at least one."""
    return tuple(multiple * max((2 * r + multiple) // (2 * multiple), 1) for r in rank)


def _of_unfoldings(method: Decomposition, site: Site, weight: Tensor, rank_of: Callable[[Tensor], int]) -> Rank:
    def most(unfolding: Tensor) -> int:
        """Of the groups, which share one rank, if the layer has any."""
        return max(map(rank_of, unfolding)) if unfolding.dim() == 3 else rank_of(unfolding)

    ranks = tuple(map(most, method.unfoldings(weight)))
    if len(ranks) == len(method.full_rank(site)):
        return ranks
    return (0,) if 0 in ranks else (max(ranks),)


def _by_parameters(method: Decomposition, site: Site, kept: float) -> Rank:
    """The rank on the ray from nothing to full rank whose factors come nearest to this share of the weight."""
    full = method.full_rank(site)
    steps = max(full)
    wanted = kept * math.prod(site.layer.weight_shape)

    def on_ray(step: int) -> Rank:
        return method.clamp(site, tuple(round(step * most / steps) for most in full))

    def parameters(step: int) -> int:
        return sum(math.prod(layer.weight_shape) for layer in method.chain(Site.of(site.layer), on_ray(step)))

    enough = bisect_left(range(steps), wanted, lo=1, key=parameters)
    return on_ray(min(max(enough - 1, 1), enough, key=lambda step: abs(parameters(step) - wanted)))


def _refusal(text: object, problem: str) -> OptionError:
    return OptionError(f"ranks is {text!r}: {problem}; expected one of {', '.join(map(repr, _EXAMPLES.values()))}")
