"""Third stage: one candidate per site within the budget. Sees costs and errors only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tdfx.budget import RESOURCES, Budget
from tdfx.errors import BudgetError
from tdfx.metrics import contribution
from tdfx.planner import Infeasible, IntArray, Planner, find_planner
from tdfx.records.candidate import SLOWER, Candidate
from tdfx.records.cost import Cost
from tdfx.records.plan import Plan
from tdfx.records.profile import Profile

# Who is offered, from one try to the next; each contains the one before.
TIERS: tuple[Callable[[Candidate], bool], ...] = (
    lambda candidate: not candidate.caveat,
    lambda candidate: SLOWER not in candidate.caveat,
    lambda candidate: True,
)


def plan(profile: Profile, budget: str | Budget, *, planner: str = "knapsack") -> Plan:
    """Chooses a candidate for every site: total cost within the budget, total squared error least.

    Candidates with a caveat are considered only if the budget cannot be met without them, those estimated slower than
    dense only if it cannot be met with ranks off the grid either; the plan's notes say so.

    Args:
        profile: what ``profile`` returned.
        budget: e.g. "flops=50%", "params=2M", "flops=50%,bytes=8MB", or a ``tdfx.Budget``; of the whole model.
        planner: name of a planner.

    Returns:
        The plan; costs in ``after`` are at most the budget's.

    Raises:
        BudgetError: the budget is not understood or not reachable; then with ``least`` and ``scale``.
        OptionError: unknown planner.
    """
    budget = Budget.parse(budget) if not isinstance(budget, Budget) else budget
    solve = find_planner(planner)
    limits = budget.resolve(profile.before)
    for is_offered in TIERS:
        offered = [[c for c in profile.of_site(site.name) if is_offered(c)] for site in profile.sites]
        try:
            chosen = _choose(solve, offered, profile.rest, limits)
            break
        except Infeasible as error:
            least = error
    else:
        raise _unreachable(budget, limits, profile, least)
    return Plan(
        candidates=tuple(chosen),
        skipped=profile.skipped,
        budget=str(budget),
        before=profile.before,
        after=sum((candidate.cost for candidate in chosen), start=profile.rest),
        metric=profile.metric,
        planner=planner,
        target=profile.target,
        rank_multiple=profile.rank_multiple,
        trainable=profile.trainable,
        seed=profile.seed,
        latency_source=profile.latency_source,
        structure=profile.structure,
        weights=profile.weights,
        notes=_caveats(chosen, budget),
    )


def _choose(
    solve: Planner, offered: Sequence[Sequence[Candidate]], rest: Cost, limits: Mapping[str, int]
) -> list[Candidate]:
    # What cannot be changed is a site with one choice, so that limits and what is said of them are of the whole model.
    values = [np.zeros(1), *(np.array([contribution(c.error) for c in site]) for site in offered)]
    costs = [_amounts([rest], limits), *(_amounts([c.cost for c in site], limits) for site in offered)]
    _, *indices = solve(values, costs, np.array(list(limits.values()), dtype=np.int64))
    return [site[index] for site, index in zip(offered, indices, strict=True)]


def _amounts(costs: Sequence[Cost], limits: Mapping[str, int]) -> IntArray:
    return np.array([[RESOURCES[resource](cost) for resource in limits] for cost in costs], dtype=np.int64)


def _caveats(chosen: Sequence[Candidate], budget: Budget) -> tuple[str, ...]:
    by_caveat: dict[str, list[str]] = {}
    for candidate in chosen:
        if candidate.caveat:
            by_caveat.setdefault(candidate.caveat, []).append(candidate.site)
    return tuple(
        f"{budget} is reachable only with choices that are otherwise not offered; {caveat}: {', '.join(sites)}"
        for caveat, sites in by_caveat.items()
    )


def _unreachable(budget: Budget, limits: Mapping[str, int], profile: Profile, error: Infeasible) -> BudgetError:
    asked, lowest = _cost(limits), _cost(dict(zip(limits, error.least, strict=True)))
    least = {limit.resource: RESOURCES[limit.resource](lowest) for limit in budget.limits}
    # Rounded up, so that what the message says is reachable indeed.
    amounts = "; ".join(
        f"{resource}: asked {RESOURCES[resource](asked)}, least reachable on its own {amount} "
        f"({-(-1000 * amount // max(RESOURCES[resource](profile.before), 1)) / 10}%)"
        for resource, amount in least.items()
    )
    if error.scale < math.inf:
        amounts += f"; all together within {math.ceil(1e3 * error.scale) / 1e3} times what was asked"
    advice = "Raise the budget, allow more methods or layers" + ", or set rank_multiple=1" * (profile.rank_multiple > 1)
    return BudgetError(f"budget {budget} is not reachable ({amounts}). {advice}", least=least, scale=error.scale)


def _cost(limits: Mapping[str, int]) -> Cost:
    return Cost(limits.get("params", 0), limits.get("macs", 0), limits.get("bytes", 0))
