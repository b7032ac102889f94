"""What planning needs to know of a model: sites, candidates with costs and errors, and what stays; readable JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tdfx.errors import PlanError
from tdfx.records.candidate import Candidate
from tdfx.records.cost import Cost
from tdfx.records.layer import Site, Skipped
from tdfx.records.plan import MOST_SEED
from tdfx.records.reading import read_text
from tdfx.records.writing import to_text
from tdfx.tables import align, count

VERSION = 1
MOST_COST = 2**62  # planners count in 64 bits, FLOPs as twice the MACs


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
        corrected: whether the biases of chains are corrected where the mean of the layer's input is known.
        moments: fingerprint of the moments it was made with; None without.
        rank_rule: what gave every site its only candidate, e.g. "energy=0.95"; None where a budget chooses.
        capture: how the model was captured: "fx", "export" or "inplace"; None in profiles of older versions.

    Raises:
        PlanError: sites and candidates do not belong together, or a number is too large to plan with.
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
    rank_rule: str | None = None
    corrected: bool = False
    moments: str | None = None
    capture: str | None = None

    def __post_init__(self) -> None:
        if self.rest.latency_s is not None and self.rest.latency_s < 0:
            # A difference of estimates, which rounding may put below zero.
            object.__setattr__(self, "rest", replace(self.rest, latency_s=0.0))
        if self.seed > MOST_SEED:
            raise PlanError(f"the profile's seed is {self.seed}; expected at most {MOST_SEED}")
        sites = Counter(site.name for site in self.sites)
        choices = Counter(candidate.site for candidate in self.candidates)
        for problem, names in (
            ("more than one site named", [name for name, times in sites.items() if times > 1]),
            ("candidates but no site for", [name for name in choices if name not in sites]),
            ("a site but no candidate for", [name for name in sites if name not in choices]),
            ("both a site and a skip for", [entry.layer for entry in self.skipped if entry.layer in sites]),
            (
                f"a rank rule ({self.rank_rule}) but more than one candidate for",
                [name for name, times in choices.items() if times > 1 and self.rank_rule is not None],
            ),
        ):
            if names:
                raise PlanError(f"the profile has {problem} {', '.join(names)}; make the profile anew")
        costs = (self.before, self.rest, *(candidate.cost for candidate in self.candidates))
        most = max(max(cost.params, cost.macs, cost.weight_bytes) for cost in costs)
        if most > MOST_COST // (len(sites) + 1):
            raise PlanError(f"the profile has a cost of {most}, too large to plan with; make the profile anew")

    def __str__(self) -> str:
        header = ("layer", "kind", "weight", "choices", "params", "at least", "macs", "at least")
        least = {site.name: _least([c.cost for c in self.of_site(site.name)]) for site in self.sites}
        rows = [
            (
                site.name,
                site.kind,
                " + ".join("x".join(map(str, layer.weight_shape)) for layer in site.layers),
                self._choices(site.name),
                *_from_to(sum(layer.params for layer in site.layers), least[site.name].params),
                *_from_to(sum(layer.macs for layer in site.layers), least[site.name].macs),
            )
            for site in self.sites
        ]
        whole = sum(least.values(), start=self.rest)
        params, macs = _from_to(self.before.params, whole.params), _from_to(self.before.macs, whole.macs)
        lines = [align(header, [*rows, ("whole model", "", "", "", *params, *macs)], right=(3, 4, 5, 6, 7))]
        grid = "any rank" if self.rank_multiple == 1 else f"ranks in multiples of {self.rank_multiple}"
        given = "" if self.rank_rule is None else f"; ranks by {self.rank_rule}"
        latency = f"{self.latency_source} for {self.target}" if self.latency_source else "not estimated"
        lines.append(f"{grid}{given}; error is {self.metric}; latency is {latency}")
        if any(candidate.caveat for candidate in self.candidates):
            lines.append("in brackets: more choices, off the grid or slower, for budgets that nothing else reaches")
        lines += [f"skipped {entry.layer}: {entry.reason}" for entry in self.skipped]
        return "\n".join(lines)

    def to_json(self) -> str:
        """JSON text with one site or candidate a line; ``from_json`` gives an equal profile back."""
        return to_text(self, VERSION, rows=("sites", "candidates", "skipped"))

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """Reads what ``to_json`` wrote.

        Raises:
            PlanError: naming the field that is missing, unknown or of the wrong type, the version, or the site.
        """
        return read_text(cls, text, "profile", VERSION)

    def of_site(self, name: str) -> tuple[Candidate, ...]:
        """The candidates of one site."""
        return tuple(candidate for candidate in self.candidates if candidate.site == name)

    def _choices(self, name: str) -> str:
        """How many there are, those with a caveat in brackets."""
        caveats = [candidate.caveat != "" for candidate in self.of_site(name)]
        return f"{caveats.count(False)} (+{sum(caveats)})" if any(caveats) else str(len(caveats))


def _least(costs: Sequence[Cost]) -> Cost:
    """The least of parameters and of MACs, each on its own."""
    return Cost(min(cost.params for cost in costs), min(cost.macs for cost in costs), 0)


def _from_to(before: int, least: int) -> tuple[str, str]:
    return count(before), count(least)
