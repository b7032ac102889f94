"""Pictures of curves, drawn by matplotlib, which is an optional extra."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tdfx.budget import find_resource
from tdfx.errors import InputError
from tdfx.files import replacing
from tdfx.records.frontier import Frontier
from tdfx.stages.sensitivity import Sensitivity, by_resistance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PANELS = 36
PANEL_INCHES = (2.4, 1.9)
DPI = 120


def plot_frontier(frontier: Frontier, path: str | Path) -> None:
    """Draws predicted error and, where measured, score against the share of the resource that networks use.

    Raises:
        InputError: matplotlib is not installed, or the path cannot be written.
    """
    figure = _figure(7, 4.2)
    amount = find_resource(frontier.resource, "resource")
    whole = max(amount(frontier.before), 1)
    shares = [100 * amount(point.cost) / whole for point in frontier.points]
    errors = figure.add_subplot()
    errors.set_xlabel(f"{frontier.resource}, % of the original")
    errors.set_ylabel(f"predicted error ({frontier.metric})")
    predicted = [point.error for point in frontier.points]
    errors.plot(shares, predicted, "o-", color="C0", label="predicted error")
    _scale(errors, predicted)
    errors.grid(alpha=0.3)
    if frontier.original_score is not None:
        scores = errors.twinx()
        scores.set_ylabel("measured score")
        measured = [math.nan if point.score is None else point.score for point in frontier.points]
        scores.plot(shares, measured, "o-", color="C1", label="measured score")
        scores.axhline(frontier.original_score, color="C1", linestyle=":", label="original's score")
        figure.legend(loc="outside upper center", ncols=3, frameon=False)
    _save(figure, path)


def plot_sensitivity(records: Sequence[Sensitivity], path: str | Path) -> None:
    """Draws a panel for each site, error against share of its cost, a line for each method; most resistant first.

    Raises:
        InputError: matplotlib is not installed, there is nothing to draw, or the path cannot be written.
    """
    if not records:
        raise InputError("the profile has no layer that can be compressed, so that there is nothing to draw")
    sites = by_resistance(records)
    shown = dict(list(sites.items())[:MOST_PANELS])
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    figure = _figure(max(columns * PANEL_INCHES[0], 5), rows * PANEL_INCHES[1] + 1)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    colors = {method: f"C{index}" for index, method in enumerate(sorted({record.method for record in records}))}
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    for panel, (site, of_site) in zip(panels, shown.items(), strict=False):
        panel.set_title(site, fontsize=7)
        panel.tick_params(labelsize=6, which="both")
        panel.grid(alpha=0.3)
        for record in of_site:
            shares, errors = zip(*record.curve, strict=True)
            percent = [100 * share for share in shares]
            panel.plot(percent, errors, ".-", color=colors[record.method], label=record.method, linewidth=1)
        _scale(panel, [error for record in records for _, error in record.points])
        panel.set_xlim(0, 100)
    first = records[0]
    most = "" if len(shown) == len(sites) else f", the {len(shown)} of {len(sites)} layers that resist most"
    figure.suptitle(f"Error ({first.metric}) against % of the layer's {first.resource}{most}", fontsize=9)
    lines = {str(line.get_label()): line for panel in figure.axes for line in panel.get_lines()}
    names = sorted(lines)
    figure.legend([lines[name] for name in names], names, loc="outside lower center", ncols=5, fontsize=8)
    _save(figure, path)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic scale, unless all values are zero, which has no logarithm."""
    if any(value > 0 for value in values):
        axes.set_yscale("log", nonpositive="mask")


def check_matplotlib() -> None:
    """Raises InputError where matplotlib is not installed; before long work, rather than after it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError("pictures take matplotlib; install it with pip install tdfx[plots]") from error


def _figure(width: float, height: float) -> Figure:
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _save(figure: Figure, path: str | Path) -> None:
    with replacing(path) as staged:
        figure.savefig(staged, format="png")
