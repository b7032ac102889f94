"""What planning needs to know of a model: sites, candidates with costs and errors, and what stays as it is."""

from __future__ import annotations

from dataclasses import dataclass

from tdfx.records.candidate import Candidate
from tdfx.records.cost import Cost
from tdfx.records.layer import Site, Skipped


@dataclass(frozen=True)
class Profile:
    """Everything a planner sees; no weights.

    Attributes:
        sites: the places to compress, in order of execution.
        candidates: all choices for all sites. Those with a caveat are for budgets not reachable without them.
        skipped: layers left as they are, with reasons.
        before: cost of the whole model as given.
        rest: cost of everything but the sites, in the form the result will have.
        metric: of the candidates' errors.
        target: name of the target, or None.
        rank_multiple: grid of the ranks without a caveat.
        trainable: whether BatchNorm and Dropout are kept.
        seed: of the decompositions.
        latency_source: "estimated", "measured", or None without a target.
        structure: fingerprint of the model's structure.
        weights: fingerprint of its weights.
    """

    sites: tuple[Site, ...]
    candidates: tuple[Candidate, ...]
    skipped: tuple[Skipped, ...]
    before: Cost
    rest: Cost
    metric: str
    target: str | None
    rank_multiple: int
    trainable: bool
    seed: int
    latency_source: str | None
    structure: str
    weights: str

    def of_site(self, name: str) -> tuple[Candidate, ...]:
        """The candidates of one site."""
        return tuple(candidate for candidate in self.candidates if candidate.site == name)
