"""Where boxes and edges lie: no box on another, none below what needs it, and no edge through a box."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import reproducible

from tdfx.drawing import layout as module
from tdfx.drawing.layout import HEIGHT, Layout, Point, lay_out
from tdfx.drawing.picture import Box, Picture

WIDTH = 1.5


def picture(count: int, edges: list[tuple[int, int]]) -> Picture:
    boxes = {str(index): Box(str(index), ("name", "about"), "dense") for index in range(count)}
    return Picture("title", "about", boxes, tuple((str(source), str(user)) for source, user in edges))


def chain(count: int, *more: tuple[int, int]) -> Picture:
    return picture(count, [*pairwise(range(count)), *more])


@st.composite
def pictures(draw: st.DrawFn) -> Picture:
    """Every box but the first ones needs an earlier one, or several, mostly the one before it."""
    count, first = draw(st.integers(2, 25)), draw(st.integers(1, 2))
    edges = []
    for user in range(min(first, count - 1), count):
        sources = draw(st.sets(st.integers(0, user - 1), max_size=2))
        edges += [(source, user) for source in sorted(sources | {user - draw(st.integers(1, min(3, user)))})]
    return picture(count, edges)


def crosses(start: Point, end: Point, center: Point) -> bool:
    """Whether a horizontal or vertical line enters a box."""
    between = [sorted(ends) for ends in zip(start, end, strict=True)]
    sides = [(middle - size / 2, middle + size / 2) for middle, size in zip(center, (WIDTH, HEIGHT), strict=True)]
    return all(
        low < right - 1e-9 and high > left + 1e-9 for (low, high), (left, right) in zip(between, sides, strict=True)
    )


def check(shown: Picture, found: Layout) -> None:
    centers = found.centers
    assert centers.keys() == shown.boxes.keys() and found.paths.keys() == set(shown.edges)
    for one, other in combinations(centers.values(), 2):
        assert abs(one[0] - other[0]) >= WIDTH - 1e-9 or abs(one[1] - other[1]) >= HEIGHT - 1e-9
    for (source, user), path in found.paths.items():
        assert path[0] == pytest.approx((centers[source][0], centers[source][1] + HEIGHT / 2))
        assert path[-1] == pytest.approx((centers[user][0], centers[user][1] - HEIGHT / 2))
        for start, end in pairwise(path):
            assert (start[0] == end[0]) != (start[1] == end[1])
            assert not any(crosses(start, end, center) for center in centers.values())
    points = [*centers.values(), *(point for path in found.paths.values() for point in path)]
    assert all(0 <= x <= found.size[0] and 0 <= y <= found.size[1] for x, y in points)


@reproducible(50)
@given(pictures(), st.sampled_from((0.05, 1.25)))
def test_nothing_lies_on_anything_else(shown: Picture, aspect: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ASPECT", aspect)  # a small one makes several columns
        patch.setattr(module, "LEAST_ROWS", 4)
        check(shown, lay_out(shown, WIDTH))


def test_the_longest_path_is_one_straight_line_and_branches_stand_beside() -> None:
    shown = picture(6, [(0, 1), (0, 2), (2, 3), (1, 4), (3, 4), (4, 5)])
    found = lay_out(shown, WIDTH)
    check(shown, found)
    assert len({found.centers[name][0] for name in "02345"}) == 1
    assert found.centers["1"][0] > found.centers["2"][0] and found.centers["1"][1] == found.centers["2"][1]


def test_edges_past_boxes_of_one_time_have_lanes_of_their_own() -> None:
    shown = chain(8, (0, 6), (1, 5), (1, 4), (2, 7))
    found = lay_out(shown, WIDTH)
    check(shown, found)
    lanes = {edge: max(x for x, _ in found.paths[edge]) for edge in (("0", "6"), ("1", "5"), ("1", "4"), ("2", "7"))}
    assert lanes["1", "5"] == lanes["1", "4"]
    assert len(set(lanes.values())) == 3


def test_long_networks_are_set_in_columns_that_break_where_least_goes_over() -> None:
    blocks = [(start, start + 3) for start in range(0, 57, 3)]
    shown = chain(60, *blocks)
    found = lay_out(shown, WIDTH)
    check(shown, found)
    columns = sorted({x for x, _ in found.centers.values()})
    assert len(columns) > 1 and found.size[1] < 60 * 0.62 / 2
    firsts = [min(int(name) for name, (x, _) in found.centers.items() if x == column) for column in columns]
    assert all((first - 1) % 3 == 0 for first in firsts[1:])  # behind a sum, which alone goes over


def test_what_needs_nothing_stands_right_above_what_needs_it() -> None:
    shown = picture(5, [(0, 2), (2, 3), (1, 4), (3, 4)])
    found = lay_out(shown, WIDTH)
    assert found.centers["1"][1] == found.centers["3"][1] > found.centers["0"][1]
