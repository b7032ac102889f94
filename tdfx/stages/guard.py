"""Plans that are timed before they are handed over: the result against the original, in ONNX Runtime."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles

from tdfx.budget import LATENCY, Budget, nanoseconds
from tdfx.errors import BudgetError, OptionError
from tdfx.latency import runner
from tdfx.moments import Moments
from tdfx.onnx_export import export_onnx
from tdfx.records.capture import Capture
from tdfx.records.latency import Measured, Runtime
from tdfx.records.plan import ESTIMATED, MEASURED, Plan
from tdfx.records.profile import Profile
from tdfx.records.result import Result
from tdfx.stages.apply import carry_out
from tdfx.stages.latency import FASTER, original_file, scaled_chains
from tdfx.stages.plan import plan

MOST_PLANS = 3
TOLERANCE = 1.1  # of what was asked for, before a plan is made anew
GUARDS = (ESTIMATED, MEASURED)


def check_guard(guard: str) -> None:
    """Raises OptionError unless it is the name of a guard."""
    if guard not in GUARDS:
        raise OptionError(f"guard is {guard!r}; expected one of {', '.join(map(repr, GUARDS))}")


def limits_latency(budget: Budget | None) -> bool:
    """Whether a budget limits latency."""
    return budget is not None and any(limit.resource == LATENCY for limit in budget.limits)


def carry_out_measured(
    captured: Capture,
    profile: Profile,
    budget: Budget | None,
    *,
    runtime: Runtime,
    guard: str,
    moments: Moments | None = None,
    planner: str = "knapsack",
    verify: str = "plan",
) -> Result:
    """Plans, compresses and times; plans anew, at most twice, where the time misses what was asked by over a tenth.

    The measured times of all chains are then multiplied by one factor, with which the last network's time would have
    been predicted.

    Args:
        captured: what ``capture`` returned.
        profile: with measured latencies.
        budget: None for a rank rule.
        runtime: that times are taken in.
        guard: "measured" also for a network that must be faster than the original whatever the budget.
        moments: those that the profile was made with.
        planner: name of a planner.
        verify: as for ``apply``.

    Returns:
        The network; its report says what was predicted and measured, and whether a limit was missed.

    Raises:
        BudgetError: not reachable; with the guard also where every network within the budget is slower.
    """
    with original_file(captured) as original:
        for plans in range(1, MOST_PLANS + 1):
            chosen = plan(profile, budget, planner=planner, slower=guard != MEASURED)
            result = carry_out(captured, chosen, moments=moments, verify=verify)
            measured = replace(time_against_original(captured, original, result, runtime), plans=plans)
            missed = _missed(chosen, budget, measured, guard)
            if not missed or budget is None:  # a rank rule leaves nothing to plan anew
                break
            if plans < MOST_PLANS:
                profile = scaled_chains(profile, chosen, measured.ratio)
    if missed and guard == MEASURED and measured.ratio > FASTER:
        raise BudgetError(
            f"budget {chosen.budget} is not reachable with the guard: the last of {MOST_PLANS} networks within it "
            f"takes {measured.ratio:.1%} of the original's time. Raise the budget, allow more methods, or lift "
            "the guard",
            least={},
            scale=math.inf,
        )
    notes = (f"latency is missed: {missed}; {plans} plans were made",) if missed else ()
    carried_out = replace(result.plan, notes=(*result.plan.notes, *notes))
    report = replace(result.report, plan=carried_out, measured=measured, notes=(*result.report.notes, *notes))
    return replace(result, plan=carried_out, report=report)


def with_time(captured: Capture, result: Result, runtime: Runtime) -> Result:
    """A result whose report says how long it takes, beside the original."""
    with original_file(captured) as original:
        measured = time_against_original(captured, original, result, runtime)
    return replace(result, report=replace(result.report, measured=measured))


def time_against_original(captured: Capture, original: Path, result: Result, runtime: Runtime) -> Measured:
    """Seconds of the original's ONNX file and of a result in ONNX Runtime, in turn.

    Raises:
        ExportError, VerificationError: as for ``export_onnx``.
    """
    path = original.with_name("compressed.onnx")
    export_onnx(result.module, path, captured.args, captured.kwargs, dynamic=None)
    before, after = runner.network_times([str(original), str(path)], runtime.as_dict())
    return measured_of(before, after, result.plan, runtime)


def measured_of(original: list[float], compressed: list[float], chosen: Plan, runtime: Runtime) -> Measured:
    """What times of both, round by round, say."""
    ratios = [after / before for before, after in zip(original, compressed, strict=True)]
    lower, middle, upper = quantiles(ratios, n=4)
    before_s, after_s = chosen.before.latency_s, chosen.after.latency_s
    return Measured(
        original_s=median(original),
        compressed_s=median(compressed),
        ratio=middle,
        quartiles=(lower, upper),
        predicted_ratio=None if before_s is None or after_s is None else after_s / before_s,
        plans=1,
        runtime=runtime,
    )


def _missed(chosen: Plan, budget: Budget | None, measured: Measured, guard: str) -> str:
    """What the network's time misses, "" if nothing."""
    compressed = any(not candidate.is_dense for candidate in chosen.candidates)
    if guard == MEASURED and compressed and measured.ratio > FASTER:
        return f"the network takes {measured.ratio:.1%} of the original's time"
    limits = () if budget is None else (limit for limit in budget.limits if limit.resource == LATENCY)
    for limit in limits:
        # As a share, which does not change with the machine's pace between then and now.
        asked = float(limit.amount) * (1 if limit.share else 1 / nanoseconds(chosen.before))
        if measured.ratio > TOLERANCE * asked:
            return f"asked {asked:.1%} of the original's time, measured {measured.ratio:.1%}"
    return ""
