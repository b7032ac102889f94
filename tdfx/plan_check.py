"""Whether a plan fits the model and the moments that it is to be carried out with."""

from __future__ import annotations

from collections.abc import Sequence

from tdfx.decompositions import method_for, registry
from tdfx.errors import PlanError
from tdfx.moments import Moments
from tdfx.records.candidate import Candidate, format_rank
from tdfx.records.capture import Capture
from tdfx.records.layer import Site
from tdfx.records.plan import Plan


def check_fingerprints(plan: Plan, captured: Capture, *, weights: bool) -> None:
    """Raises PlanError unless the plan is of this structure, and with ``weights`` of these weights."""
    if plan.structure != captured.structure:
        raise PlanError(
            f"the plan was made for a model of another structure (fingerprint {plan.structure[:8]}, this model "
            f"{captured.structure[:8]}): names, shapes or options of layers differ; make a plan for this model"
        )
    if weights and plan.weights != captured.weights:
        raise PlanError(
            f"the plan was made for other weights (fingerprint {plan.weights[:8]}, this model {captured.weights[:8]}); "
            "load those weights, make a plan for these, or pass the factors of the result"
        )


def planned_sites(plan: Plan, found: Sequence[Site]) -> dict[str, Site]:
    """The model's sites that the plan covers, by name.

    Raises:
        PlanError: a site is covered by neither candidate nor skip, or does not exist; a method or rank does not fit.
    """
    sites = {site.name: site for site in found}
    planned = {candidate.site for candidate in plan.candidates}
    unknown = sorted(planned - set(sites))
    if unknown:
        raise PlanError(f"the plan names {', '.join(unknown)}; the model's compressible layers are {', '.join(sites)}")
    uncovered = [name for name in sites if name not in planned | {entry.layer for entry in plan.skipped}]
    if uncovered:
        raise PlanError(
            f"the plan says nothing of {', '.join(uncovered)}; add a candidate each, e.g. with method dense"
        )
    for candidate in plan.candidates:
        _check_candidate(candidate, sites[candidate.site])
    return {candidate.site: sites[candidate.site] for candidate in plan.candidates}


def check_moments(plan: Plan, moments: Moments | None) -> None:
    """Raises PlanError unless the plan was made with these moments, or with none and there are none."""
    if plan.moments is None and moments is None:
        return
    if plan.moments is None:
        raise PlanError("the plan was made without moments; leave moments out, or make a plan with them")
    if moments is None:
        raise PlanError(
            "the plan was made with calibration moments; give them as moments, calibrate on the same data, or give the "
            "factors of its result"
        )
    if not isinstance(moments, Moments) or moments.fingerprint != plan.moments:
        found = moments.fingerprint[:8] if isinstance(moments, Moments) else type(moments).__name__
        raise PlanError(
            f"the plan was made with other moments (fingerprint {plan.moments[:8]}, found {found}); give those, or "
            "make a plan with these"
        )


def _check_candidate(candidate: Candidate, site: Site) -> None:
    if candidate.is_dense:
        return
    if candidate.method not in registry():
        raise PlanError(f"{site.name}: unknown method {candidate.method!r}; known are dense, {', '.join(registry())}")
    method = method_for(site, candidate.method)
    refusal = method.unsupported(site)
    if refusal is not None:
        raise PlanError(f"{site.name}: {candidate.method} does not apply: {refusal}")
    if not method.is_rank(site, candidate.rank):
        raise PlanError(
            f"{site.name}: {candidate.method} has no rank {format_rank(candidate.rank)} here; its full rank is "
            f"{format_rank(method.full_rank(site))}"
        )
