from __future__ import annotations

import math

import pytest
import torch

from tdfx.decompositions.metric import Metric
from tdfx.errors import OptionError
from tdfx.metrics import METRICS, contribution, error_of, find_metric, form_of
from tdfx.moments import Moments, SiteMoments

WEIGHT = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
SITE = SiteMoments(torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([[5.0, 1], [1, 2]]))


def moments(output: str | None) -> Moments:
    return Moments({"layer": SITE}, (), 4, output, (), "s", "w", False)


@pytest.mark.parametrize("name", [None, "weight", "weight:relative"])
def test_relative_is_the_default(name: str | None) -> None:
    assert find_metric(name) == "weight:relative"


def test_the_default_is_the_best_that_there_is_data_for() -> None:
    assert find_metric(None, moments("logits")) == "loss"
    assert find_metric(None, moments(None)) == "feature:relative"
    assert find_metric("feature") == "feature:relative"


@pytest.mark.parametrize("name", METRICS)
def test_metrics_are_found_by_name(name: str) -> None:
    assert find_metric(name) == name


def test_a_near_miss_gets_a_suggestion() -> None:
    with pytest.raises(OptionError, match=r"unknown metric 'weight:relativ'; did you mean 'weight:relative'\? known"):
        find_metric("weight:relativ")


@pytest.mark.parametrize("name", ["entropy", "", 7])
def test_an_unknown_metric_gets_the_list(name: str) -> None:
    with pytest.raises(OptionError, match=f"unknown metric {name!r}; known metrics: {', '.join(METRICS)}"):
        find_metric(name)


def test_errors_of_weights() -> None:
    errors = {name: error_of(name, 2.0, WEIGHT, None) for name in METRICS if name.startswith("weight")}
    assert errors == {"weight:absolute": 2.0, "weight:relative": 0.4, "weight:scaled": 0.5}


def test_errors_of_features_and_of_the_loss() -> None:
    form = Metric(SITE.in_cov.double())
    whole = math.sqrt(9 * 2 + 16 * 3)
    assert error_of("feature:absolute", 2.0, WEIGHT, form) == 2.0
    assert error_of("feature:relative", 2.0, WEIGHT, form) == pytest.approx(2.0 / whole, rel=1e-12)
    assert error_of("feature:scaled", 2.0, WEIGHT, form) == 1.0
    assert error_of("loss", 2.0, WEIGHT, form) == 2.0


def test_forms_hold_what_the_metric_looks_at() -> None:
    assert form_of("weight:relative", SITE, corrected=True) is None
    feature, loss = form_of("feature:relative", SITE, corrected=True), form_of("loss", SITE, corrected=True)
    assert feature is not None and feature.out_cov is None
    assert loss is not None and loss.out_cov is not None
    difference = torch.tensor([[1.0, -1.0], [0.5, 2.0]], dtype=torch.float64)
    wanted = torch.trace(SITE.out_cov.double() @ difference @ SITE.in_cov.double() @ difference.T)  # type: ignore[union-attr]
    assert loss.norm(difference) ** 2 == pytest.approx(float(wanted), rel=1e-12)


def test_without_a_corrected_bias_the_mean_counts() -> None:
    uncorrected, corrected = (form_of("feature", SITE, corrected=c) for c in (False, True))
    assert uncorrected is not None and corrected is not None
    row = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    assert uncorrected.norm(row) ** 2 - corrected.norm(row) ** 2 == pytest.approx(9.0, rel=1e-12)  # (row @ mean)^2


def test_a_zero_weight_has_a_relative_error() -> None:
    assert error_of("weight:relative", 0.0, torch.zeros(2, 2), None) == 0.0


def test_planners_add_up_squares_but_for_the_loss() -> None:
    assert contribution("weight:relative", 3.0) == 9.0
    assert contribution("feature:absolute", 3.0) == 9.0
    assert contribution("loss", 3.0) == 3.0


def test_one_observation_leaves_no_direction_free() -> None:
    one = SiteMoments(torch.tensor([3.0, 4.0]), torch.zeros(2, 2), None, observations=1)
    form = form_of("feature:absolute", one, corrected=True)
    assert form is not None
    torch.testing.assert_close(form.in_cov, 12.5 * torch.eye(2, dtype=torch.float64))
    seen = form_of("feature:absolute", one, corrected=True, shrink=False)
    assert seen is not None
    assert not seen.in_cov.any()
