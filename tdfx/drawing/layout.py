"""Where the boxes of a picture lie and where its edges run: rows from top to bottom, set in columns like a newspaper.

A box stands below everything that it needs. The longest path runs down the left of its column and branches stand to
its right; edges that pass boxes by run in lanes between columns, one lane for all edges from a box.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tdfx.drawing.picture import Picture

Point = tuple[float, float]
Edge = tuple[str, str]

ROW, LANE, GAP = 0.62, 0.13, 0.26
"""Inches: from row to row, from lane to lane, and of the space between two rows of boxes."""
HEIGHT = ROW - GAP
TOP = 0.1
ASPECT = 1.25
"""Height over width that the number of columns aims at."""
LEAST_ROWS = 12
"""Of a column, where there are several."""


@dataclass(frozen=True)
class Layout:
    """A picture in inches, y downwards.

    Attributes:
        size: width and height.
        box_width: of all boxes.
        centers: of the boxes, by name.
        paths: the corners of every edge, from the bottom of one box to the top of another.
    """

    size: Point
    box_width: float
    centers: dict[str, Point]
    paths: dict[Edge, tuple[Point, ...]]


def lay_out(picture: Picture, box_width: float) -> Layout:
    """Places the boxes of a picture, which must not be empty.

    Args:
        picture: boxes in an order in which none needs a later one.
        box_width: in inches.
    """
    rows = _rows(picture)
    slots = _slots(picture, rows)
    last = max(rows.values())
    step = box_width + 0.25
    breaks = _breaks(picture, rows, columns=_column_count(last + 1, step * (max(slots.values()) + 1)))
    column = {name: sum(row >= start for start in breaks) - 1 for name, row in rows.items()}
    lanes = _lanes(picture, rows, slots, column, breaks)

    starts, x = [], LANE
    for index in range(len(breaks)):
        inside = [name for name in rows if column[name] == index]
        entering = {source for source, user in picture.edges if column[user] == index != column[source]}
        x += LANE * (len(entering) + 1)
        starts.append(x + box_width / 2)
        used = [lane for source, (_, lane) in lanes.items() if column[source] == index]
        x += max(slots[name] for name in inside) * step + box_width + LANE * (max(used, default=0) + 1) + 0.1
    centers = {
        name: (starts[column[name]] + slots[name] * step, (rows[name] - breaks[column[name]] + 0.5) * ROW + TOP)
        for name in rows
    }
    ends = [*breaks[1:], last + 1]
    lengths = [end - start for start, end in zip(breaks, ends, strict=True)]
    height = max(lengths) * ROW + 2 * TOP

    paths: dict[Edge, tuple[Point, ...]] = {}
    gutters: list[dict[str, int]] = [{} for _ in breaks]
    for source, user in picture.edges:
        (x0, y0), (x1, y1) = (centers[source][0], centers[source][1] + HEIGHT / 2), centers[user]
        y1 -= HEIGHT / 2
        below, above = y0 + GAP / 3, y1 - GAP / 3
        here, there = column[source], column[user]
        slot, number = lanes.get(source, (0, 0))
        lane = starts[here] + slot * step + box_width / 2 + LANE * number
        if here == there and rows[user] == rows[source] + 1:
            corners = [(x0, y0), (x0, (y0 + y1) / 2), (x1, (y0 + y1) / 2), (x1, y1)]
        elif here == there:
            corners = [(x0, y0), (x0, below), (lane, below), (lane, above), (x1, above), (x1, y1)]
        else:
            number = gutters[there].setdefault(source, len(gutters[there]) + 1)
            gutter = starts[there] - box_width / 2 - LANE * number
            floor = max(lengths[here:there]) * ROW + TOP + LANE * number / 2
            side = [] if rows[source] == ends[here] - 1 else [(x0, below), (lane, below)]
            down = side[-1][0] if side else x0
            corners = [(x0, y0), *side, (down, floor), (gutter, floor), (gutter, above), (x1, above), (x1, y1)]
        paths[source, user] = tuple(_without_doubles(corners))
    return Layout((x + LANE, height + LANE * max(map(len, gutters)) / 2), box_width, centers, paths)


def _rows(picture: Picture) -> dict[str, int]:
    """Below all that is needed; what needs nothing right above its first user."""
    rows: dict[str, int] = {}
    for name in picture.boxes:
        above = [rows[source] for source, user in picture.edges if user == name]
        rows[name] = max(above, default=-1) + 1
    for name in [name for name in rows if all(user != name for _, user in picture.edges)]:
        users = [rows[user] for source, user in picture.edges if source == name]
        rows[name] = max(min(users, default=1) - 1, 0)
    return rows


def _slots(picture: Picture, rows: dict[str, int]) -> dict[str, int]:
    """Counted from the left of a row: that of what is needed if it is free, where the longest way is left first."""
    depth: dict[str, int] = {}
    for name in reversed(picture.boxes):
        depth[name] = 1 + max((depth[user] for source, user in picture.edges if source == name), default=0)
    order = list(picture.boxes)
    slots: dict[str, int] = {}
    taken: set[Point] = set()
    for name in sorted(order, key=lambda name: (rows[name], -depth[name], order.index(name))):
        slot = min((slots[source] for source, user in picture.edges if user == name), default=0)
        while (rows[name], slot) in taken:
            slot += 1
        taken.add((rows[name], slot))
        slots[name] = slot
    return slots


def _column_count(rows: int, width: float) -> int:
    return max(1, min(round(math.sqrt(rows * ROW / (ASPECT * width))), rows // LEAST_ROWS))


def _breaks(picture: Picture, rows: dict[str, int], columns: int) -> list[int]:
    """First rows of the columns, near to equal parts where the fewest values go over to the next."""
    count = max(rows.values()) + 1
    part = count / columns
    crossing = [
        len({source for source, user in picture.edges if rows[source] < start <= rows[user]}) for start in range(count)
    ]
    breaks = [0]
    for index in range(1, columns):
        near = range(math.ceil((index - 0.25) * part), math.floor((index + 0.25) * part) + 1)
        wanted = index * part
        starts = [start for start in near if breaks[-1] < start < count]
        if starts:
            breaks.append(min(starts, key=lambda start: (crossing[start], abs(start - wanted))))
    return breaks


def _lanes(
    picture: Picture, rows: dict[str, int], slots: dict[str, int], column: dict[str, int], breaks: list[int]
) -> dict[str, tuple[int, int]]:
    """For what has users further down: the slot that its lane runs to the right of, and the lane's number from 1."""
    ends = [*breaks[1:], max(rows.values()) + 1]
    spans: dict[str, int] = {}
    for source, user in picture.edges:
        end = rows[user] if column[user] == column[source] else ends[column[source]]
        if end > rows[source] + 1:
            spans[source] = max(end, spans.get(source, 0))
    lanes: dict[str, tuple[int, int]] = {}
    for source in sorted(spans, key=lambda name: (spans[name] - rows[name], rows[name])):
        passed = range(rows[source] + 1, spans[source])
        slot = max((slots[name] for name in rows if rows[name] in passed), default=0)
        beside = {
            lanes[other][1]
            for other in lanes
            if column[other] == column[source] and rows[other] < spans[source] and rows[source] < spans[other]
        }
        lanes[source] = slot, next(number for number in range(1, len(spans) + 1) if number not in beside)
    return lanes


def _without_doubles(corners: list[Point]) -> list[Point]:
    """Without corners that are none: points met twice, and points between two on the same line."""
    kept: list[Point] = []
    for point in corners:
        while len(kept) > 1 and (kept[-2][0] == kept[-1][0] == point[0] or kept[-2][1] == kept[-1][1] == point[1]):
            kept.pop()
        if not kept or kept[-1] != point:
            kept.append(point)
    return kept
