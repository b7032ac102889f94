"""Second stage: the sites of a captured model, their candidates, costs and errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tdfx.cache import ListCache
from tdfx.errors import OptionError
from tdfx.metrics import find_metric
from tdfx.moments import Moments
from tdfx.passes.candidates import FindCandidates
from tdfx.passes.count import total_cost
from tdfx.passes.shape_prop import ShapeProp, bind
from tdfx.passes.sites import FindSites
from tdfx.progress import Report, reporter
from tdfx.rank_rules import RankRule
from tdfx.records.capture import Capture
from tdfx.records.cost import Cost
from tdfx.records.layer import Site, Skipped
from tdfx.records.plan import ESTIMATED, MOST_SEED
from tdfx.records.profile import Profile
from tdfx.scoring import scoring_of
from tdfx.selection import Selection
from tdfx.targets import Target, find_target, site_cost


def profile(
    captured: Capture,
    *,
    methods: Sequence[str] | None = None,
    ranks: str | None = None,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    metric: str | None = None,
    moments: Moments | None = None,
    correct: bool = True,
    target: str | None = "ort-cpu",
    rank_multiple: int | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    progress: bool | Report | None = None,
) -> Profile:
    """Finds what can be compressed and what each choice costs and loses; the slow stage.

    Where factors are found by iteration, the errors of five ranks of a method and layer are computed and those of the
    others interpolated; ``apply`` computes the errors of what it builds.

    Args:
        captured: what ``capture`` returned.
        methods: names of decompositions, None for all; exactly one with ``ranks``.
        ranks: a rule that gives every site its rank instead of a budget: "vbmf" (of the unfoldings; 0 leaves a layer as
            it is), "energy=0.95" (least rank that keeps this share of the squared norm), "ratio=0.33" (of each mode's
            size), "compression=75%" (leaves a quarter of each layer's parameters).
        include: globs over qualified layer names; only these are compressed.
        exclude: globs; these are not.
        overrides: ``{glob: {"methods": [...], "rank": r, "skip": True}}``; a rank is then the only choice there.
        metric: of the errors: "weight:absolute", "weight:relative", "weight:scaled", or with moments "feature:..." of
            the same forms, or "loss"; None for the best that there are moments for.
        moments: what ``calibrate`` returned; factors are then solved for the inputs that layers really see.
        correct: correct the biases of chains for what the factors change on average, where the mean of the layer's
            input is known: from moments, or from a BatchNorm before it.
        target: runtime whose latency is estimated, so that slower chains are not offered; None for no estimate.
        rank_multiple: ranks offered are multiples of this; None for the target's grid (16 for "ort-cpu"), or any rank
            with ``ranks``.
        seed: of the decompositions, 0 or more.
        cache_dir: folder that keeps errors between runs; an interrupted run goes on from it.
        progress: a function, True, False, or None for a bar on terminals only.

    Returns:
        Sites, candidates, costs and skips; no weights.

    Raises:
        OptionError: an option is not understood or a glob matches no layer.
        PlanError: the moments are of another model, or the metric needs moments and there are none.
        WeightError: a site's weight holds NaN or Inf.
    """
    if not isinstance(moments, Moments | None):
        raise OptionError(f"moments is a {type(moments).__name__}; expected what tdfx.calibrate returned")
    rule = None if ranks is None else RankRule.parse(ranks)
    runtime = find_target(target)
    multiple = 1 if rule is not None and rank_multiple is None else _rank_multiple(rank_multiple, runtime)
    if not _is_int(seed) or not 0 <= seed <= MOST_SEED:
        raise OptionError(f"seed is {seed!r}; expected a whole number from 0 to {MOST_SEED}")
    selection = Selection.of(methods, include, exclude, overrides)
    if rule is not None:
        selection.check_one_method()
    module = captured.module
    metas = ShapeProp(bind(module, captured.args, captured.kwargs)).run(module)
    sites, skipped = FindSites(metas).run(module)
    scoring = scoring_of(captured, sites, metas, find_metric(metric, moments), moments, correct)
    selection.check(
        [
            *(layer.name for site in sites for layer in site.layers),
            *(entry.layer for entry in (*skipped, *captured.skipped)),
        ]
    )
    unwanted = [entry for site in sites if (entry := selection.reason_to_skip(site)) is not None]
    wanted = tuple(site for site in sites if site.name not in {entry.layer for entry in unwanted})
    with reporter(progress) as report:
        candidates, hopeless = FindCandidates(
            wanted, selection, scoring, runtime, multiple, seed, ListCache(cache_dir), report, rule
        ).run(module)
    offered = {candidate.site for candidate in candidates}
    kept = tuple(site for site in wanted if site.name in offered)
    return Profile(
        sites=kept,
        candidates=candidates,
        skipped=(*captured.skipped, *skipped, *_of_all_layers(sites, (*unwanted, *hopeless))),
        before=cost_before(captured, runtime),
        rest=rest_cost(captured, kept, runtime),
        metric=scoring.metric,
        target=target,
        rank_multiple=multiple,
        trainable=captured.trainable,
        seed=seed,
        latency_source=None if runtime is None else ESTIMATED,
        structure=captured.structure,
        weights=captured.weights,
        rank_rule=None if rule is None else str(rule),
        corrected=correct,
        moments=None if moments is None else moments.fingerprint,
        capture=captured.tier,
    )


def _of_all_layers(sites: Sequence[Site], skipped: Sequence[Skipped]) -> Iterator[Skipped]:
    """Skipped sites, and the layers that share the weight of one."""
    layers = {site.name: site.layers for site in sites}
    for entry in skipped:
        yield entry
        for layer in layers[entry.layer][1:]:
            yield Skipped(layer.name, f"its weight is that of {entry.layer}: {entry.reason}")


def cost_before(captured: Capture, target: Target | None) -> Cost:
    """Cost of the whole model as given."""
    cost = total_cost(captured.workloads, captured.original, target)
    return replace(cost, params=captured.params, weight_bytes=captured.weight_bytes)


def rest_cost(captured: Capture, sites: Sequence[Site], target: Target | None) -> Cost:
    """Cost of the normalized model without its sites."""
    whole = total_cost(captured.module_workloads, captured.module, target)
    for site in sites:
        whole = whole - site_cost(site, target)
    return whole


def _rank_multiple(rank_multiple: int | None, target: Target | None) -> int:
    if rank_multiple is None:
        return 1 if target is None else target.rank_grid
    if not _is_int(rank_multiple) or rank_multiple < 1:
        raise OptionError(
            f"rank_multiple is {rank_multiple!r}; expected a positive integer, or None for the target's grid"
        )
    return rank_multiple


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
