from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import build
from torch import Tensor, nn

from tdfx.budget import LATENCY, RESOURCES
from tdfx.errors import BudgetError, OptionError, PlanError
from tdfx.records.capture import Capture
from tdfx.records.frontier import COLUMNS, Frontier
from tdfx.records.profile import Profile
from tdfx.stages.apply import carry_out
from tdfx.stages.capture import capture
from tdfx.stages.frontier import frontier, least_amount
from tdfx.stages.plan import plan
from tdfx.stages.profile import profile

METHODS = ["svd", "spatial_svd"]
CALLS: list[nn.Module] = []


@cache
def captured() -> Capture:
    return capture(*build("vgg"))


@cache
def profiled(rank_multiple: int = 1) -> Profile:
    return profile(captured(), methods=METHODS, target=None, rank_multiple=rank_multiple)


def outputs(network: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = network(captured().args[0])
    return found


def closeness(network: nn.Module) -> float:
    """Higher is better: 1 for the original."""
    CALLS.append(network)
    wanted = outputs(captured().original)
    return 1 - float((outputs(network) - wanted).norm() / wanted.norm())


@pytest.fixture(autouse=True)
def no_calls() -> None:
    CALLS.clear()


def curve(**options: Any) -> Frontier:
    return frontier(captured(), profiled(), **options)


@pytest.mark.parametrize("resource", sorted({*RESOURCES} - {LATENCY}))
def test_points_reach_from_the_least_to_the_whole(resource: str) -> None:
    found = curve(resource=resource, points=5)
    amount = RESOURCES[resource]
    assert [point.share for point in found.points] == sorted(point.share for point in found.points)
    assert len(found.points) == 5
    least, whole = least_amount(profiled(), resource), amount(profiled().before)
    assert (found.points[0].share - 1e-4) * whole < least <= found.points[0].share * whole
    assert found.points[-1].share == 1 and found.points[-1].error == 0
    assert np.diff([point.share for point in found.points], n=2) == pytest.approx(0, abs=3e-4)
    for point in found.points:
        assert amount(point.cost) <= point.share * amount(profiled().before)
        assert point.plan == plan(profiled(), f"{resource}={100 * point.share:.2f}%")
        assert point.cost == point.plan.after
        assert point.score is None
    assert (np.diff([point.error for point in found.points]) <= 0).all()
    assert found.original_score is None


def test_the_least_amount_is_what_the_planner_says() -> None:
    with pytest.raises(BudgetError) as caught:
        plan(profiled(), "flops=0.01%")
    assert caught.value.least == {"flops": least_amount(profiled(), "flops")}


def test_error_is_the_sum_of_squares() -> None:
    (point,) = curve(shares=[0.5]).points
    assert point.error == pytest.approx(sum(c.error**2 for c in point.plan.candidates), rel=1e-12)
    assert point.error > 0


def test_shares_out_of_reach_are_left_out_and_order_does_not_matter() -> None:
    assert [point.share for point in curve(shares=(0.9, 0.001, 0.4, 0.9)).points] == [0.4, 0.9]


def test_scores_are_those_of_the_networks_that_the_plans_make() -> None:
    found = curve(shares=[0.3, 0.7], evaluate=closeness)
    wanted = [closeness(carry_out(captured(), point.plan).module) for point in found.points]
    assert [point.score for point in found.points] == wanted
    assert found.original_score == 1


def test_each_network_is_measured_once() -> None:
    found = curve(shares=[0.5, 0.5000001, 0.6], evaluate=closeness)
    assert len({point.plan.candidates for point in found.points}) == 2
    assert len(CALLS) == 3  # the original besides
    assert found.points[0].score == found.points[1].score


def test_scores_of_a_named_function_are_kept_on_disk(tmp_path: Path) -> None:
    first = curve(points=3, evaluate=closeness, cache_dir=tmp_path)
    assert len(CALLS) == 4
    assert curve(points=3, evaluate=closeness, cache_dir=tmp_path) == first
    assert len(CALLS) == 4
    curve(shares=[0.55], evaluate=closeness, cache_dir=tmp_path)
    assert len(CALLS) == 5


def constant(network: nn.Module) -> float:
    CALLS.append(network)
    return 3.0


def test_scores_of_another_function_are_others(tmp_path: Path) -> None:
    curve(points=2, evaluate=closeness, cache_dir=tmp_path)
    found = curve(points=2, evaluate=constant, cache_dir=tmp_path)
    assert [point.score for point in found.points] == [3.0, 3.0]


class Meter:
    def score(self, network: nn.Module) -> float:
        return constant(network)

    def __call__(self, network: nn.Module) -> float:
        return constant(network)


@pytest.mark.parametrize(
    "function",
    [lambda network: constant(network), Meter().score, Meter(), partial(constant)],
    ids=["lambda", "method", "object", "partial"],
)
def test_what_has_no_name_of_its_own_is_not_kept_on_disk(
    function: Callable[[nn.Module], float], tmp_path: Path
) -> None:
    for calls in (3, 6):
        curve(points=2, evaluate=function, cache_dir=tmp_path)
        assert len(CALLS) == calls
    assert list(tmp_path.iterdir()) == []


def test_a_function_of_no_file_is_not_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules[__name__], "__file__")
    curve(points=2, evaluate=constant, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_scores_of_other_weights_are_others(tmp_path: Path) -> None:
    curve(points=2, evaluate=constant, cache_dir=tmp_path)
    other = capture(*build("vgg", seed=1))
    frontier(
        other,
        profile(other, methods=METHODS, target=None, rank_multiple=1),
        points=2,
        evaluate=constant,
        cache_dir=tmp_path,
    )
    assert len(CALLS) == 6


def test_what_the_function_does_to_a_network_stays_there() -> None:
    def spoil(network: nn.Module) -> float:
        assert not network.training
        score = closeness(network)
        network.train().double()
        with torch.no_grad():
            for weight in network.parameters():
                weight.zero_()
        return score

    before = {name: value.clone() for name, value in captured().module.state_dict().items()}
    found = curve(points=3, evaluate=spoil)
    assert found.points[-1].score == pytest.approx(1, abs=1e-6)
    after = captured().module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not captured().original.training


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "0.9", True, torch.ones(2), 1j])
def test_a_score_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(OptionError, match=r"evaluate returned .*; expected a finite number"):
        curve(points=2, evaluate=lambda network: value)


@pytest.mark.parametrize("value", [2, np.float32(2), np.float64(2), torch.tensor(2.0), torch.tensor([2])])
def test_numbers_of_other_libraries_are_scores(value: Any) -> None:
    found = curve(shares=[1], evaluate=lambda network: value).original_score
    assert found == 2.0 and type(found) is float


def test_refusals() -> None:
    with pytest.raises(BudgetError, match="resource: unknown resource 'flosp'; did you mean 'flops'"):
        curve(resource="flosp")
    with pytest.raises(BudgetError, match="unknown resource 'flosp'"):
        curve(resource="flosp", shares=[0.5])
    for points in (1, 2.5, True):
        with pytest.raises(OptionError, match=r"points is .*; expected a whole number of 2 or more"):
            curve(points=points)
    for share in (0, 1.5, math.nan):
        with pytest.raises(BudgetError, match="flops"):
            curve(shares=[share])
    with pytest.raises(OptionError, match="shares holds '50%'"):
        curve(shares=["50%"])
    with pytest.raises(OptionError, match="planner='best'"):
        curve(planner="best")
    with pytest.raises(OptionError, match="evaluate is a float"):
        curve(evaluate=0.5)


def test_a_profile_of_another_model_is_refused() -> None:
    with pytest.raises(PlanError, match="another capture"):
        frontier(capture(*build("vgg", seed=1)), profiled(), evaluate=constant)
    assert CALLS == []


def test_a_profile_of_other_moments_is_refused() -> None:
    with pytest.raises(PlanError, match="made with moments of fingerprint 12345678, given are no moments"):
        frontier(captured(), replace(profiled(), moments="123456789"), evaluate=constant)


def test_progress_is_reported() -> None:
    seen: list[tuple[str, int, int]] = []
    curve(shares=[0.5, 1], progress=lambda *step: seen.append(step))
    assert seen == [("original", 0, 3), ("flops 50.0%", 1, 3), ("flops 100.0%", 2, 3), ("frontier", 3, 3)]


def test_csv_and_table_hold_the_points() -> None:
    found = curve(points=3, evaluate=closeness)
    header, *rows = csv.reader(io.StringIO(found.to_csv()))
    assert tuple(header) == COLUMNS
    for row, point in zip(rows, found.points, strict=True):
        values = dict(zip(header, row, strict=True))
        assert values["latency_s"] == ""
        assert (float(values["share"]), int(values["flops"]), float(values["error"]), float(values["score"])) == (
            point.share,
            point.cost.flops,
            point.error,
            point.score,
        )
    lines = str(found).splitlines()
    assert len(lines) == 2 + 3 + 2
    assert lines[-2].split()[0] == "original" and lines[-2].split()[-1] == "1"
    assert "weight:relative" in lines[-1]
    assert "score" not in str(curve(points=2))
    assert "latency" not in str(found)
    timed = replace(found, resource="latency", latency_source="estimated")
    assert str(timed).endswith("; latency is estimated")
    assert {row["latency_source"] for row in csv.DictReader(io.StringIO(timed.to_csv()))} == {"estimated"}


@pytest.mark.parametrize("evaluate", [None, constant])
def test_a_picture(evaluate: Callable[[nn.Module], float] | None, tmp_path: Path) -> None:
    from matplotlib.image import imread

    curve(points=3, evaluate=evaluate).to_png(tmp_path / "curve.png")
    assert np.asarray(imread(tmp_path / "curve.png"))[..., :3].std() > 0.01
