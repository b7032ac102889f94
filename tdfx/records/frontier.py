"""What a network loses as it gets cheaper."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from tdfx.budget import LATENCY
from tdfx.records.cost import Cost
from tdfx.records.plan import Plan
from tdfx.tables import align, count
from tdfx.tables import share as percentage

COLUMNS = ("share", "flops", "macs", "params", "weight_bytes", "latency_s", "latency_source", "error", "score")


@dataclass(frozen=True)
class Point:
    """The best plan within a share of a resource.

    Attributes:
        share: of the whole model's resource that the plan was allowed.
        cost: of the whole network that it makes.
        error: the planner's objective: the sum of squared errors, for the metric "loss" of the errors.
        score: measured; None where nothing was measured.
        plan: the plan.
    """

    share: float
    cost: Cost
    error: float
    score: float | None
    plan: Plan


@dataclass(frozen=True)
class Frontier:
    """The planner's best plans from the cheapest to the whole model.

    Attributes:
        points: by share, the least first.
        resource: "flops", "macs", "params", "bytes" or "latency".
        metric: of the errors.
        before: cost of the whole model as given.
        original_score: measured score of the model as given; None where nothing was measured.
        latency_source: "estimated", "measured", or None where no latency is known.
    """

    points: tuple[Point, ...]
    resource: str
    metric: str
    before: Cost
    original_score: float | None
    latency_source: str | None = None

    def __str__(self) -> str:
        measured = self.original_score is not None
        header = (f"{self.resource} at most", "flops", "params", "error", *(("score",) if measured else ()))
        rows = [
            (
                percentage(point.share, 1),
                count(point.cost.flops),
                count(point.cost.params),
                f"{point.error:.4g}",
                *((f"{point.score:.4g}",) if point.score is not None else ()),
            )
            for point in self.points
        ]
        whole = ("original", count(self.before.flops), count(self.before.params), "0")
        last = (*whole, f"{self.original_score:.4g}") if measured else whole
        table = align(header, [*rows, last], right=range(len(header)))
        source = f"; latency is {self.latency_source}" if self.resource == LATENCY else ""
        return f"{table}\nerror is what the planner adds up, of {self.metric}{source}"

    def to_csv(self) -> str:
        """A row for each point, under the names in ``COLUMNS``; what is not known stays empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for point in self.points:
            cost = point.cost
            costs = (cost.flops, cost.macs, cost.params, cost.weight_bytes, cost.latency_s)
            writer.writerow([point.share, *costs, self.latency_source, point.error, point.score])
        return text.getvalue()

    def to_png(self, path: str | Path) -> None:
        """Draws error and, where measured, score against the share of the resource.

        Raises:
            InputError: matplotlib is not installed, or the path cannot be written.
        """
        from tdfx.plots import plot_frontier  # reads this module's records

        plot_frontier(self, path)
