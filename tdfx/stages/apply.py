"""Fourth stage: carries a plan out on a model, verified before it is returned."""

from __future__ import annotations

import copy
import math
import platform
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from tdfx.agreement import allowed_difference
from tdfx.chains import Solved, biases_of, replacements_of, solve
from tdfx.correction import Unfit, correct_batch_norms, correct_spread
from tdfx.decompositions import method_for, registry
from tdfx.decompositions.base import Factors
from tdfx.dynamic import BATCH, Dynamic
from tdfx.errors import OptionError, PlanError, VerificationError
from tdfx.inputs import Inputs, run
from tdfx.metrics import find_metric
from tdfx.moments import Moments
from tdfx.parallel import as_done
from tdfx.passes.base import layer_at
from tdfx.passes.candidates import chain_cost, site_weight
from tdfx.passes.count import network_cost
from tdfx.passes.dependencies import Dependencies
from tdfx.passes.factorize import Factorize, Replacement
from tdfx.passes.in_place import InPlace
from tdfx.passes.restore_call import RestoreCall
from tdfx.passes.shape_prop import ShapeProp, bind
from tdfx.passes.sites import FindSites
from tdfx.passes.unpack_recurrent import PackRecurrent, UnpackRecurrent, packed_name, unpacked_state
from tdfx.passes.verify import VerifyChains, VerifyFullRank, relative_difference, with_reconstructed_weights
from tdfx.plan_check import check_fingerprints, check_moments, planned_sites
from tdfx.records.candidate import Candidate
from tdfx.records.capture import AUTO, INPLACE, Capture
from tdfx.records.cost import Cost
from tdfx.records.dependencies import peak_activation_bytes
from tdfx.records.inputs import InputSpec
from tdfx.records.layer import Site
from tdfx.records.plan import ESTIMATED, MEASURED, Plan
from tdfx.records.result import Coverage, PeakActivations, Report, Result
from tdfx.scoring import Scoring, scoring_of, scoring_of_stored
from tdfx.signature import Signature, without_flat_call
from tdfx.stages.capture import Model
from tdfx.stages.capture import capture as capture_model
from tdfx.stages.profile import cost_before, rest_cost
from tdfx.targets import Target, find_target, site_cost
from tdfx.version import VERSION
from tdfx.weights import bias_of, relaid

VERIFY = ("plan", "full")
EMPTY = "empty"
EMPTY_NOTE = "the factors are empty and were not verified: load their weights with load_state_dict before use"


def apply(
    model: Model,
    example_inputs: Inputs | None,
    plan: Plan,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic: Dynamic = BATCH,
    moments: Moments | None = None,
    factors: Mapping[str, Tensor] | Literal["empty"] | None = None,
    verify: str = "plan",
    capture: str = AUTO,
) -> Result:
    """Decomposes the layers as a plan says and splices the factors into a copy of the model.

    Costs and errors in the returned plan are computed anew from site, method and rank: a plan edited by hand is fine.
    Measured latencies are taken from the plan.

    Args:
        model: the model the plan was made for.
        example_inputs: as for ``capture``.
        plan: what ``plan`` returned or ``Plan.from_json`` read.
        example_kwargs: as for ``capture``.
        dynamic: as for ``capture``.
        moments: those that the plan was made with; without them only with ``factors``.
        factors: the state dict of a result of this plan; its tensors are then loaded instead of decomposing, and the
            model's own weights may differ from those the plan was made for. Errors stay as the plan states them.
            "empty" leaves the factors' weights NaN and checks of them out, for ``load_state_dict`` to fill: a factor
            that is not loaded shows in every output.
        verify: "plan" checks every chain as planned; "full" also checks every method at full rank on every layer.
        capture: as for ``capture``; "auto" is the way that the plan was made in.

    Returns:
        The compressed network with its plan, costs and report.

    Raises:
        PlanError: the plan was made for another model, or names sites, methods or ranks that do not exist there.
        OptionError: ``verify`` is not understood.
        VerificationError: a chain does not compute its layer; names the layer.
        InputError, CaptureError, WeightError: as for ``capture``.
    """
    check_verify(verify)
    if not isinstance(plan, Plan):
        raise PlanError(f"plan is a {type(plan).__name__}; expected a tdfx.Plan, which Plan.from_json reads from text")
    if factors != EMPTY and not isinstance(factors, Mapping | None):
        raise PlanError(f'factors is a {type(factors).__name__}; expected a state dict or "{EMPTY}"')
    _target_and_metric(plan)
    if factors is None:
        check_moments(plan, moments)
    started = time.perf_counter()
    tier = plan.capture if capture == AUTO and plan.capture is not None else capture
    captured = capture_model(
        model, example_inputs, example_kwargs, dynamic=dynamic, trainable=plan.trainable, capture=tier
    )
    captured_s = time.perf_counter() - started
    check_fingerprints(plan, captured, weights=factors is None)
    result = carry_out(captured, plan, moments=moments, factors=factors, verify=verify)
    timings = {"capture": captured_s, **result.report.timings_s}
    return replace(result, report=replace(result.report, timings_s=timings))


def carry_out(
    captured: Capture,
    plan: Plan,
    *,
    moments: Moments | None = None,
    factors: Mapping[str, Tensor] | Literal["empty"] | None = None,
    verify: str = "plan",
) -> Result:
    """What ``apply`` does, on a model that is captured already; the result shares the capture's layers.

    Raises:
        PlanError: the plan names sites, methods or ranks that do not exist there.
        VerificationError: a chain does not compute its layer; names the layer.
    """
    target, metric = _target_and_metric(plan)
    module = captured.module
    inputs = bind(module, captured.args, captured.kwargs)
    metas = ShapeProp(inputs).run(module)
    sites = planned_sites(plan, FindSites(metas).run(module)[0])
    if factors is None:
        scoring = scoring_of(captured, tuple(sites.values()), metas, metric, moments, plan.corrected)
    else:
        scoring = scoring_of_stored(captured, tuple(sites.values()), metas, plan)

    started = time.perf_counter()
    wanted = {c.site: replace(c, metric=metric) for c in plan.candidates}
    stored = unpacked_state(module, factors) if isinstance(factors, Mapping) else factors
    solved = _solved_all(module, sites, tuple(wanted.values()), scoring, plan.seed, stored)
    outcome = None
    samples = moments.inputs if factors is None and plan.corrected and moments is not None and solved else None
    scarcity = None if moments is None else moments.scarcity()
    output = None if moments is None else moments.output
    notes: tuple[str, ...] = () if scarcity is None else (scarcity,)
    notes += tuple(
        f"{entry.site.name} and {', '.join(layer.name for layer in entry.site.layers[1:])} share their factors"
        for entry in solved.values()
        if len(entry.site.layers) > 1
    )
    if samples is not None and not plan.trainable:
        try:
            solved, outcome = correct_spread(captured, solved, samples, output)
        except Unfit as error:
            notes += (f"the spread of outputs was not corrected: {error}",)
    replacements = replacements_of(solved)
    # Recurrent layers that no chain belongs to stay as they are.
    unpack = UnpackRecurrent(frozenset(map(packed_name, replacements)), plan.trainable)
    is_unpacked = captured.module is not captured.plain
    dense = unpack.run(captured.plain) if is_unpacked else module
    factorized = Factorize(replacements).run(dense)
    if isinstance(factors, Mapping):
        _load(factorized, unpacked_state(factorized, factors))
        _take_buffers(dense, factorized)
    compressed = PackRecurrent().run(factorized) if is_unpacked else factorized
    candidates = [
        _carried_out(captured, sites[name], candidate, solved.get(name), scoring, target, given=factors is not None)
        for name, candidate in wanted.items()
    ]
    factorized_s = time.perf_counter() - started

    started = time.perf_counter()
    verification: dict[str, Any] = {"capture": captured.max_rel_diff}
    if factors != EMPTY:
        verification["chains"] = VerifyChains(inputs, replacements).run(module)
        verification["network"] = _verify_network(captured, dense, compressed, replacements)
    if samples is not None and plan.trainable:
        try:
            compressed, outcome = correct_batch_norms(captured, compressed, samples, output)
        except Unfit as error:
            notes += (f"BatchNorm was not estimated anew: {error}",)
    if outcome is not None:
        verification["correction"] = asdict(outcome)
    if verify == "full":
        methods = tuple(registry().values())
        verification["full_rank"] = VerifyFullRank(inputs, tuple(sites.values()), methods, plan.seed).run(module)
    verified_s = time.perf_counter() - started

    carried_out = replace(
        plan,
        metric=metric,
        candidates=tuple(candidates),
        before=cost_before(captured, target),
        after=sum((c.cost for c in candidates), start=rest_cost(captured, tuple(sites.values()), target)),
    )
    after = network_cost(compressed, captured.args, captured.kwargs, target)
    if plan.latency_source == MEASURED:
        edited = _edited(plan, carried_out)
        if edited:
            source = None if target is None else ESTIMATED
            carried_out = replace(carried_out, latency_source=source)
            notes += (f"{', '.join(edited)} changed after latency was measured: it is {source or 'not known'} now",)
        else:
            carried_out, after = _with_latencies(carried_out, plan), _with_latency(after, plan.after)
    notes += _check_cost(carried_out.after, after, captured)
    report = Report(
        plan=carried_out,
        before=carried_out.before,
        after=after,
        skipped=plan.skipped,
        inputs=_input_specs(captured),
        tier=captured.tier,
        timings_s={"factorize": factorized_s, "verify": verified_s},
        verification=verification,
        notes=(*captured.notes, *plan.notes, *notes, *((EMPTY_NOTE,) if factors == EMPTY else ())),
        versions={"tdfx": VERSION, "torch": torch.__version__, "python": platform.python_version()},
        coverage=_coverage(plan, tuple(sites.values()), set(solved), carried_out.before),
        peak_activation_bytes=None if captured.tier == INPLACE else _peaks(captured.plain, compressed, inputs),
    )
    return Result(
        _as_called(compressed, captured.signature),
        carried_out,
        carried_out.before,
        after,
        plan.skipped,
        report,
        copy.deepcopy(captured.plain.root if isinstance(captured.plain, InPlace) else captured.plain),
    )


def _coverage(plan: Plan, sites: Sequence[Site], factorized: Collection[str], before: Cost) -> Coverage:
    layers = [layer for site in sites for layer in site.layers]
    return Coverage(
        layers=len(layers) + len(plan.skipped),
        compressible=len(layers),
        factorized=sum(len(site.layers) for site in sites if site.name in factorized),
        macs=sum(layer.macs for layer in layers) / before.macs if before.macs else 0.0,
    )


def _peaks(before: fx.GraphModule, after: fx.GraphModule, inputs: tuple[Tensor, ...]) -> PeakActivations:
    return PeakActivations(*(peak_activation_bytes(Dependencies(inputs).run(graph)) for graph in (before, after)))


def _as_called(compressed: fx.GraphModule, signature: Signature) -> nn.Module:
    """The network that is called as the model is."""
    if isinstance(compressed, InPlace):
        return compressed.root if signature.is_plain else without_flat_call(compressed.root)
    return compressed if signature.is_plain else RestoreCall(signature).run(compressed)


def _edited(plan: Plan, carried_out: Plan) -> list[str]:
    """Sites of which a plan says other costs than its method and rank have."""
    pairs = zip(plan.candidates, carried_out.candidates, strict=True)
    return [stated.site for stated, found in pairs if stated.cost.macs != found.cost.macs]


def _with_latencies(carried_out: Plan, plan: Plan) -> Plan:
    """The plan with another one's latencies, which no shape tells."""
    pairs = zip(carried_out.candidates, plan.candidates, strict=True)
    return replace(
        carried_out,
        candidates=tuple(replace(found, cost=_with_latency(found.cost, planned.cost)) for found, planned in pairs),
        before=_with_latency(carried_out.before, plan.before),
        after=_with_latency(carried_out.after, plan.after),
    )


def _with_latency(cost: Cost, measured: Cost) -> Cost:
    return replace(cost, latency_s=measured.latency_s)


def check_verify(verify: str) -> None:
    """Raises OptionError unless ``apply`` knows this level of verification."""
    if verify not in VERIFY:
        raise OptionError(f"verify is {verify!r}; expected one of {', '.join(map(repr, VERIFY))}")


def _target_and_metric(plan: Plan) -> tuple[Target | None, str]:
    try:
        return find_target(plan.target), find_metric(plan.metric)
    except OptionError as error:
        raise PlanError(f"the plan cannot be carried out: {error}") from error


def _solved_all(
    module: fx.GraphModule,
    sites: Mapping[str, Site],
    candidates: Sequence[Candidate],
    scoring: Scoring,
    seed: int,
    factors: Mapping[str, Tensor] | Literal["empty"] | None,
) -> dict[str, Solved]:
    """Factors of the candidates that are not dense, by site."""
    factored = [candidate for candidate in candidates if not candidate.is_dense]

    def work(candidate: Candidate) -> Solved:
        return _solved(module, sites[candidate.site], candidate, scoring, seed, factors)

    largest_first = sorted(factored, key=lambda candidate: sites[candidate.site].layer.params, reverse=True)
    found = {candidate.site: solved for candidate, solved in as_done(work, largest_first)}
    return {candidate.site: found[candidate.site] for candidate in factored}


def _solved(
    module: fx.GraphModule,
    site: Site,
    candidate: Candidate,
    scoring: Scoring,
    seed: int,
    factors: Mapping[str, Tensor] | Literal["empty"] | None,
) -> Solved:
    if factors is None:
        return solve(module, site, candidate, scoring, seed)
    method, chained, layer = method_for(site, candidate.method), scoring.chained(site), layer_at(module, site.name)
    chain = method.chain(chained, candidate.rank)
    if isinstance(factors, Mapping):
        found = _stored_factors(chain, site.name, candidate.method, factors)
    else:
        found = tuple(torch.full(spec.weight_shape, math.nan) for spec in chain)
    bias = bias_of(layer)
    if chained.layer.bias and bias is None:
        bias = nn.Parameter(layer.weight.new_zeros(chained.layer.out_channels))  # loaded with the rest
    trains = bool(layer.weight.requires_grad)
    return Solved(chained, method, candidate.rank, found, bias, trains, biases_of(module, site))


def _carried_out(
    captured: Capture,
    site: Site,
    candidate: Candidate,
    solved: Solved | None,
    scoring: Scoring,
    target: Target | None,
    *,
    given: bool,
) -> Candidate:
    """The candidate with its cost and error as they are; the error as stated where the factors were given."""
    if solved is None:
        return replace(candidate, rank=(), cost=site_cost(site, target), error=0.0, caveat="")
    cost = chain_cost(solved.method, solved.site, candidate.rank, target)
    if given:
        return replace(candidate, cost=cost)
    return replace(candidate, cost=cost, error=solved.error(site_weight(captured.module, site), scoring))


def _stored_factors(chain: Sequence[Any], site: str, method: str, factors: Mapping[str, Tensor]) -> Factors:
    stored = []
    for spec in chain:
        name = f"{site}.{method}.{spec.name}.weight"
        inside = f"{site}.weight" if spec is chain[-1] else name  # of a recurrent layer
        tensor = factors.get(name, factors.get(inside))
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != spec.parameter_shape:
            found = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else "no such tensor"
            raise PlanError(
                f"factors: {name}: found {found}, expected shape {spec.parameter_shape}; are they of this plan?"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise PlanError(f"factors: {name} holds NaN or Inf; load them anew")
        own = tensor.detach().clone()  # the result must not share memory with where they come from
        stored.append(relaid(own, spec))
    return tuple(stored)


def _load(module: nn.Module, factors: Mapping[str, Tensor]) -> None:
    try:
        module.load_state_dict(dict(factors))
    except RuntimeError as error:
        raise PlanError(f"factors do not fit the plan's network: {error}; pass the state dict of its result") from error


def _input_specs(captured: Capture) -> tuple[InputSpec, ...]:
    given: tuple[tuple[str | None, Tensor], ...]
    if captured.signature.is_plain:
        given = (*((None, value) for value in captured.args), *captured.kwargs.items())
    else:
        given = tuple(zip(captured.signature.names, captured.args, strict=True))
    return tuple(InputSpec(name, tuple(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in given)


def _verify_network(
    captured: Capture, dense: fx.GraphModule, compressed: nn.Module, replacements: Mapping[str, Replacement]
) -> float:
    """Largest relative output difference between the result and the graph with reconstructed weights."""
    reference = with_reconstructed_weights(dense, replacements)
    worst = 0.0
    for wanted, found in zip(
        run(reference, captured.args, captured.kwargs), run(compressed, captured.args, captured.kwargs), strict=True
    ):
        absolute, relative = relative_difference(wanted, found)
        if not relative <= 10 * allowed_difference(reference, wanted):
            raise VerificationError(
                f"the rewritten network differs from the one with reconstructed weights by {absolute:.3g} "
                f"({relative:.3g} of the largest output)",
                max_abs_diff=absolute,
                max_rel_diff=relative,
            )
        worst = max(worst, relative)
    return worst


def _check_cost(planned: Cost, counted: Cost, captured: Capture) -> tuple[str, ...]:
    """What was planned must be what the result, counted as a network, costs; a note where control flow decides."""
    for name in ("params", "macs", "weight_bytes"):
        wanted, found = getattr(planned, name), getattr(counted, name)
        if wanted != found and captured.tier == INPLACE and name == "macs":
            return (f"forward takes another way with the compressed layers: {found} MACs, the plan says {wanted}",)
        if wanted != found:
            raise VerificationError(f"the result has {found} {name}, the plan says {wanted}; report the model")
    return ()


def _take_buffers(dense: nn.Module, loaded: nn.Module) -> None:
    """Parameters are shared already, in place on a copy of the model the buffers are not."""
    found = dict(loaded.named_buffers())
    for name, buffer in dense.named_buffers():
        if name in found:
            buffer.copy_(found[name])
