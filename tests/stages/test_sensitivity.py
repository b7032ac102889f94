from __future__ import annotations

import csv
import io
import math
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from networks import build

from tdfx import plots
from tdfx.budget import LATENCY, RESOURCES
from tdfx.errors import BudgetError, InputError
from tdfx.plots import plot_sensitivity
from tdfx.records.profile import Profile
from tdfx.stages.capture import capture
from tdfx.stages.profile import profile
from tdfx.stages.sensitivity import COLUMNS, Sensitivity, by_resistance, sensitivity, to_csv, to_table


@cache
def profiled() -> Profile:
    model, inputs = build("vgg")
    return profile(capture(model, inputs), methods=["svd", "spatial_svd"], target=None, rank_multiple=1)


def record(site: str, *points: tuple[float, float], method: str = "svd") -> Sensitivity:
    return Sensitivity(site, method, points, 0.5, "flops", "loss")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(imread(path))


@pytest.mark.parametrize("resource", sorted({*RESOURCES} - {LATENCY}))
def test_points_are_the_candidates(resource: str) -> None:
    amount = RESOURCES[resource]
    found = sensitivity(profiled(), resource)
    dense = {c.site: amount(c.cost) for c in profiled().candidates if c.is_dense}
    wanted = sorted(
        (c.site, c.method, amount(c.cost) / dense[c.site], c.error) for c in profiled().candidates if not c.is_dense
    )
    assert sorted((r.site, r.method, *point) for r in found for point in r.points) == wanted
    assert all(list(r.points) == sorted(r.points) for r in found)
    weights = {r.site: r.weight * amount(profiled().before) for r in found}
    assert weights == pytest.approx({site: dense[site] for site in weights}, rel=1e-12)
    assert {(r.resource, r.metric) for r in found} == {(resource, "weight:relative")}


def test_an_unknown_resource_is_refused() -> None:
    with pytest.raises(BudgetError, match="resource: unknown resource 'watts'"):
        sensitivity(profiled(), "watts")


def test_the_curve_leaves_out_what_is_dearer_and_no_better() -> None:
    points = ((0.1, 5.0), (0.2, 6.0), (0.3, 5.0), (0.4, 1.0), (0.5, 2.0))
    assert record("a", *points).curve == ((0.1, 5.0), (0.4, 1.0))


def test_error_at_a_share_is_the_least_of_all_as_cheap() -> None:
    found = record("a", (0.2, 3.0), (0.5, 1.0), (0.6, 2.0))
    assert [found.error_at(share) for share in (0.1, 0.2, 0.49, 0.5, 0.9)] == [math.inf, 3.0, 3.0, 1.0, 1.0]


def test_sites_are_sorted_by_the_best_method_at_half_their_cost() -> None:
    records = [
        record("easy", (0.5, 1.0)),
        record("better by tt", (0.5, 9.0)),
        record("dear", (0.6, 0.1)),
        record("hard", (0.4, 3.0), (0.6, 0.0)),
        record("better by tt", (0.5, 2.0), method="tt"),
    ]
    found = by_resistance(records)
    assert list(found) == ["dear", "hard", "better by tt", "easy"]
    assert [entry.method for entry in found["better by tt"]] == ["svd", "tt"]
    rows = to_table(records).splitlines()
    assert rows[2].split() == ["dear", "50.0%", "0.1", "-", "-", "-"]
    assert rows[3].split() == ["hard", "50.0%", "0", "3", "-", "svd"]
    assert rows[4].split()[-3:] == ["2", "-", "tt"]


def test_the_table_of_a_network_has_a_row_for_each_site() -> None:
    text = to_table(sensitivity(profiled()))
    assert sorted(line.split()[0] for line in text.splitlines()[2:-1]) == sorted(s.name for s in profiled().sites)
    assert "least error (weight:relative)" in text
    assert to_table(()) == "nothing to compress"


def test_csv_has_every_point() -> None:
    records = sensitivity(profiled())
    header, *rows = csv.reader(io.StringIO(to_csv(records)))
    assert tuple(header) == COLUMNS
    found = [(site, method, float(share), float(error)) for site, method, _, _, share, error in rows]
    assert found == [(r.site, r.method, *point) for r in records for point in r.points]


def test_a_picture_has_a_panel_for_each_site(tmp_path: Path) -> None:
    plot_sensitivity(sensitivity(profiled()), tmp_path / "s.png")
    image = pixels(tmp_path / "s.png")
    assert image.ndim == 3 and image[..., :3].std() > 0.01


def test_a_picture_of_errors_that_are_all_zero(tmp_path: Path) -> None:
    plot_sensitivity([record("a", (0.5, 0.0))], tmp_path / "s.png")  # warnings are errors
    assert (tmp_path / "s.png").is_file()


def test_only_the_most_resistant_are_shown_and_the_title_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []

    def spy(figure: Figure, path: str | Path) -> None:
        titles.extend([figure.get_suptitle(), *(panel.get_title() for panel in figure.axes)])

    monkeypatch.setattr(plots, "_save", spy)
    monkeypatch.setattr(plots, "MOST_PANELS", 3)
    plot_sensitivity([record(str(n), (0.5, float(n))) for n in range(7)], tmp_path / "s.png")
    title = "Error (loss) against % of the layer's flops, the 3 of 7 layers that resist most"
    assert titles == [title, "6", "5", "4", ""]


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to draw"):
        plot_sensitivity((), tmp_path / "s.png")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install tdfx\[plots\]"):
        plot_sensitivity([record("a", (0.5, 1.0))], tmp_path / "s.png")
    assert list(tmp_path.iterdir()) == []
