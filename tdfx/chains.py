"""What takes a layer's place: factors solved for a site, the bias that belongs to them, and the chain they build."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, fx

from tdfx.decompositions import method_for
from tdfx.decompositions.base import Decomposition, Factors
from tdfx.passes.base import layer_at
from tdfx.passes.candidates import site_weight
from tdfx.passes.factorize import Replacement
from tdfx.records.candidate import Candidate
from tdfx.records.layer import Rank, Site
from tdfx.scoring import Scoring
from tdfx.weights import bias_of


@dataclass(frozen=True, eq=False)
class Solved:
    """Factors for one site.

    Attributes:
        site: the site as its chain has it.
        method: the decomposition.
        rank: its rank.
        factors: its factors.
        bias: of the chain's last layer.
        trains: whether the layer's weight requires gradients.
    """

    site: Site
    method: Decomposition
    rank: Rank
    factors: Factors
    bias: Tensor | None
    trains: bool

    @property
    def last(self) -> str:
        """Qualified name that the chain's last layer will have."""
        return f"{self.site.name}.{self.method.name}.{self.method.chain(self.site, self.rank)[-1].name}"

    def replacement(self) -> Replacement:
        """The chain, for ``Factorize``."""
        chain = self.method.build(self.site, self.rank, self.factors, self.bias)
        return Replacement(self.method.name, chain.requires_grad_(self.trains), self.factors)

    def moved(self, gain: Tensor, shift: Tensor) -> Solved:
        """With every output channel y turned into y * gain + shift."""
        *others, last = self.factors
        scaled = last * gain.reshape(-1, *[1] * (last.dim() - 1))
        assert self.bias is not None
        return replace(self, factors=(*others, scaled), bias=self.bias.double() * gain + shift)

    def error(self, weight: Tensor, scoring: Scoring) -> float:
        """In the metric, for the inputs that were seen, of the weight that the factors stand for."""
        form = scoring.form(self.site, shrink=False)
        return scoring.error(weight, weight - self.method.reconstruct(self.factors), form)


def solve(graph_module: fx.GraphModule, site: Site, candidate: Candidate, scoring: Scoring, seed: int) -> Solved:
    """Factors of a candidate that is not dense, with the bias corrected where the mean of the input is known.

    Raises:
        WeightError: the weight holds NaN or Inf.
    """
    method = method_for(site, candidate.method)
    weight, layer = site_weight(graph_module, site), layer_at(graph_module, site.name)
    factors = method.solve(weight, candidate.rank, scoring.form(site), seed=seed)
    bias = scoring.bias(site, bias_of(layer), weight - method.reconstruct(factors))
    return Solved(scoring.chained(site), method, candidate.rank, factors, bias, trains=bool(layer.weight.requires_grad))
