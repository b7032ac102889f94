"""Plans that are timed before they are handed over: the result against the original, in ONNX Runtime."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from statistics import median, quantiles

from tdfx.budget import LATENCY, RESOURCES, Budget, Limit
from tdfx.errors import BudgetError, OptionError
from tdfx.latency import runner
from tdfx.onnx_export import export_onnx
from tdfx.records.capture import Capture
from tdfx.records.latency import Measured, Runtime
from tdfx.records.plan import ESTIMATED, MEASURED, Plan
from tdfx.records.profile import Profile
from tdfx.records.result import Result
from tdfx.stages.frontier import least_amount
from tdfx.stages.latency import FASTER, corrected_times, original_file, refused_by_runtime
from tdfx.stages.plan import plan, written
from tdfx.tables import share

MOST_PLANS = 3
TOLERANCE = 1.1  # of what was asked for, before a plan is made anew
LEAST_USED = 0.9  # of the same
STEPS = 1000  # that the least latency beside other limits is found to, of what they leave open
GUARDS = (ESTIMATED, MEASURED)

_FASTER_LIMIT = Limit(LATENCY, Decimal(str(FASTER)), share=True)


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
    carry_out: Callable[[Profile, Budget | None], Result],
    *,
    runtime: Runtime,
    guard: str,
) -> Result:
    """Compresses and times; does so anew, at most twice, where the time is over a tenth off what was asked.

    All times are then corrected so that the last network's would have been predicted. A network that is slower than the
    original also gets a limit of latency besides, and one that is faster than predicted makes way for one that uses
    the time. Where no network is within the limit by corrected times, the quickest one is next.

    Args:
        captured: what ``capture`` returned.
        profile: with measured latencies.
        budget: None for a rank rule, which leaves nothing to do anew.
        carry_out: plans within a budget and compresses.
        runtime: that times are taken in.
        guard: "measured" for a network that must be faster than the original whatever the budget.

    Returns:
        The last network that keeps the limit, else the quickest one; its report says what was predicted and measured,
        and by how much a limit of latency is missed or left unused.

    Raises:
        BudgetError: not reachable; with the guard also where every network within the budget is slower.
    """
    found: list[tuple[Result, Measured]] = []
    within = budget
    with original_file(captured) as original:
        while len(found) < MOST_PLANS:
            try:
                result = _planned(profile, within, carry_out, guard, anew=bool(found))
            except BudgetError:
                if not found:
                    raise
                break  # by times that are corrected for the last network; that one is there
            if any(_same_choice(result.plan, earlier.plan) for earlier, _ in found):
                break
            measured = time_against_original(captured, original, result, runtime)
            found.append((result, measured))
            is_late = bool(_missed(result.plan, budget, measured, guard))
            if within is None or not (is_late or _is_too_quick(budget, measured)):
                break
            profile = corrected_times(profile, result.plan, measured)
            if _is_slow(result.plan, measured, guard):
                within = _faster(within, measured)
    in_time = [f for f in found if not _missed(f[0].plan, budget, f[1], guard)]
    result, measured = in_time[-1] if in_time else min(found, key=lambda f: f[1].ratio)
    measured = replace(measured, plans=len(found))
    missed = _missed(result.plan, budget, measured, guard)
    if missed and guard == MEASURED and measured.ratio > FASTER:
        raise _refusal(profile, budget, result.plan, measured)
    plans = f"{len(found)} plan{'s were' if len(found) > 1 else ' was'} made"
    warning = (f"latency is missed: {missed}; {plans}",) if missed else ()
    notes = (*result.report.notes, *warning, *_unused(budget, measured))
    asked = result.plan.budget if budget is None else str(budget)
    carried_out = replace(result.plan, budget=asked, notes=(*result.plan.notes, *warning))
    report = replace(result.report, plan=carried_out, measured=measured, notes=notes)
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
    export_onnx(result.module, path, *captured.call, dynamic=None)
    with refused_by_runtime():
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


def _planned(
    profile: Profile,
    within: Budget | None,
    carry_out: Callable[[Profile, Budget | None], Result],
    guard: str,
    *,
    anew: bool,
) -> Result:
    """The network of a budget, or anew the quickest where corrected times leave none within a limit of latency."""
    try:
        return carry_out(profile, within)
    except BudgetError:
        if not anew or within is None or not limits_latency(within):
            raise
    return carry_out(profile, _quickest(profile, within, slower=guard != MEASURED))


def _quickest(profile: Profile, within: Budget, *, slower: bool) -> Budget:
    """The budget with its limit of latency at the least that its other limits leave, to a part of STEPS.

    Raises:
        BudgetError: the other limits are not reachable.
    """
    others = within.without(LATENCY)
    least = most = least_amount(profile, LATENCY, slower=slower)
    if others:
        most = RESOURCES[LATENCY](plan(profile, Budget(others), slower=slower).after)

    def is_reachable(amount: int) -> bool:
        try:
            plan(profile, Budget((*others, _at_most(amount))), slower=slower)
        except BudgetError:
            return False
        return True

    steps = [*range(least, most, max((most - least) // STEPS, 1)), most]
    return within.with_limit(_at_most(steps[bisect_left(steps, True, hi=len(steps) - 1, key=is_reachable)]))


def _at_most(nanoseconds: int) -> Limit:
    return Limit(LATENCY, Decimal(nanoseconds), share=False)


def _faster(within: Budget, measured: Measured) -> Budget:
    """The budget with a limit of latency under which a network counts as faster than the original."""
    asked = _asked(within, measured)
    return within if asked is not None and asked <= FASTER else within.with_limit(_FASTER_LIMIT)


def _same_choice(one: Plan, other: Plan) -> bool:
    ours, theirs = ([(c.site, c.method, c.rank) for c in chosen.candidates] for chosen in (one, other))
    return ours == theirs


def _is_slow(chosen: Plan, measured: Measured, guard: str) -> bool:
    """Whether a network that is compressed is slower than the original, with the guard also if it is hardly faster."""
    compressed = any(not candidate.is_dense for candidate in chosen.candidates)
    return compressed and measured.ratio > (FASTER if guard == MEASURED else 1)


def _missed(chosen: Plan, budget: Budget | None, measured: Measured, guard: str) -> str:
    """What the network's time misses, "" if nothing."""
    asked = _asked(budget, measured)
    if asked is not None and measured.ratio > TOLERANCE * asked:
        return f"asked {asked:.1%} of the original's time, measured {measured.ratio:.1%}"
    if _is_slow(chosen, measured, guard):
        return f"the network takes {measured.ratio:.1%} of the original's time"
    return ""


def _asked(budget: Budget | None, measured: Measured) -> float | None:
    """The limit of latency as a share of the original's time."""
    limits = () if budget is None else (limit for limit in budget.limits if limit.resource == LATENCY)
    for limit in limits:
        return float(limit.amount) * (1 if limit.share else 1e-9 / measured.original_s)
    return None


def _is_too_quick(budget: Budget | None, measured: Measured) -> bool:
    """Whether the network leaves time unused that it was predicted to take."""
    asked, predicted = _asked(budget, measured), measured.predicted_ratio
    if asked is None or asked >= 1 or predicted is None:
        return False
    return measured.ratio < LEAST_USED * asked <= predicted


def _unused(budget: Budget | None, measured: Measured) -> tuple[str, ...]:
    """Why the network is so much quicker than asked for, if it is."""
    asked, predicted = _asked(budget, measured), measured.predicted_ratio
    if asked is None or asked >= 1 or predicted is None or measured.ratio >= LEAST_USED * asked:
        return ()
    if budget is not None and budget.drop is not None:
        return ()  # what is left of the time is not what the search was for
    if predicted < LEAST_USED * asked:
        why = "no plan within the budget that takes longer was found to have a smaller error"
    else:
        why = f"predicted were {predicted:.1%}, and no plan made anew after that came nearer in time"
    return (f"latency is left unused: asked {asked:.1%} of the original's time, measured {measured.ratio:.1%}; {why}",)


def _refusal(profile: Profile, budget: Budget | None, chosen: Plan, measured: Measured) -> BudgetError:
    """Where all networks within the budget were slower; the profile's times are corrected for the last one."""
    least = {
        limit.resource: least_amount(profile, limit.resource, slower=False)
        for limit in (budget.limits if budget else ())
    }
    amounts = "; ".join(
        f"{resource} {written(resource, amount)} ({share(amount, RESOURCES[resource](profile.before))})"
        for resource, amount in least.items()
    )
    layers = ", ".join(candidate.site for candidate in chosen.candidates if not candidate.is_dense)
    reachable = f" By times corrected for that, the least reachable on its own is {amounts}." if amounts else ""
    advice = "Raise the budget, allow more methods" if budget else "Choose a rule of lower ranks"
    return BudgetError(
        f"{chosen.budget} is not reachable with the guard: the quickest network timed takes {measured.ratio:.1%} of "
        f"the original's time with these layers compressed: {layers}.{reachable} {advice}, or lift the guard",
        least=least,
        scale=math.inf,
    )
