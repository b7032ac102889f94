"""What the planner's best networks lose, from the cheapest to the whole model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

from tdfx.budget import Budget, Limit, find_resource
from tdfx.errors import BudgetError, OptionError
from tdfx.evaluation import Evaluate
from tdfx.metrics import contribution
from tdfx.moments import Moments
from tdfx.progress import Report, reporter
from tdfx.records.candidate import SLOWER
from tdfx.records.capture import Capture
from tdfx.records.frontier import Frontier, Point
from tdfx.records.plan import Plan
from tdfx.records.profile import Profile
from tdfx.scores import Scores, check_belongs
from tdfx.stages.plan import plan, read_budget

STEPS = 10_000
"""Shares are rounded up to a whole number of these parts, hundredths of a percent."""


def frontier(
    captured: Capture,
    profile: Profile,
    *,
    moments: Moments | None = None,
    resource: str = "flops",
    shares: Sequence[float] | None = None,
    points: int = 8,
    planner: str = "knapsack",
    evaluate: Evaluate | None = None,
    cache_dir: str | Path | None = None,
    progress: bool | Report | None = None,
) -> Frontier:
    """The curve of cost, predicted error and, if asked for, measured score.

    Args:
        captured: what ``capture`` returned.
        profile: what ``profile`` returned for it.
        moments: those that the profile was made with.
        resource: "flops", "macs", "params", "bytes" or "latency".
        shares: of the whole model's resource, each above 0 and at most 1; those that no plan is within are left out.
            None for ``points`` shares at equal distances from the least that can be reached to 1.
        points: number of shares, 2 or more.
        planner: name of a planner.
        evaluate: called with each network once; its score, higher is better. None to measure nothing.
        cache_dir: folder that keeps scores between runs; ``tdfx.scores.Scores`` says under what.
        progress: a function, True, False, or None for a bar on terminals only.

    Returns:
        The points by share, the least first.

    Raises:
        BudgetError: the resource is unknown, or a share out of range.
        OptionError: an option is not understood, or ``evaluate`` returns no finite number.
        PlanError: the profile is of another capture or other moments.
    """
    if shares is None:
        shares = _equal_distances(profile, resource, points)
    budgets = {share: _within(resource, share) for share in shares}
    read_budget(_within(resource, 1), profile.rank_rule, planner)
    scores = None
    if evaluate is not None:
        check_belongs(captured, profile, moments)
        scores = Scores(captured, evaluate, moments=moments, cache_dir=cache_dir)
    found: list[Point] = []
    with reporter(progress) as report:
        report("original", 0, len(budgets) + 1)
        original_score = None if scores is None else scores.original()
        for done, share in enumerate(sorted(budgets), 1):
            report(f"{resource} {share:.1%}", done, len(budgets) + 1)
            try:
                chosen = plan(profile, budgets[share], planner=planner)
            except BudgetError:  # not reachable, as the budgets themselves are understood
                continue
            score = None if scores is None else scores.of(chosen)
            found.append(Point(share, chosen.after, predicted_error(chosen), score, chosen))
        report("frontier", len(budgets) + 1, len(budgets) + 1)
    return Frontier(tuple(found), resource, profile.metric, profile.before, original_score, profile.latency_source)


def least_amount(profile: Profile, resource: str, *, slower: bool = True) -> int:
    """The least of a resource that any plan needs; without what is slower than dense, where a site has a choice.

    Raises:
        BudgetError: unknown resource.
    """
    amount = find_resource(resource, "resource")
    choices = (profile.of_site(site.name) for site in profile.sites)
    offered = ([c for c in site if slower or SLOWER not in c.caveat] or site for site in choices)
    return amount(profile.rest) + sum(min(amount(candidate.cost) for candidate in site) for site in offered)


def predicted_error(chosen: Plan) -> float:
    """What the planner adds up: squared errors, for the metric "loss" the errors."""
    return math.fsum(contribution(candidate.metric, candidate.error) for candidate in chosen.candidates)


def _equal_distances(profile: Profile, resource: str, points: int) -> list[float]:
    if not isinstance(points, int) or isinstance(points, bool) or points < 2:
        raise OptionError(f"points is {points!r}; expected a whole number of 2 or more")
    whole = max(find_resource(resource, "resource")(profile.before), 1)
    least = min(max(-(-STEPS * least_amount(profile, resource) // whole), 1), STEPS)
    steps = (least + math.ceil(index * (STEPS - least) / (points - 1)) for index in range(points))
    return sorted({step / STEPS for step in steps})


def _within(resource: str, share: float) -> Budget:
    find_resource(resource, "resource")
    if not isinstance(share, int | float) or isinstance(share, bool):
        raise OptionError(f"shares holds {share!r}; expected numbers above 0 and at most 1")
    return Budget((Limit(resource, Decimal(str(share)), share=True),))
