from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
from networks import build

from tdfx.budget import RESOURCES, Budget
from tdfx.errors import BudgetError, OptionError
from tdfx.records.candidate import Candidate
from tdfx.records.cost import Cost
from tdfx.records.layer import LayerSpec, Site, Skipped
from tdfx.records.plan import Plan
from tdfx.records.profile import Profile
from tdfx.stages.capture import capture
from tdfx.stages.plan import TIERS, plan
from tdfx.stages.profile import profile

METHODS = ["svd", "spatial_svd", "tucker2"]


def cost(amount: int) -> Cost:
    return Cost(params=10 * amount, macs=amount, weight_bytes=40 * amount, latency_s=1e-6 * amount)


def site(name: str, dense: int, *others: tuple[int, float] | tuple[int, float, str]) -> list[Candidate]:
    """A dense candidate of this many MACs and others of (MACs, error) or (MACs, error, caveat)."""
    candidates = [Candidate(name, "dense", (), cost(dense), 0.0, "weight:relative")]
    for rank, (amount, error, *caveat) in enumerate(others, 1):
        candidates.append(Candidate(name, "svd", (rank,), cost(amount), error, "weight:relative", *caveat))
    return candidates


def made_up(*sites: list[Candidate], rest: int = 10, rank_multiple: int = 16) -> Profile:
    return Profile(
        sites=tuple(Site.of(LayerSpec(candidates[0].site, "linear", 1, 1)) for candidates in sites),
        candidates=tuple(candidate for candidates in sites for candidate in candidates),
        skipped=(Skipped("embedding", "a reason"),),
        before=sum((candidates[0].cost for candidates in sites), start=cost(rest)),
        rest=cost(rest),
        metric="weight:relative",
        target="ort-cpu",
        rank_multiple=rank_multiple,
        trainable=True,
        seed=3,
        latency_source="estimated",
        structure="abc",
        weights="def",
    )


def amounts(found: Plan) -> list[int]:
    return [candidate.cost.macs for candidate in found.candidates]


@cache
def profiled(name: str) -> Profile:
    model, inputs = build(name)
    return profile(capture(model, inputs), methods=METHODS)


def test_squared_errors_are_what_is_added_up() -> None:
    # 0.6 + 0.6 is more than 1.0 + 0.0, the sum of their squares is less.
    found = plan(made_up(site("a", 100, (50, 1.0), (70, 0.6)), site("b", 100, (70, 0.6))), "macs=160")
    assert amounts(found) == [70, 70]


def test_the_rest_of_the_network_counts() -> None:
    sites = site("a", 100, (50, 0.5), (90, 0.1))
    assert amounts(plan(made_up(sites, rest=10), "macs=100")) == [90]
    assert amounts(plan(made_up(sites, rest=11), "macs=100")) == [50]


def test_the_plan_holds_what_it_was_made_of() -> None:
    given = made_up(site("a", 100, (50, 0.5)))
    found = plan(given, "flops=70%")
    assert found.candidates == (given.candidates[1],)
    assert found.after == cost(60)
    assert (found.budget, found.planner, found.notes) == ("flops=70%", "knapsack", ())
    for name in ("skipped", "before", "metric", "target", "rank_multiple", "trainable", "seed", "latency_source"):
        assert getattr(found, name) == getattr(given, name)
    assert (found.structure, found.weights) == ("abc", "def")
    assert plan(given, Budget.parse("flops=70%")) == found


def test_a_network_without_sites_stays_as_it_is() -> None:
    found = plan(made_up(rest=7), "flops=100%,params=100%")
    assert (found.candidates, found.after) == ((), cost(7))
    with pytest.raises(BudgetError) as caught:
        plan(made_up(rest=7), "flops=50%")
    assert caught.value.least == {"flops": 14}


def test_a_budget_beyond_64_bits_limits_nothing() -> None:
    given = made_up(site("a", 100, (50, 0.5)))
    assert amounts(plan(given, "params=9e99,flops=9e30T,bytes=9999999TB")) == [100]


def test_choices_with_a_caveat_are_left_alone_while_others_will_do() -> None:
    given = made_up(site("a", 100, (60, 0.5), (55, 0.1, "estimated slower than dense")))
    found = plan(given, "macs=70")
    assert amounts(found) == [60]
    assert found.notes == ()


def test_choices_with_a_caveat_are_used_where_nothing_else_will_do() -> None:
    sites = (
        site("a", 100, (60, 0.5), (30, 0.9, "rank off the grid of 16")),
        site("b", 100, (60, 0.5), (30, 0.9, "estimated slower than dense")),
        site("c", 100, (60, 0.5), (30, 0.9, "rank off the grid of 16")),
        site("d", 100, (20, 0.1)),
    )
    found = plan(made_up(*sites, rest=0), "macs=110")
    assert amounts(found) == [30, 30, 30, 20]
    start = "macs=110 is reachable only with choices that are otherwise not offered; "
    assert found.notes == (start + "rank off the grid of 16: a, c", start + "estimated slower than dense: b")


def test_slower_choices_are_left_alone_while_ranks_off_the_grid_will_do() -> None:
    off_grid, slower = "rank off the grid of 16", "estimated slower than dense"
    given = made_up(site("a", 100, (60, 0.5), (50, 0.9, off_grid), (40, 0.1, slower)), rest=0)
    assert amounts(plan(given, "macs=50")) == [50]
    assert amounts(plan(given, "macs=49")) == [40]


def test_an_unreachable_budget_says_the_least_in_what_was_asked_for() -> None:
    given = made_up(site("a", 100, (40, 0.5), (25, 0.9, "rank off the grid of 16")), rest=11)
    with pytest.raises(BudgetError) as caught:
        plan(given, "flops=20%")
    error = caught.value
    assert error.least == {"flops": 72}
    assert error.scale is not None
    assert error.scale == pytest.approx(36 / 22, rel=1e-5) and math.floor(22 * error.scale) >= 36
    assert str(error) == (
        "budget flops=20% is not reachable (flops: asked 44, least reachable on its own 72 (32.5%); all together "
        "within 1.637 times what was asked). Raise the budget, allow more methods or layers, or set rank_multiple=1"
    )
    assert plan(given, "flops=32.5%").after.flops == plan(given, "flops=72").after.flops == 72


@pytest.mark.parametrize("budget", ["macs=10,params=200,bytes=100", "flops=10,macs=30", "params=5%,flops=5%"])
def test_an_unreachable_budget_says_the_least_of_each(budget: str) -> None:
    given = made_up(site("a", 100, (40, 0.5)), site("b", 80, (30, 0.5)))
    with pytest.raises(BudgetError) as caught:
        plan(given, budget)
    least = {limit.resource: RESOURCES[limit.resource](cost(80)) for limit in Budget.parse(budget).limits}
    assert caught.value.least == least
    for resource, amount in least.items():
        assert f"{resource}: asked " in str(caught.value)
        assert plan(given, f"{resource}={amount}").candidates
        with pytest.raises(BudgetError):
            plan(given, f"{resource}={amount - 1}")


def test_the_scale_is_of_all_limits_together() -> None:
    # Least MACs and least parameters need different choices.
    slim, fast = (
        Candidate("a", name, (1,), cost_, 0.5, "") for name, cost_ in (("s", Cost(1, 90, 4)), ("f", Cost(90, 1, 4)))
    )
    dense = Candidate("a", "dense", (), Cost(100, 100, 4), 0.0, "")
    given = made_up([dense, slim, fast], rest=0)
    with pytest.raises(BudgetError) as caught:
        plan(given, "macs=10,params=20")
    assert caught.value.least == {"macs": 1, "params": 1}
    assert caught.value.scale == pytest.approx(4.5, rel=1e-5)
    assert "all together within 4.5" in str(caught.value)


def test_no_advice_to_free_ranks_that_are_free() -> None:
    with pytest.raises(BudgetError) as caught:
        plan(made_up(site("a", 100, (40, 0.5)), rank_multiple=1), "flops=1%")
    assert "rank_multiple" not in str(caught.value)


def test_a_limit_below_one_mac_is_refused_in_words() -> None:
    with pytest.raises(BudgetError, match=r"least reachable on its own 100 \(45.5%\)\)"):
        plan(made_up(site("a", 100, (40, 0.5))), "flops=1")


@pytest.mark.parametrize(
    "budget", ["fifty", "flops=0%", "flops=150%", "flops=-1", "speed=50%", "", "flops=50%,flops=60%", 0.5]
)
def test_a_budget_that_is_not_understood(budget: str) -> None:
    with pytest.raises(
        BudgetError, match=r"budget not understood: .* Write resource=amount.*flops, macs, params, bytes"
    ) as caught:
        plan(made_up(site("a", 100, (40, 0.5))), budget)
    assert (caught.value.least, caught.value.scale) == ({}, None)


def ruled(*sites: list[Candidate]) -> Profile:
    """A made-up profile in which a rule gave every site but the first of each."""
    given = made_up(*sites)
    return replace(given, candidates=tuple(c for c in given.candidates if not c.is_dense), rank_rule="energy=0.9")


def test_a_rule_leaves_nothing_to_choose() -> None:
    given = ruled(site("a", 100, (50, 0.5)), site("b", 100, (70, 0.6, "estimated slower than dense")))
    found = plan(given)
    assert found.candidates == given.candidates
    assert found.after == cost(130)
    assert (found.budget, found.planner) == ("ranks=energy=0.9", "rank rule")
    assert found.notes == (
        "ranks=energy=0.9 gives choices that are otherwise not offered; estimated slower than dense: b",
    )
    assert Plan.from_json(found.to_json()) == found
    assert plan(ruled()).candidates == ()


def test_a_rule_takes_no_budget_and_its_absence_takes_one() -> None:
    with pytest.raises(OptionError, match=r"found budget 'flops=50%' and ranks=energy=0.9, .*; give one of the two"):
        plan(ruled(site("a", 100, (50, 0.5))), "flops=50%")
    with pytest.raises(BudgetError, match=r'no budget given; expected one such as budget="flops=50%"'):
        plan(made_up(site("a", 100, (50, 0.5))))
    with pytest.raises(OptionError, match="planner='greddy' is not known"):
        plan(ruled(), planner="greddy")


def test_greedy_is_a_planner_for_one_budget() -> None:
    given = made_up(site("a", 100, (50, 0.5)), site("b", 100, (70, 0.1)))
    found = plan(given, "flops=90%", planner="greedy")
    assert (amounts(found), found.planner) == ([100, 70], "greedy")
    assert plan(given, "flops=90%,macs=90%", planner="greedy").candidates == found.candidates
    with pytest.raises(OptionError, match="planner='greedy' takes one budget, found 2"):
        plan(given, "flops=90%,params=90%", planner="greedy")
    with pytest.raises(BudgetError, match="flops: asked 42, least reachable on its own 260") as caught:
        plan(given, "flops=10%", planner="greedy")
    assert caught.value.least == {"flops": 260}


def test_an_unknown_planner_is_refused() -> None:
    with pytest.raises(OptionError, match=r"greddy.*knapsack"):
        plan(made_up(site("a", 100, (40, 0.5))), "flops=50%", planner="greddy")


def objective(candidates: Sequence[Candidate]) -> float:
    return sum(candidate.error**2 for candidate in candidates)


@pytest.mark.parametrize("name", ["vgg", "unet", "siamese"])
@pytest.mark.parametrize(
    "budget", ["flops=75%", "params=60%", "macs=70%,params=70%", "bytes=80%,flops=90%", "flops=45%"]
)
def test_no_single_change_is_better_and_still_within_the_budget(name: str, budget: str) -> None:
    given = profiled(name)
    found = plan(given, budget)
    limits = Budget.parse(budget).resolve(given.before)
    assert [candidate.site for candidate in found.candidates] == [site.name for site in given.sites]
    assert all(RESOURCES[resource](found.after) <= most for resource, most in limits.items())
    assert found.after == sum((candidate.cost for candidate in found.candidates), start=given.rest)
    tier = next(tier for tier in TIERS if all(map(tier, found.candidates)))
    offered = [c for c in given.candidates if tier(c)]
    assert set(found.candidates) <= set(offered)
    for old, new in product(found.candidates, offered):
        if old.site == new.site and new.error < old.error:
            changed = found.after - old.cost + new.cost
            assert any(RESOURCES[resource](changed) > most for resource, most in limits.items())


@pytest.mark.parametrize("name", ["vgg", "siamese"])
@pytest.mark.parametrize("share", range(35, 100, 15))
def test_caveats_appear_only_where_the_budget_needs_them(name: str, share: int) -> None:
    given = profiled(name)
    found = plan(given, f"flops={share}%")
    plain = sum(min(c.cost.macs for c in given.of_site(site.name) if not c.caveat) for site in given.sites)
    needed = 100 * (plain + given.rest.macs) > share * given.before.macs
    assert bool(found.notes) == needed == any(candidate.caveat for candidate in found.candidates)
    if not needed:
        assert all(rank % 16 == 0 for candidate in found.candidates for rank in candidate.rank)


def test_the_least_reachable_is_reachable_and_nothing_below() -> None:
    given = profiled("vgg")
    with pytest.raises(BudgetError) as caught:
        plan(given, "flops=0.1%,params=0.1%")
    for resource, amount in caught.value.least.items():
        assert RESOURCES[resource](plan(given, f"{resource}={amount}").after) == amount
    scale = caught.value.scale
    assert scale is not None
    limits = {
        name: math.floor(scale * most)
        for name, most in Budget.parse("macs=0.1%,params=0.1%").resolve(given.before).items()
    }
    assert plan(given, ",".join(f"{name}={most}" for name, most in limits.items())).candidates
