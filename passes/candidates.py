"""The choices for every site: method, rank, cost and error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, fx

from tdfx.cache import ListCache, sources_digest
from tdfx.decompositions.base import Decomposition, whitened
from tdfx.decompositions.grouped import in_groups
from tdfx.decompositions.metric import Metric
from tdfx.errors import OptionError, WeightError
from tdfx.fingerprint import tensor_digest
from tdfx.metrics import error_of
from tdfx.parallel import as_done
from tdfx.passes.base import AnalysisPass, layer_at
from tdfx.rank_rules import RankRule, to_multiple
from tdfx.records.candidate import DENSE, SLOWER_ESTIMATED, Candidate, format_rank
from tdfx.records.cost import Cost
from tdfx.records.layer import Rank, Site, Skipped
from tdfx.scoring import Scoring
from tdfx.selection import Selection
from tdfx.targets import Target, layer_cost, site_cost
from tdfx.version import VERSION
from tdfx.weights import weight_of

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class FindCandidates(AnalysisPass[tuple[tuple[Candidate, ...], tuple[Skipped, ...]]]):
    """Candidates of all sites, and the sites that no method can make cheaper, with reasons.

    Always offered are "dense" and ranks on the grid that the target's estimate does not put slower than dense, of
    embeddings all ranks on the grid. Others carry a caveat: ranks below the grid and chains slower than dense, for
    budgets that nothing else reaches. With a rank rule the rank that it gives is a site's only candidate.

    Attributes:
        sites: where to look.
        selection: methods and ranks by site.
        scoring: what errors are measured in.
        target: whose latency is estimated, or None.
        rank_multiple: the grid.
        seed: of the decompositions.
        cache: keeps errors by weight, method and ranks.
        progress: called with a description, steps done and steps in all.
        rule: gives the rank of each site, rounded to ``rank_multiple``; None to offer many.
    """

    sites: tuple[Site, ...]
    selection: Selection
    scoring: Scoring
    target: Target | None
    rank_multiple: int
    seed: int
    cache: ListCache
    progress: Progress = field(default=lambda description, done, total: None)
    rule: RankRule | None = None

    def apply(self, graph_module: fx.GraphModule) -> tuple[tuple[Candidate, ...], tuple[Skipped, ...]]:
        work = partial(self._of_site, graph_module)
        largest_first = sorted(self.sites, key=lambda site: site.layer.params, reverse=True)
        found: dict[str, tuple[tuple[Candidate, ...], str]] = {}
        total = len(self.sites)
        self.progress("decomposing", 0, total)
        for site, of_site in as_done(work, largest_first):
            found[site.name] = of_site
            self.progress(f"decomposed {site.name}", len(found), total)
        return (
            tuple(candidate for site in self.sites for candidate in found[site.name][0]),
            tuple(Skipped(site.name, reason) for site in self.sites if (reason := found[site.name][1])),
        )

    def _of_site(self, graph_module: fx.GraphModule, site: Site) -> tuple[tuple[Candidate, ...], str]:
        """Candidates of a site; and if there are none, why."""
        weight = site_weight(graph_module, site)
        metric = self.scoring.metric
        pinned = self.selection.rank_for(site)
        obstacle = self.scoring.obstacle(site)
        if obstacle is not None:
            return (), f"{metric} needs moments of its inputs: {obstacle}"
        dense = Candidate(site.name, DENSE, (), site_cost(site, self.target), 0.0, metric)
        factored, reasons = self._factored(site, weight, dense.cost, pinned)
        if pinned is not None and not factored:
            raise OptionError(f"overrides: no method takes rank {format_rank(pinned)} at {site.name}: {reasons}")
        if not factored:
            return (), reasons
        return ((dense, *factored) if pinned is None and self.rule is None else tuple(factored)), ""

    def _factored(self, site: Site, weight: Tensor, dense: Cost, pinned: Rank | None) -> tuple[list[Candidate], str]:
        """Candidates other than dense; and if there are none, why."""
        found: list[Candidate] = []
        reasons = []
        form, chained = self.scoring.form(site), self.scoring.chained(site)
        for method in (in_groups(method, site.layer.groups) for method in self.selection.methods_for(site)):
            refusal = method.unsupported(site)
            ranks, reason = ((), refusal) if refusal else self._ranks(method, site, weight, pinned)
            if not ranks:
                reasons.append(reason)
                continue
            norms = self._norms(method, site, weight, ranks, form)
            for rank, norm in zip(ranks, norms, strict=True):
                cost = chain_cost(method, chained, rank, self.target)
                error = error_of(self.scoring.metric, norm, weight, form)
                caveat = "" if pinned else self._caveat(rank, method.grid(site, self.rank_multiple), cost, dense)
                found.append(Candidate(site.name, method.name, rank, cost, error, self.scoring.metric, caveat))
        return found, "; ".join(reasons)

    def _ranks(
        self, method: Decomposition, site: Site, weight: Tensor, pinned: Rank | None
    ) -> tuple[tuple[Rank, ...], str]:
        """The ranks to offer, and why there are none if so."""
        none_fits = f"no rank of {method.name} fits or saves anything"
        if pinned is not None:
            return (pinned,) if method.is_rank(site, pinned) else (), none_fits
        if self.rule is not None:
            return self._ruled(self.rule, method, site, weight)
        white = whitened(weight, self.scoring.form(site))
        grid = method.grid(site, self.rank_multiple)
        on_grid = method.shortlist(site, white, method.ranks(site, grid))
        return tuple(dict.fromkeys((*method.ranks_below(site, grid), *on_grid))), none_fits

    def _ruled(self, rule: RankRule, method: Decomposition, site: Site, weight: Tensor) -> tuple[tuple[Rank, ...], str]:
        rank = rule.rank(method, site, weight, lambda rank: self._norms(method, site, weight, (rank,), None)[0])
        if 0 in rank:
            return (), f"ranks={rule} finds only noise (rank {format_rank(rank)} of {method.name})"
        rank = method.clamp(site, to_multiple(rank, method.grid(site, self.rank_multiple)))
        if not method.saves(site, rank):
            return (
                (),
                f"rank {format_rank(rank)} of {method.name}, from ranks={rule}, saves neither MACs nor parameters",
            )
        return (rank,), ""

    def _norms(
        self, method: Decomposition, site: Site, weight: Tensor, ranks: tuple[Rank, ...], form: Metric | None
    ) -> list[float]:
        code = sources_digest("tdfx.decompositions")
        covariances = () if form is None else form.tensors
        digests = tuple(None if tensor is None else tensor_digest(tensor) for tensor in (weight, *covariances))
        key = (VERSION, torch.__version__, code, method.name, site.layer.groups, digests, ranks, self.seed)
        return self.cache.get(key, len(ranks), lambda: method.errors(weight, ranks, form, seed=self.seed))

    def _caveat(self, rank: Rank, grid: int, cost: Cost, dense: Cost) -> str:
        off_grid = self.rule is None and any(r % grid for r in rank)
        caveats = [f"rank off the grid of {grid}"] if off_grid else []
        is_lookup = not dense.macs  # whose chain is slower always, by little, and is for size alone
        if is_lookup or cost.latency_s is None or dense.latency_s is None:
            return " and ".join(caveats)
        if cost.latency_s >= dense.latency_s:
            caveats.append(SLOWER_ESTIMATED)
        return " and ".join(caveats)


def chain_cost(method: Decomposition, site: Site, rank: Rank, target: Target | None) -> Cost:
    """Cost of the chains that a method puts in a site's place."""
    first, *others = (layer_cost(layer, target) for chain in method.chains(site, rank) for layer in chain)
    return sum(others, start=first)


def site_weight(graph_module: fx.GraphModule, site: Site) -> Tensor:
    """The weight of a site's layer in float64, in the layout of its specification.

    Raises:
        WeightError: it holds NaN or Inf.
    """
    weight = weight_of(layer_at(graph_module, site.name))
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise WeightError(
            f"layer {site.name}: {bad} of {weight.numel()} weights are NaN or Inf; repair the checkpoint or exclude "
            "the layer"
        )
    return weight.double()
