"""A plan: one candidate per site, with all that is needed to carry it out again; JSON that a person can edit."""

from __future__ import annotations

from dataclasses import dataclass

from tdfx.errors import PlanError
from tdfx.records.candidate import Candidate, format_rank
from tdfx.records.cost import Cost
from tdfx.records.layer import Skipped
from tdfx.records.reading import read_text
from tdfx.records.writing import to_text
from tdfx.tables import align, count, seconds

VERSION = 1
ESTIMATED, MEASURED = "estimated", "measured"
"""Where latencies come from."""
MOST_SEED = 2**63 - 1  # torch takes no larger one


@dataclass(frozen=True)
class Plan:
    """What becomes of every compressible layer.

    Attributes:
        candidates: one per site, in order of execution.
        skipped: layers left as they are, with reasons.
        budget: the budget as asked for.
        before: cost of the whole model as given.
        after: cost of the whole model with these candidates.
        metric: of the candidates' errors.
        planner: what chose them.
        target: runtime whose latency is estimated, or None.
        rank_multiple: grid of the ranks offered.
        trainable: whether BatchNorm and Dropout are kept.
        seed: of the decompositions.
        latency_source: "estimated", "measured", or None without a target.
        structure: fingerprint of the model's names, shapes and options.
        weights: fingerprint of its weights.
        notes: what the user should know, e.g. that ranks off the grid were needed.
        corrected: whether the biases of chains are corrected where the mean of the layer's input is known.
        moments: fingerprint of the moments it was made with, which it takes to carry it out; None without.
        capture: how the model was captured: "fx", "export" or "inplace"; None in plans of older versions.

    Raises:
        PlanError: a site has several candidates, or a candidate and a skip, or the seed is too large.
    """

    candidates: tuple[Candidate, ...]
    skipped: tuple[Skipped, ...]
    budget: str
    before: Cost
    after: Cost
    metric: str
    planner: str
    target: str | None
    rank_multiple: int
    trainable: bool
    seed: int
    latency_source: str | None
    structure: str
    weights: str
    notes: tuple[str, ...] = ()
    corrected: bool = False
    moments: str | None = None
    capture: str | None = None

    def __post_init__(self) -> None:
        if self.seed > MOST_SEED:
            raise PlanError(f"the plan's seed is {self.seed}; expected at most {MOST_SEED}")
        names = [candidate.site for candidate in self.candidates]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise PlanError(f"the plan has more than one candidate for {', '.join(twice)}; keep one each")
        both = [entry.layer for entry in self.skipped if entry.layer in names]
        if both:
            raise PlanError(f"the plan both skips and has a candidate for {', '.join(both)}; keep one of the two")

    def __str__(self) -> str:
        header = ("layer", "method", "rank", "params", "macs", "latency", "error")
        rows = [
            (c.site, c.method, format_rank(c.rank), count(c.cost.params), count(c.cost.macs),
             seconds(c.cost.latency_s), f"{c.error:.4g}")
            for c in self.candidates
        ]  # fmt: skip
        totals = [
            (name, "", "", count(cost.params), count(cost.macs), seconds(cost.latency_s), "")
            for name, cost in (("whole model before", self.before), ("whole model after", self.after))
        ]
        lines = [align(header, [*rows, *totals], right=(3, 4, 5, 6))]
        lines.append(
            f"budget {self.budget}; error is {self.metric}; latency is {self.latency_source or 'not estimated'}"
        )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_json(self) -> str:
        """JSON text with one candidate a line; ``from_json`` gives an equal plan back."""
        return to_text(self, VERSION, rows=("candidates", "skipped"))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Reads what ``to_json`` wrote or a person edited.

        Raises:
            PlanError: naming the field that is missing, unknown or of the wrong type, the version, or the site.
        """
        return read_text(cls, text, "plan", VERSION)
