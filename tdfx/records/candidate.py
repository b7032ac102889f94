"""One choice for one site."""

from __future__ import annotations

from dataclasses import dataclass

from tdfx.records.cost import Cost
from tdfx.records.layer import Rank

DENSE = "dense"
SLOWER = "slower than dense"
SLOWER_ESTIMATED, SLOWER_MEASURED = f"estimated {SLOWER}", f"measured no faster, or {SLOWER}"


@dataclass(frozen=True)
class Candidate:
    """One way to do one site's work.

    Attributes:
        site: name of the site.
        method: name of a decomposition, or "dense" for the layer as it is.
        rank: the method's rank or ranks; empty for "dense".
        cost: cost of the site in this form.
        error: error in ``metric``, an un-squared norm for weight metrics.
        metric: e.g. "weight:relative".
        caveat: why the candidate is offered only where a budget needs it ("" if it is always offered).
    """

    site: str
    method: str
    rank: Rank
    cost: Cost
    error: float
    metric: str
    caveat: str = ""

    @property
    def is_dense(self) -> bool:
        """Whether the site stays as it is."""
        return self.method == DENSE


def format_rank(rank: Rank) -> str:
    """``16``, ``32x48``, or ``-`` for no rank."""
    return "x".join(str(r) for r in rank) or "-"
