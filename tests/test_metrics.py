from __future__ import annotations

import pytest
import torch

from tdfx.errors import OptionError
from tdfx.metrics import METRICS, contribution, error_scale, find_metric

WEIGHT = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)


@pytest.mark.parametrize("name", [None, "weight", "weight:relative"])
def test_relative_is_the_default(name: str | None) -> None:
    assert find_metric(name) == "weight:relative"


@pytest.mark.parametrize("name", METRICS)
def test_metrics_are_found_by_name(name: str) -> None:
    assert find_metric(name) == name


def test_a_near_miss_gets_a_suggestion() -> None:
    with pytest.raises(OptionError, match=r"unknown metric 'weight:relativ'; did you mean 'weight:relative'\? known"):
        find_metric("weight:relativ")


@pytest.mark.parametrize("name", ["loss", "", 7])
def test_an_unknown_metric_gets_the_list(name: str) -> None:
    with pytest.raises(OptionError, match=f"unknown metric {name!r}; known metrics: {', '.join(METRICS)}"):
        find_metric(name)


def test_scales() -> None:
    scales = {name: error_scale(name, WEIGHT) for name in METRICS}
    assert scales == {"weight:absolute": 1.0, "weight:relative": 5.0, "weight:scaled": 4.0}


def test_a_zero_weight_has_a_relative_error() -> None:
    assert error_scale("weight:relative", torch.zeros(2, 2)) == 1.0


def test_the_norm_is_taken_in_float64() -> None:
    tiny = torch.full((4,), 1e-30)  # its squares vanish in float32
    assert error_scale("weight:relative", tiny) == pytest.approx(2e-30, rel=1e-6)


def test_planners_add_up_squares() -> None:
    assert contribution(3.0) == 9.0
