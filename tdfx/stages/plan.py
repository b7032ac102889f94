"""Third stage: one candidate per site within the budget. Sees costs and errors only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import numpy as np

from tdfx.budget import LATENCY, RESOURCES, Budget
from tdfx.errors import BudgetError, OptionError
from tdfx.metrics import contribution
from tdfx.planner import Infeasible, IntArray, Planner, find_planner
from tdfx.rank_rules import RankRule
from tdfx.records.candidate import SLOWER, Candidate
from tdfx.records.cost import Cost
from tdfx.records.plan import Plan
from tdfx.records.profile import Profile
from tdfx.tables import seconds

# Who is offered, from one try to the next; each contains the one before.
TIERS: tuple[Callable[[Candidate], bool], ...] = (
    lambda candidate: not candidate.caveat,
    lambda candidate: SLOWER not in candidate.caveat,
    lambda candidate: True,
)

RULED = "rank rule"
"""What stands as the planner in a plan that a rank rule made."""


def plan(
    profile: Profile, budget: str | Budget | None = None, *, planner: str = "knapsack", slower: bool = True
) -> Plan:
    """Chooses a candidate for every site: total cost within the budget, total squared error least.

    For the metric "loss" it is the sum of the errors themselves.

    Candidates with a caveat are considered only if the budget cannot be met without them, those slower than
    dense only if it cannot be met with ranks off the grid either; the plan's notes say so. A profile made with a rank
    rule leaves nothing to choose: its plan takes no budget and holds what the rule gave.

    Args:
        profile: what ``profile`` returned.
        budget: e.g. "flops=50%", "params=2M", "flops=50%,bytes=8MB", or a ``tdfx.Budget``; of the whole model.
            None with a rank rule.
        planner: name of a planner.
        slower: whether candidates that are slower than dense may be chosen where nothing else is within the budget.

    Returns:
        The plan; costs in ``after`` are at most the budget's.

    Raises:
        BudgetError: the budget is not understood or not reachable; then with ``least`` and ``scale``.
        OptionError: unknown planner, one that takes fewer limits, or a budget besides a rank rule.
    """
    parsed = read_budget(budget, profile.rank_rule, planner)
    chosen = profile.candidates if parsed is None else _within(parsed, profile, find_planner(planner), slower)
    asked = f"ranks={profile.rank_rule}" if parsed is None else str(parsed)
    return Plan(
        candidates=chosen,
        skipped=profile.skipped,
        budget=asked,
        before=profile.before,
        after=sum((candidate.cost for candidate in chosen), start=profile.rest),
        metric=profile.metric,
        planner=RULED if parsed is None else planner,
        target=profile.target,
        rank_multiple=profile.rank_multiple,
        trainable=profile.trainable,
        seed=profile.seed,
        latency_source=profile.latency_source,
        structure=profile.structure,
        weights=profile.weights,
        notes=_caveats(chosen, asked, ruled=parsed is None),
        corrected=profile.corrected,
        moments=profile.moments,
        capture=profile.capture,
    )


def read_budget(budget: str | Budget | None, ranks: str | None, planner: str) -> Budget | None:
    """The budget, or None with a rank rule; checks that the planner takes it.

    Raises:
        BudgetError: there is neither a budget nor a rule, or the budget is not understood.
        OptionError: there are both, the rule is not understood, or the planner is unknown or takes fewer limits.
    """
    if ranks is not None:
        rule = RankRule.parse(ranks)
        if budget is not None:
            raise OptionError(
                f"found budget {str(budget)!r} and ranks={rule}, which leaves nothing to choose; give one of the two"
            )
        find_planner(planner)
        return None
    if budget is None:
        raise BudgetError(
            'no budget given; expected one such as budget="flops=50%" or budget="params=2M,flops=1.2G", or instead '
            'ranks such as ranks="vbmf" with one method'
        )
    parsed = budget if isinstance(budget, Budget) else Budget.parse(budget)
    with suppress(Infeasible):  # only how many limits there are is asked here
        find_planner(planner)([], [], np.zeros(len(parsed.resolve(Cost(0, 0, 0, 0.0))), dtype=np.int64))
    return parsed


def _within(budget: Budget, profile: Profile, solve: Planner, slower: bool) -> tuple[Candidate, ...]:
    limits = budget.resolve(profile.before)
    for is_offered in TIERS if slower else TIERS[:-1]:
        offered = [[c for c in profile.of_site(site.name) if is_offered(c)] for site in profile.sites]
        try:
            return tuple(_choose(solve, offered, profile.rest, limits))
        except Infeasible as error:
            least = error
    raise _unreachable(budget, limits, profile, least, slower)


def _choose(
    solve: Planner, offered: Sequence[Sequence[Candidate]], rest: Cost, limits: Mapping[str, int]
) -> list[Candidate]:
    # What cannot be changed is a site with one choice, so that limits and what is said of them are of the whole model.
    values = [np.zeros(1), *(np.array([contribution(c.metric, c.error) for c in site]) for site in offered)]
    costs = [_amounts([rest], limits), *(_amounts([c.cost for c in site], limits) for site in offered)]
    _, *indices = solve(values, costs, np.array(list(limits.values()), dtype=np.int64))
    return [site[index] for site, index in zip(offered, indices, strict=True)]


def _amounts(costs: Sequence[Cost], limits: Mapping[str, int]) -> IntArray:
    return np.array([[RESOURCES[resource](cost) for resource in limits] for cost in costs], dtype=np.int64)


def _caveats(chosen: Sequence[Candidate], budget: str, *, ruled: bool) -> tuple[str, ...]:
    by_caveat: dict[str, list[str]] = {}
    for candidate in chosen:
        if candidate.caveat:
            by_caveat.setdefault(candidate.caveat, []).append(candidate.site)
    start = f"{budget} gives" if ruled else f"{budget} is reachable only with"
    return tuple(
        f"{start} choices that are otherwise not offered; {caveat}: {', '.join(sites)}"
        for caveat, sites in by_caveat.items()
    )


def _unreachable(
    budget: Budget, limits: Mapping[str, int], profile: Profile, error: Infeasible, slower: bool
) -> BudgetError:
    asked, lowest = _cost(limits), _cost(dict(zip(limits, error.least, strict=True)))
    least = {limit.resource: RESOURCES[limit.resource](lowest) for limit in budget.limits}
    # Rounded up, so that what the message says is reachable indeed.
    amounts = "; ".join(
        f"{resource}: asked {written(resource, RESOURCES[resource](asked))}, least reachable on its own "
        f"{written(resource, amount)} "
        f"({-(-1000 * amount // max(RESOURCES[resource](profile.before), 1)) / 10}%)"
        for resource, amount in least.items()
    )
    if error.scale < math.inf:
        amounts += f"; all together within {math.ceil(1e3 * error.scale) / 1e3} times what was asked"
    advice = "Raise the budget, allow more methods or layers" + ", or set rank_multiple=1" * (profile.rank_multiple > 1)
    if not slower:
        kept = [site.name for site in profile.sites if all(SLOWER in c.caveat for c in _factored(profile, site.name))]
        advice += ", or lift the guard" + (
            f"; nothing is faster than these layers as they are: {', '.join(kept)}" * bool(kept)
        )
    return BudgetError(f"budget {budget} is not reachable ({amounts}). {advice}", least=least, scale=error.scale)


def _factored(profile: Profile, name: str) -> list[Candidate]:
    return [candidate for candidate in profile.of_site(name) if not candidate.is_dense]


def written(resource: str, amount: int) -> str:
    """An amount of a resource, for people."""
    return seconds(amount / 1e9) if resource == LATENCY else str(amount)


def _cost(limits: Mapping[str, int]) -> Cost:
    return Cost(limits.get("params", 0), limits.get("macs", 0), limits.get("bytes", 0), limits.get(LATENCY, 0) / 1e9)
