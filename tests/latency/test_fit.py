"""The latency estimate's constants, recovered from times that another target's estimate gives."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import tdfx
from tdfx.decompositions import registry
from tdfx.errors import OptionError, PlanError
from tdfx.latency.fit import CONSTANTS, cases_of, fit_target
from tdfx.records.plan import MEASURED
from tdfx.records.profile import Profile
from tdfx.targets import ORT_CPU, Target, find_target, layer_cost

SLOW = replace(ORT_CPU, operator_s=2e-5, blocked_mac_s=5e-11, sweep_s=1e-10, copy_byte_s=4e-10)
CHANNELS = (16, 32, 48, 64, 96)


@cache
def profiled() -> Profile:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(CHANNELS):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1)]
    captured = tdfx.capture(nn.Sequential(*layers).eval(), torch.randn(1, 16, 14, 14))
    return tdfx.profile(captured, methods=["spatial_svd", "tucker2"])


def timed_by(target: Target) -> Profile:
    """The profile with this target's estimates for measured times."""
    sites = {site.name: site for site in profiled().sites}

    def timed(candidate: tdfx.Candidate) -> tdfx.Candidate:
        site = sites[candidate.site]
        layers = site.layers if candidate.is_dense else registry()[candidate.method].chain(site, candidate.rank)
        latency_s = sum(layer_cost(layer, target).latency_s or 0.0 for layer in layers)
        return replace(candidate, cost=replace(candidate.cost, latency_s=latency_s))

    return replace(profiled(), candidates=tuple(map(timed, profiled().candidates)), latency_source=MEASURED)


def test_times_of_a_slower_machine_are_explained() -> None:
    fit = fit_target(timed_by(SLOW), "slow")
    assert fit.target.name == "slow"
    assert fit.before > 0.5
    assert fit.fitted < 0.02 and fit.held_out < 0.02
    assert f"{fit.held_out:.1%}" in str(fit)


def test_what_fits_stays() -> None:
    fit = fit_target(timed_by(ORT_CPU), "same")
    assert max(fit.before, fit.fitted, fit.held_out) < 1e-6
    for constant in CONSTANTS:
        assert getattr(fit.target, constant) == pytest.approx(getattr(ORT_CPU, constant), rel=1e-3)


def test_alike_layers_count_once() -> None:
    cases = cases_of(timed_by(SLOW))
    assert len({tuple(replace(layer, name="") for layer in case.layers) for case in cases}) == len(cases)


def test_few_layers_are_refused() -> None:
    few = replace(profiled(), latency_source=MEASURED, sites=profiled().sites[:3], candidates=tuple(
        c for c in profiled().candidates if c.site in {s.name for s in profiled().sites[:3]}
    ))  # fmt: skip
    with pytest.raises(PlanError, match="3 layers of different shapes; a fit takes 4 or more"):
        fit_target(few, "few")


def test_estimates_are_refused() -> None:
    with pytest.raises(PlanError, match="latencies are estimated; a fit takes measured ones"):
        fit_target(profiled(), "mine")


def test_a_target_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "slow.json"
    path.write_text(json.dumps(asdict(SLOW)))
    assert find_target(str(path)) == replace(SLOW, name=str(path))
    with pytest.raises(OptionError, match="cannot be read"):
        find_target(str(tmp_path / "none.json"))
    path.write_text("{}")
    with pytest.raises(OptionError, match="missing 'name'"):
        find_target(str(path))


def test_all_constants_are_fitted() -> None:
    assert {"operator_s", "blocked_mac_s", "weight_byte_s"} <= set(CONSTANTS) and "rank_grid" not in CONSTANTS


class Tied(nn.Module):
    """An embedding whose weight is the head's too. Input (2, 6) of numbers below 200."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(200, 64), nn.Linear(64, 200, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(x))  # type: ignore[no-any-return]


def test_layers_of_one_weight_are_estimated_together() -> None:
    found = tdfx.profile(tdfx.capture(Tied().eval(), torch.randint(200, (2, 6))), methods=["svd"])
    (site,) = found.sites
    assert len(site.layers) == 2
    timed = tuple(replace(c, cost=replace(c.cost, latency_s=1e-3)) for c in found.candidates)
    dense, *chains = cases_of(replace(found, candidates=timed, latency_source=MEASURED))
    assert len(dense.layers) == 2 and chains
    assert all(len(case.layers) == 4 for case in chains)
