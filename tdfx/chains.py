"""What takes a layer's place: factors solved for a site, the bias that belongs to them, and the chain they build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn

from tdfx.decompositions import method_for
from tdfx.decompositions.base import Decomposition, Factors
from tdfx.passes.base import layer_at
from tdfx.passes.candidates import site_weight
from tdfx.passes.factorize import Replacement
from tdfx.records.candidate import Candidate
from tdfx.records.layer import LayerSpec, Rank, Site
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
        bias: of the (first) chain's last layer.
        trains: whether the layer's weight requires gradients.
        biases: of the last layers of the other chains, where several layers share the weight.
    """

    site: Site
    method: Decomposition
    rank: Rank
    factors: Factors
    bias: Tensor | None
    trains: bool
    biases: tuple[Tensor | None, ...] = ()

    @property
    def last(self) -> str:
        """Qualified name that the chain's last layer will have."""
        return f"{self.site.name}.{self.method.name}.{self.method.chain(self.site, self.rank)[-1].name}"

    def replacements(self) -> dict[str, Replacement]:
        """The chains, for ``Factorize``, by the name of the layer; they share their weights."""
        first = self.method.build(self.site, self.rank, self.factors, self.bias).requires_grad_(self.trains)
        found = {self.site.name: Replacement(self.method.name, first, self.factors)}
        for layer, bias in zip(self.site.layers[1:], self.biases, strict=True):
            found[layer.name] = self._tied(layer, bias, first)
        return found

    def _tied(self, layer: LayerSpec, bias: Tensor | None, first: nn.Sequential) -> Replacement:
        """The chain of a layer whose weight is the first one's, or that transposed, with the first chain's weights."""
        turned = self.site.is_turned(layer)
        factors = tuple(factor.T for factor in reversed(self.factors)) if turned else self.factors
        chain = self.method.build(Site.of(layer), self.rank, factors, bias).requires_grad_(self.trains)
        sources = list(first.named_children())
        read = {}
        for (name, factor), (source, held) in zip(
            chain.named_children(), reversed(sources) if turned else sources, strict=True
        ):
            if turned and isinstance(factor, nn.Linear) and isinstance(held, nn.Linear):
                read[name] = f"{self.site.name}.{self.method.name}.{source}.weight"
            else:  # a table has the layout of the weight of a linear layer to its rows
                factor.weight = held.weight
        return Replacement(self.method.name, chain, factors, read)

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
    trains = bool(layer.weight.requires_grad)
    biases = biases_of(graph_module, site)
    return Solved(scoring.chained(site), method, candidate.rank, factors, bias, trains, biases)


def biases_of(graph_module: fx.GraphModule, site: Site) -> tuple[Tensor | None, ...]:
    """The biases of all layers of a site but the first."""
    return tuple(bias_of(layer_at(graph_module, layer.name)) for layer in site.layers[1:])


def replacements_of(solved: Mapping[str, Solved]) -> dict[str, Replacement]:
    """The chains of all solved sites, by the name of the layer."""
    return {name: chain for entry in solved.values() for name, chain in entry.replacements().items()}
