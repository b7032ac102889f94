"""The constants of the latency estimate, fitted to times that were measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from tdfx.decompositions import method_for
from tdfx.errors import PlanError
from tdfx.records.layer import LayerSpec
from tdfx.records.plan import MEASURED
from tdfx.records.profile import Profile
from tdfx.targets import ORT_CPU, Target

CONSTANTS = [field.name for field in fields(Target) if isinstance(getattr(ORT_CPU, field.name), float)]
HELD_OUT = 3  # every third layer is, with all its chains
LEAST_LAYERS = HELD_OUT + 1

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """A layer or chain of one site, and its measured seconds."""

    site: str
    layers: tuple[LayerSpec, ...]
    seconds: float


@dataclass(frozen=True)
class Fit:
    """A fitted target, and median relative errors of its estimates and of those of the target it started from.

    Attributes:
        target: the fitted one.
        fitted: its error on the layers that it was fitted on.
        held_out: on those that it was not.
        before: error of the target that the fit started from, on the layers held out.
    """

    target: Target
    fitted: float
    held_out: float
    before: float

    def __str__(self) -> str:
        return (
            f"median error of the estimate: {self.fitted:.1%} on the layers fitted, {self.held_out:.1%} on every "
            f"{HELD_OUT}rd layer, held out; {self.before:.1%} there before"
        )


def fit_target(profile: Profile, name: str, start: Target = ORT_CPU) -> Fit:
    """The target whose constants explain a profile's measured latencies best, in logarithms.

    Args:
        profile: with measured latencies.
        name: of the new target.
        start: the target whose constants are changed.

    Raises:
        PlanError: the profile's latencies are not measured, or it has too few distinct layers to fit and to hold some
            out.
    """
    if profile.latency_source != MEASURED:
        raise PlanError(f"the profile's latencies are {profile.latency_source}; a fit takes measured ones")
    cases = cases_of(profile)
    sites = list(dict.fromkeys(case.site for case in cases))
    if len(sites) < LEAST_LAYERS:
        raise PlanError(f"the profile has {len(sites)} layers of different shapes; a fit takes {LEAST_LAYERS} or more")
    held_out = set(sites[HELD_OUT - 1 :: HELD_OUT])
    seen = [case for case in cases if case.site not in held_out]
    kept = [case for case in cases if case.site in held_out]

    def target(logs: Floats) -> Target:
        return replace(start, name=name, **dict(zip(CONSTANTS, np.exp(logs).tolist(), strict=True)))

    first = np.log([getattr(start, constant) for constant in CONSTANTS])
    found = least_squares(lambda logs: errors(target(logs), seen), first, loss="soft_l1", f_scale=0.1, max_nfev=50)
    fitted = target(found.x)
    return Fit(fitted, median_error(fitted, seen), median_error(fitted, kept), median_error(start, kept))


def cases_of(profile: Profile) -> list[Case]:
    """What was measured, of alike layers once; without what took no time beside the layout of its ends."""
    cases: dict[tuple[LayerSpec, ...], Case] = {}
    for site in profile.sites:
        for candidate in profile.of_site(site.name):
            layers = (
                site.layers
                if candidate.is_dense
                else tuple(chain.from_iterable(method_for(site, candidate.method).chains(site, candidate.rank)))
            )
            unnamed = tuple(replace(layer, name="") for layer in layers)
            if candidate.cost.latency_s:
                cases.setdefault(unnamed, Case(site.name, layers, candidate.cost.latency_s))
    return list(cases.values())


def errors(target: Target, cases: Sequence[Case]) -> Floats:
    """Logarithms of estimated over measured seconds."""
    estimated = np.array([sum(map(target.layer_latency, case.layers)) for case in cases])
    found: Floats = np.log(estimated / np.array([case.seconds for case in cases]))
    return found


def median_error(target: Target, cases: Sequence[Case]) -> float:
    """Median relative error."""
    return float(np.median(np.abs(np.expm1(errors(target, cases)))))
