"""The cheapest network whose measured score holds: a search over the planner's frontier."""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

from tdfx.budget import Budget, Drop, Limit, find_resource
from tdfx.errors import BudgetError
from tdfx.evaluation import Evaluate
from tdfx.moments import Moments
from tdfx.progress import Report, reporter
from tdfx.records.capture import Capture
from tdfx.records.plan import Plan
from tdfx.records.profile import Profile
from tdfx.records.result import Result
from tdfx.scores import Scores, check_belongs
from tdfx.stages.apply import carry_out
from tdfx.stages.frontier import least_amount
from tdfx.stages.plan import plan, read_budget
from tdfx.tables import share

HALVINGS = 7
NEIGHBOURS = (3, 5)
"""How far below the one found others are tried, in parts of the last halving: between those that were halved to."""

_FORMS = 'for example compress(..., budget="drop=1%", minimize="flops", evaluate=function)'


@dataclass(frozen=True)
class Trial:
    """A network that was measured.

    Attributes:
        plan: that makes it.
        amount: of what is minimized.
        score: measured.
    """

    plan: Plan
    amount: int
    score: float


def cheapest(
    captured: Capture,
    profile: Profile,
    budget: str | Budget,
    *,
    minimize: str = "flops",
    evaluate: Evaluate,
    moments: Moments | None = None,
    planner: str = "knapsack",
    slower: bool = True,
    verify: str = "plan",
    cache_dir: str | Path | None = None,
    scores: Scores | None = None,
    progress: bool | Report | None = None,
) -> Result:
    """The cheapest of the measured networks whose score is within the drop.

    The planner's best network for an amount of a resource is measured, and the amount halved in on: it scores about the
    better, the more it may cost. Then a few cheaper neighbours are tried, since scores are noisy. What is sure: the
    returned network's own score holds, no network that was measured is cheaper and holds as well, and all limits are
    kept. That no other network does better is not. At most ten networks are measured,
    besides the original.

    Args:
        captured: what ``capture`` returned.
        profile: what ``profile`` returned for it.
        budget: with a drop: "drop=1%" of the original's score, or "drop=0.01"; limits besides it hold for every network
            ("drop=1%,params=2M").
        minimize: "flops", "macs", "params", "bytes" or "latency".
        evaluate: called with a network, returns its score; higher is better.
        moments: those that the profile was made with.
        planner: name of a planner.
        slower: as for ``plan``.
        verify: as for ``apply``, for the returned network.
        cache_dir: folder that keeps scores between runs; ``tdfx.scores.Scores`` says under what.
        scores: those of an earlier search for the same, so that no network is measured twice.
        progress: a function, True, False, or None for a bar on terminals only.

    Returns:
        The network, with a note on the scores; the plan's budget is the one asked for.

    Raises:
        BudgetError: an option is not understood, the limits are not reachable, or no measured network's score holds.
        OptionError: ``evaluate`` cannot be called, or returns no finite number.
        PlanError: the profile is of another capture or other moments.
    """
    asked = read_drop(budget, profile.rank_rule, planner, minimize, evaluate)
    if asked is None or asked.drop is None:
        raise BudgetError(f"budget {budget} has no drop; expected one, {_FORMS}")
    check_belongs(captured, profile, moments)
    scores = scores or Scores(captured, evaluate, moments=moments, cache_dir=cache_dir)
    with reporter(progress) as report:
        search = Search(profile, asked, minimize, planner, slower, scores, report)
        best = search.run(asked.drop)
    chosen = replace(best.plan, budget=str(asked))
    result = carry_out(captured, chosen, moments=moments, verify=verify)
    note = (
        f"{asked.drop}: score of the original {search.original:.6g}, wanted {float(search.wanted):.6g}, reached "
        f"{best.score:.6g} at {share(best.amount, search.amount_of(profile.before))} of its {minimize}; "
        f"{len(search.trials)} networks measured"
    )
    return replace(result, report=replace(result.report, notes=(*result.report.notes, note)))


def read_drop(
    budget: str | Budget | None, ranks: str | None, planner: str, minimize: str, evaluate: object
) -> Budget | None:
    """The budget if it has a drop, None if it has not; checks the options that belong to it.

    Raises:
        BudgetError: the budget or ``minimize`` is not understood, a drop comes without ``evaluate``, or the reverse.
        OptionError: the planner is unknown or takes fewer limits, or there is a rank rule besides a drop.
    """
    find_resource(minimize, "minimize")
    asked = budget if isinstance(budget, Budget | None) else Budget.parse(budget)
    if asked is None or asked.drop is None:
        if evaluate is not None:
            found = "none" if asked is None else str(asked)
            raise BudgetError(f"evaluate is given, but the budget ({found}) has no drop to hold it to; {_FORMS}")
        return None
    if evaluate is None:
        raise BudgetError(f"budget {asked} needs evaluate, which measures a network's score; {_FORMS}")
    read_budget(_limited(asked, minimize, 1) if ranks is None else asked, ranks, planner)
    return asked


def _limited(budget: Budget, minimize: str, amount: int) -> Budget:
    """The limits with at most this amount of what is minimized, which is less than its own limit."""
    return Budget((*budget.without(minimize), Limit(minimize, Decimal(max(amount, 1)), share=False)))


class Search:
    """What has been measured so far.

    Attributes:
        trials: one for each network.
        original: score of the model as given.
        wanted: the least score that holds.
    """

    def __init__(
        self,
        profile: Profile,
        budget: Budget,
        minimize: str,
        planner: str,
        slower: bool,
        scores: Scores,
        report: Report,
    ) -> None:
        self.trials: dict[tuple[object, ...], Trial] = {}
        self.original, self.wanted = 0.0, Decimal(0)
        self.amount_of = find_resource(minimize, "minimize")
        self._profile, self._budget, self._minimize = profile, budget, minimize
        self._planner, self._slower, self._scores, self._report = planner, slower, scores, report

    def run(self, drop: Drop) -> Trial:
        """The cheapest network that holds."""
        whole = Budget(self._budget.limits or (Limit(self._minimize, Decimal(1), share=True),))
        dearest = self._plan(whole)
        self._report("original", 0, self._most)
        self.original = self._scores.original()
        self.wanted = drop.least_score(self.original)
        best = self._measured(dearest)
        if not self._holds(best):
            raise BudgetError(
                f"budget {self._budget}: no network's score holds; the original has {self.original:.6g}, wanted is "
                f"{float(self.wanted):.6g}, the best reached is {best.score:.6g}. Allow a larger drop or higher "
                "limits, give calibration data, or set rank_multiple=1"
            )
        least = least_amount(self._profile, self._minimize, slower=self._slower)
        fails = least - 1
        span = best.amount - fails
        while best.amount - fails > _part(span, HALVINGS):
            middle = (best.amount + fails) // 2
            trial = self._within(middle)
            if trial is not None and self._holds(trial):
                best = trial
            else:
                fails = middle
        for parts in NEIGHBOURS:
            self._within(max(best.amount - parts * _part(span, HALVINGS), least))
        self._report("search", self._most, self._most)
        return min(filter(self._holds, self.trials.values()), key=lambda trial: (trial.amount, -trial.score))

    @property
    def _most(self) -> int:
        return HALVINGS + len(NEIGHBOURS) + 2

    def _holds(self, trial: Trial) -> bool:
        return Decimal(repr(trial.score)) >= self.wanted

    def _within(self, amount: int) -> Trial | None:
        """The best network of at most this amount, measured; None if there is none."""
        try:
            chosen = self._plan(_limited(self._budget, self._minimize, amount))
        except BudgetError:
            return None
        return self._measured(chosen)

    def _plan(self, budget: Budget) -> Plan:
        return plan(self._profile, budget, planner=self._planner, slower=self._slower)

    def _measured(self, chosen: Plan) -> Trial:
        amount = self.amount_of(chosen.after)
        if chosen.candidates not in self.trials:
            part = share(amount, self.amount_of(self._profile.before))
            self._report(f"{self._minimize} {part}", len(self.trials) + 1, self._most)
            self.trials[chosen.candidates] = Trial(chosen, amount, self._scores.of(chosen))
        return self.trials[chosen.candidates]


def _part(amount: int, halvings: int) -> int:
    """What is left of it, rounded up."""
    return -(-amount >> halvings)
