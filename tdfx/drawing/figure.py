"""Pictures drawn by matplotlib, which is an optional extra."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

from tdfx.drawing.layout import HEIGHT, Layout, Point, lay_out
from tdfx.drawing.picture import END, JOIN, Box, Picture, color
from tdfx.plots import DPI, check_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHARACTER = 0.064  # inches of a character of the text in boxes
HEADER, MARGIN = 0.7, 0.15
CORNER = 0.06
LINE, CRITICAL = "#8a8f98", "#1f2933"


def save_figure(picture: Picture, path: FilePath, kind: str) -> None:
    """Draws a picture with its legend.

    Args:
        picture: what is shown.
        path: where it goes.
        kind: "svg" or "png".

    Raises:
        InputError: matplotlib is not installed.
    """
    check_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    longest = max(len(line) for box in picture.boxes.values() for line in box.lines)
    layout = lay_out(picture, max(1.2, CHARACTER * longest + 0.15))
    width, height = max(layout.size[0], 5.0) + 2 * MARGIN, layout.size[1] + HEADER + 2 * MARGIN
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tdfx"}):
        figure = Figure(figsize=(width, height), dpi=DPI)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(-MARGIN, width - MARGIN)
        axes.set_ylim(height - HEADER - MARGIN, -HEADER - MARGIN)  # downwards
        critical = set(pairwise(box.name for box in picture.boxes.values() if box.critical))
        for edge in sorted(layout.paths, key=critical.__contains__):  # those on top
            _draw_edge(axes, layout.paths[edge], edge in critical)
        for box in picture.boxes.values():
            _draw_box(axes, box, layout)
        _draw_legend(axes, picture, width - 2 * MARGIN)
        figure.savefig(path, format=kind, metadata={"Date": None} if kind == "svg" else None)


def _draw_edge(axes: Axes, corners: tuple[Point, ...], critical: bool) -> None:
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    points, codes = [corners[0]], [Path.MOVETO]
    for (before, corner), (_, after) in pairwise(pairwise(corners)):
        points += [_towards(corner, before), corner, _towards(corner, after)]
        codes += [Path.LINETO, Path.CURVE3, Path.CURVE3]
    path = Path([*points, corners[-1]], [*codes, Path.LINETO])
    edge = FancyArrowPatch(path=path, arrowstyle="-|>", mutation_scale=6, shrinkA=0, shrinkB=0)
    edge.set(color=CRITICAL if critical else LINE, linewidth=1.2 if critical else 0.8)
    axes.add_patch(edge)


def _towards(corner: Point, other: Point) -> Point:
    """The point on the way from a corner to another one where its arc ends."""
    length = abs(other[0] - corner[0]) + abs(other[1] - corner[1])
    part = min(CORNER, length / 2) / length
    return corner[0] + part * (other[0] - corner[0]), corner[1] + part * (other[1] - corner[1])


def _draw_box(axes: Axes, box: Box, layout: Layout) -> None:
    from matplotlib.patches import FancyBboxPatch

    x, y = layout.centers[box.name]
    is_plain = box.kind in (JOIN, END)
    width = max(HEIGHT, CHARACTER * len(box.lines[0]) + 0.2) if is_plain else layout.box_width
    rounding = HEIGHT / 2 if is_plain else 0.05
    corner, style = (x - width / 2, y - HEIGHT / 2), f"round,pad=0,rounding_size={rounding}"
    patch = FancyBboxPatch(corner, width, HEIGHT, boxstyle=style, facecolor=color(box.kind))
    patch.set(edgecolor=CRITICAL if box.critical else LINE, linewidth=1.2 if box.critical else 0.7)
    axes.add_patch(patch)
    if len(box.lines) == 1:
        axes.text(x, y, box.lines[0], ha="center", va="center", fontsize=7)
        return
    name, about = box.lines
    axes.text(x, y - 0.075, name, ha="center", va="center", fontsize=7, fontweight="bold")
    axes.text(x, y + 0.08, about, ha="center", va="center", fontsize=6.5)


def _draw_legend(axes: Axes, picture: Picture, width: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    axes.text(0, -HEADER + 0.05, picture.title, fontsize=10, fontweight="bold", va="center")
    axes.text(0, -HEADER + 0.24, picture.about, fontsize=7, va="center")
    counts = Counter(box.kind for box in picture.boxes.values() if box.kind not in (JOIN, END))
    x, y = 0.0, -HEADER + 0.45
    for kind, times in sorted(counts.items()):
        text = f"{kind} ({times})"
        needed = 0.22 + CHARACTER * len(text) + 0.2
        if x > 0 and x + needed > width:
            x, y = 0.0, y + 0.2
        patch = FancyBboxPatch((x, y - 0.06), 0.15, 0.12, boxstyle="round,pad=0,rounding_size=0.03")
        patch.set(facecolor=color(kind), edgecolor=LINE, linewidth=0.7)
        axes.add_patch(patch)
        axes.text(x + 0.22, y, text, fontsize=7, va="center")
        x += needed
