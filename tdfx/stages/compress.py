"""The whole way in one call."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tdfx.budget import LATENCY, Budget
from tdfx.dynamic import BATCH, Dynamic
from tdfx.errors import OptionError
from tdfx.evaluation import Evaluate
from tdfx.inputs import Inputs
from tdfx.metrics import LOSS
from tdfx.moments import Moments
from tdfx.progress import Report as ProgressReport
from tdfx.records.capture import AUTO
from tdfx.records.latency import LatencyTable, Runtime
from tdfx.records.plan import MEASURED
from tdfx.records.profile import Profile
from tdfx.records.result import Result
from tdfx.scores import Scores
from tdfx.stages.apply import carry_out, check_verify
from tdfx.stages.calibrate import calibrate
from tdfx.stages.capture import Model
from tdfx.stages.capture import capture as capture_model
from tdfx.stages.guard import carry_out_measured, check_guard, limits_latency
from tdfx.stages.latency import check_runtime, measure_latency, measured_rank_grid, notes_on, with_latency
from tdfx.stages.plan import plan, read_budget
from tdfx.stages.profile import profile
from tdfx.stages.search import cheapest, read_drop
from tdfx.timing import timed

UNTIMED = (
    "latency is by the table that was given; the network itself was not timed: compare it there with tdfx bench or, "
    "without PyTorch, the latency kit's run.py --bench"
)


def compress(
    model: Model,
    example_inputs: Inputs | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    budget: str | Budget | None = None,
    methods: Sequence[str] | None = None,
    ranks: str | None = None,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    metric: str | None = None,
    calibration: object = None,
    output: str = "auto",
    correct: bool = True,
    planner: str = "knapsack",
    target: str | None = "ort-cpu",
    guard: str = "estimated",
    runtime: Runtime | None = None,
    latency: LatencyTable | None = None,
    rank_multiple: int | None = None,
    trainable: bool = False,
    dynamic: Dynamic = BATCH,
    capture: str = AUTO,
    verify: str = "plan",
    seed: int = 0,
    minimize: str = "flops",
    evaluate: Evaluate | None = None,
    cache_dir: str | Path | None = None,
    progress: bool | ProgressReport | None = None,
) -> Result:
    """Compresses a model to a budget, or by a rank rule: captures, profiles, plans and applies.

    Args:
        model: a trained module, an ``ExportedProgram``, or the path of a ``.pt2`` file; it is left untouched.
        example_inputs: a tensor or a tuple of arguments that it takes, as for ``capture``; costs are those of these
            shapes. None for those that an exported program was made with.
        example_kwargs: keyword arguments, likewise.
        dynamic: sizes that stay free, as for ``capture``: the batch, and dimensions that are named as in
            ``{"input_ids": {1: "sequence"}}``.
        budget: "flops=50%", "macs=1.2G", "params=2M", "bytes=8MB", several joined by commas, or a ``tdfx.Budget``;
            "latency=12ms" or "latency=50%" of a run in ONNX Runtime, measured; shares are of the whole model. With
            ``evaluate`` also "drop=1%" of the original's score, or "drop=0.01".
        methods: names of decompositions, None for all; exactly one with ``ranks``.
        ranks: instead of a budget, a rule for the rank of every layer: "vbmf", "energy=0.95", "ratio=0.33" or
            "compression=75%"; see ``profile``.
        include: globs over qualified layer names; only these are compressed.
        exclude: globs; these are not.
        overrides: ``{glob: {"methods": [...], "rank": r, "skip": True}}``.
        metric: "weight", or with calibration inputs "feature", each with ":absolute", ":relative" or ":scaled", or
            "loss"; None for "loss" with calibration inputs, "weight:relative" without.
        calibration: unlabeled inputs as for ``calibrate``, or the ``Moments`` that it returned; a few hundred do.
        output: what the loss takes outputs for: "logits", "values" or "auto".
        correct: correct the biases of what is compressed, and with calibration inputs the spread of its outputs.
        planner: name of a planner; plans that are made anew with a limit of latency besides take "knapsack".
        target: runtime the result is meant for, so that chains estimated slower than dense are not offered; None for no
            estimate.
        guard: "measured" times every choice in ONNX Runtime and the network at the end: it is faster than the original,
            or the budget counts as not reachable. "estimated" goes by the target's estimate. Budgets of latency are
            measured with both.
        runtime: what latency is measured in; None for one thread of ONNX Runtime on the CPU.
        latency: times that were measured before or on another device, in place of measuring here; then the finished
            network is not timed either.
        rank_multiple: None for the target's grid, that of the runtime where latency is measured, or free ranks with
            ``ranks``; 1 for free ranks.
        trainable: keep BatchNorm and Dropout for fine-tuning.
        capture: as for ``capture``.
        verify: "plan", or "full" to check every method at full rank too.
        seed: of the decompositions; same inputs and seed give the same result on the same machine.
        minimize: with a drop, what the network is to be cheapest in: "flops", "macs", "params", "bytes" or "latency".
        evaluate: with a drop, called with about ten networks in turn: a network's score, higher is better; see
            ``tdfx.stages.search.cheapest`` for what is sure of the one returned.
        cache_dir: folder that keeps errors and scores between runs, scores under the function's file, name and source.
        progress: a function, True, False, or None for a bar on terminals only.

    Returns:
        Module, plan, costs before and after, skips and report.

    Raises:
        BudgetError: neither a budget nor ranks, a budget not understood, or not reachable; no network within the drop.
        InputError, OptionError, CaptureError, WeightError, VerificationError: see the stages.

    Warns:
        UserWarning: the budget was reachable only, or the rule gave, choices that are otherwise not offered.
    """
    asked = read_drop(budget, ranks, planner, minimize, evaluate)  # options of the last stages, before the slow ones
    parsed = read_budget(budget, ranks, planner) if asked is None else None
    check_verify(verify)
    check_guard(guard)
    is_about_time = guard == MEASURED or limits_latency(asked or parsed) or (asked is not None and minimize == LATENCY)
    if not isinstance(latency, LatencyTable | None):
        raise OptionError(
            f"latency is a {type(latency).__name__}; expected a LatencyTable, as LatencyTable.from_json reads it"
        )
    if latency is not None and runtime is not None and runtime != latency.runtime:
        raise OptionError(
            f"runtime is {runtime}, and the latency table was measured in {latency.runtime}; leave out the one that is "
            "not meant"
        )
    measures = latency is None and is_about_time
    runtime = runtime or Runtime()
    check_runtime(runtime)
    timings: dict[str, float] = {}
    with timed(timings, "capture"):
        captured = capture_model(
            model, example_inputs, example_kwargs, dynamic=dynamic, trainable=trainable, capture=capture
        )
    if isinstance(calibration, Moments | None):
        moments = calibration
    else:
        kind = LOSS if metric in (None, LOSS) else "feature"
        with timed(timings, "calibrate"):
            moments = calibrate(
                captured, calibration, metric=kind, output=output, seed=seed, cache_dir=cache_dir, progress=progress
            )
    if measures and rank_multiple is None and ranks is None:
        rank_multiple = measured_rank_grid(runtime, cache_dir)
    with timed(timings, "profile"):
        profiled = profile(
            captured,
            methods=methods,
            ranks=ranks,
            include=include,
            exclude=exclude,
            overrides=overrides,
            metric=metric,
            moments=moments,
            correct=correct,
            target=target,
            rank_multiple=rank_multiple,
            seed=seed,
            cache_dir=cache_dir,
            progress=progress,
        )
    if measures:
        with timed(timings, "latency"):
            latency = measure_latency(captured, profiled, runtime=runtime, cache_dir=cache_dir, progress=progress)
    if latency is not None:
        profiled = with_latency(profiled, latency)

    scores = None if evaluate is None else Scores(captured, evaluate, moments=moments, cache_dir=cache_dir)

    def carried_out(found: Profile, within: Budget | None) -> Result:
        slower = guard != MEASURED
        solver = planner if within == (asked or parsed) else "knapsack"  # takes another limit as well
        if asked is None or within is None or evaluate is None:
            with timed(timings, "plan"):
                chosen = plan(found, within, planner=solver, slower=slower)
            return carry_out(captured, chosen, moments=moments, verify=verify)
        with timed(timings, "search"):
            return cheapest(
                captured,
                found,
                within,
                minimize=minimize,
                evaluate=evaluate,
                moments=moments,
                planner=solver,
                slower=slower,
                verify=verify,
                scores=scores,
                progress=progress,
            )

    if measures:
        result = carry_out_measured(captured, profiled, asked or parsed, carried_out, runtime=runtime, guard=guard)
    else:
        result = carried_out(profiled, asked or parsed)
    for note in result.plan.notes:
        warnings.warn(note, stacklevel=2)
    timings |= result.report.timings_s
    notes = () if latency is None else notes_on(latency, profiled)
    if is_about_time and not measures:
        notes = (*notes, UNTIMED)
    return replace(result, report=replace(result.report, timings_s=timings, notes=(*result.report.notes, *notes)))
