from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tdfx.budget import LATENCY, RESOURCES, Budget
from tdfx.errors import BudgetError, OptionError, PlanError
from tdfx.records.candidate import Candidate
from tdfx.records.capture import Capture
from tdfx.records.cost import Cost
from tdfx.records.layer import LayerSpec, Site
from tdfx.records.plan import Plan
from tdfx.records.profile import Profile
from tdfx.records.result import Result
from tdfx.stages.apply import carry_out
from tdfx.stages.capture import capture
from tdfx.stages.compress import compress
from tdfx.stages.plan import plan
from tdfx.stages.profile import profile
from tdfx.stages.search import HALVINGS, NEIGHBOURS, Search, Trial, cheapest, read_drop

MEASURED: list[tuple[int, float]] = []
"""(Parameters, score) of every network that ``closeness`` has measured."""
MOST = HALVINGS + len(NEIGHBOURS) + 1
WHOLE = 1280


@pytest.fixture(autouse=True)
def nothing_measured() -> None:
    MEASURED.clear()


def cost(amount: int, params: int = 0) -> Cost:
    return Cost(params=params, macs=amount, weight_bytes=4 * params)


def made_up(amounts: list[int], rest: int = 0) -> Profile:
    """One site that has a candidate for each amount of MACs, the dearer the better; parameters go the other way."""
    choices = [
        Candidate("a", "svd", (amount + 1,), cost(amount, 10_000 - amount), 1 - amount / max(amounts), "loss")
        for amount in amounts
    ]
    site = Site.of(LayerSpec("a", "linear", 1, 1))
    return Profile(
        sites=(site,),
        candidates=tuple(choices),
        skipped=(),
        before=cost(max(amounts) + rest, 10_000),
        rest=cost(rest),
        metric="loss",
        target=None,
        rank_multiple=1,
        trainable=False,
        seed=0,
        latency_source=None,
        structure="abc",
        weights="def",
    )


def searched(
    score_of: Callable[[int], float], amounts: list[int], budget: str = "drop=0", rest: int = 0
) -> tuple[Trial, list[int]]:
    """What a search finds where the score depends on the MACs alone, and the MACs that it measured."""
    measured: list[int] = []

    def score(chosen: Plan) -> float:
        measured.append(chosen.after.macs)
        return score_of(chosen.after.macs)

    parsed = Budget.parse(budget)
    scores: Any = SimpleNamespace(original=lambda: 1.0, of=score)
    profiled = made_up(amounts, rest)
    planner = "greedy" if len(parsed.limits) == 0 else "knapsack"
    search = Search(profiled, parsed, "macs", planner, True, scores, lambda *_: None)
    assert parsed.drop is not None
    found = search.run(parsed.drop)
    assert len(measured) == len(set(measured)) <= MOST
    holding = [amount for amount in measured if score_of(amount) >= 1 - float(parsed.drop.amount)]
    assert found.amount == found.plan.after.macs == min(holding)
    assert found.score == score_of(found.amount)
    return found, measured


def test_of_few_networks_the_cheapest_that_holds_is_found() -> None:
    rng = np.random.default_rng(0)
    for _ in range(25):
        amounts = [int(amount) for amount in rng.choice(np.arange(1, 200), size=rng.integers(1, 9), replace=False)]
        threshold, rest = int(rng.integers(0, max(amounts) + 1)), int(rng.integers(0, 50))
        found, _ = searched(lambda amount, t=threshold + rest: float(amount >= t), amounts, rest=rest)  # type: ignore[misc]
        wanted = min(amount + rest for amount in amounts if amount >= threshold)
        assert found.amount - wanted <= -(-(max(amounts) - min(amounts) + 1) // 2**HALVINGS)


@pytest.mark.parametrize("threshold", [0, 1, 2, 9, 10, 11, 640, 1279, 1280])
def test_of_many_networks_one_within_the_last_halving_is_found(threshold: int) -> None:
    found, _ = searched(lambda amount: float(amount >= threshold), list(range(1, WHOLE + 1)))
    assert 0 <= found.amount - max(threshold, 1) < WHOLE / 2**HALVINGS


def test_a_cheaper_neighbour_that_holds_is_taken() -> None:
    step = WHOLE // 2**HALVINGS
    assert searched(lambda amount: float(amount == WHOLE), list(range(1, WHOLE + 1)))[0].amount == WHOLE
    for parts in NEIGHBOURS:
        wanted = WHOLE - parts * step
        found, _ = searched(lambda amount, w=wanted: float(amount in (w, WHOLE)), list(range(1, WHOLE + 1)))  # type: ignore[misc]
        assert found.amount == wanted


def test_neighbours_are_measured_only_where_there_are_any() -> None:
    found, measured = searched(lambda amount: 1.0, [5, 1000])
    assert found.amount == 5 and measured == [1000, 5]


def test_scores_on_the_edge_hold() -> None:
    # 0.8 - 0.1 > 0.7 in binary
    scores: Any = SimpleNamespace(original=lambda: 0.8, of=lambda chosen: 0.7 if chosen.after.macs < 9 else 0.8)
    budget = Budget.parse("drop=0.1")
    assert budget.drop is not None
    assert (
        Search(made_up([3, 9]), budget, "flops", "knapsack", True, scores, lambda *_: None).run(budget.drop).amount == 6
    )


def test_limits_hold_for_every_network() -> None:
    amounts = list(range(0, WHOLE + 1, 10))
    _, measured = searched(lambda amount: 1.0, amounts, "drop=0,macs=50%")
    assert max(measured) == 640
    found, measured = searched(lambda amount: 1.0, amounts, "drop=0,params=9.5K")
    assert min(measured) == found.amount == 500  # parameters go up as MACs go down
    assert max(measured) == WHOLE


def test_a_limit_that_leaves_too_little() -> None:
    with pytest.raises(BudgetError, match=r"original has 1, wanted is 0\.9, the best reached is 0\.5") as caught:
        searched(lambda amount: amount / WHOLE, list(range(1, WHOLE + 1)), "drop=10%,macs=50%")
    assert "larger drop or higher limits" in str(caught.value)


def network(seed: int = 0) -> nn.Sequential:
    """Layers whose singular values fall fast, so that low ranks do."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for width, height in ((24, 32), (32, 32), (32, 16)):
        layer = nn.Linear(width, height)
        with torch.no_grad():
            left, values, right = torch.linalg.svd(torch.randn(height, width, generator=generator), full_matrices=False)
            layer.weight.copy_(left * (values * 0.6 ** torch.arange(len(values))) @ right)
            layer.bias.copy_(torch.randn(height, generator=generator))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


@cache
def captured() -> Capture:
    return capture(network(), torch.randn(8, 24, generator=torch.Generator().manual_seed(0)))


@cache
def profiled() -> Profile:
    return profile(captured(), methods=["svd"], target=None, rank_multiple=1)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(captured().args[0])
    return found


def closeness(model: nn.Module) -> float:
    """Higher is better: 1 for the original."""
    wanted = outputs(captured().original)
    score = 1 - float((outputs(model) - wanted).norm() / wanted.norm())
    MEASURED.append((sum(weight.numel() for weight in model.parameters()), score))
    return score


def search(budget: str | Budget, **options: Any) -> Result:
    return cheapest(captured(), profiled(), budget, **{"evaluate": closeness, **options})


@pytest.mark.parametrize("minimize", sorted({*RESOURCES} - {LATENCY}))
@pytest.mark.parametrize("budget", ["drop=1%", "drop=0.2", "drop=20%,bytes=60%"])
def test_the_cheapest_of_all_measured_networks_that_hold(budget: str, minimize: str) -> None:
    parsed = Budget.parse(budget)
    found = search(budget, minimize=minimize)
    assert len(MEASURED) <= MOST + 1
    assert found.plan.budget == budget
    assert parsed.drop is not None
    wanted = 1 - float(parsed.drop.amount)
    score = closeness(found.module)
    assert (found.after.params, score) in MEASURED[1:-1]
    assert score >= wanted
    assert found.after.params == min(params for params, score in MEASURED if score >= wanted)
    assert found.after.params < found.before.params
    for limit in parsed.limits:
        assert found.after.weight_bytes <= float(limit.amount) * found.before.weight_bytes


def test_no_share_of_a_fine_grid_gives_a_network_much_cheaper() -> None:
    holding = []
    for percent in range(12, 101, 4):
        chosen = plan(profiled(), f"params={percent}%")
        if closeness(carry_out(captured(), chosen).module) >= 0.9:
            holding.append(chosen.after.params)
    found = search("drop=10%", minimize="params")
    assert len(holding) > 2
    assert found.after.params <= min(holding) + found.before.params / 2**HALVINGS


def test_a_relative_drop_is_of_the_original_score() -> None:
    assert search("drop=10%", evaluate=lambda model: 50 * closeness(model)).plan == search("drop=10%").plan
    absolute = search("drop=5", evaluate=lambda model: 50 * closeness(model))
    assert absolute.plan.candidates == search("drop=0.1").plan.candidates
    negative = search("drop=10%", evaluate=lambda model: closeness(model) - 2)
    assert negative.plan == search("drop=10%").plan


def test_limits_out_of_reach_are_refused() -> None:
    with pytest.raises(BudgetError, match="params=1% is not reachable") as caught:
        search("drop=1%,params=1%")
    assert caught.value.least["params"] > 0
    assert MEASURED == []


def test_a_second_search_measures_nothing(tmp_path: Path) -> None:
    first = search("drop=10%", cache_dir=tmp_path)
    assert MEASURED != []
    MEASURED.clear()
    again = search("drop=10%", cache_dir=tmp_path)
    assert MEASURED == []
    assert again.plan == first.plan
    assert again.report.notes == first.report.notes
    torch.testing.assert_close(outputs(again.module), outputs(first.module), rtol=0, atol=0)


def test_the_report_says_what_was_measured() -> None:
    found = search("drop=10%")
    note = found.report.notes[-1]
    share = f"{100 * found.after.flops / found.before.flops:.1f}%"
    assert note.startswith("drop=10%: score of the original 1, wanted 0.9, reached 0.9")
    assert f"at {share} of its flops; {len(MEASURED) - 1} networks measured" in note
    assert f"note: {note}" in str(found.report)


def test_progress_is_reported() -> None:
    seen: list[tuple[str, int, int]] = []
    search("drop=10%", progress=lambda *step: seen.append(step))
    assert seen[0][0] == "original" and seen[1][0] == "flops 100.0%" and seen[-1][0] == "search"
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert all(done <= total for _, done, total in seen) and seen[-1][1] == seen[-1][2]


@pytest.mark.parametrize("value", [math.nan, "0.9", None])
def test_a_score_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(OptionError, match="evaluate returned"):
        search("drop=1%", evaluate=lambda model: value)


@pytest.mark.parametrize(
    ("budget", "minimize", "evaluate", "found"),
    [
        ("drop=1%", "flops", None, "budget drop=1% needs evaluate"),
        ("flops=50%", "flops", closeness, "the budget .flops=50%. has no drop"),
        (None, "flops", closeness, "the budget .none. has no drop"),
        ("drop=1%", "flosp", closeness, "minimize: unknown resource 'flosp'; did you mean 'flops'"),
        ("flops=50%", "flosp", None, "minimize: unknown resource 'flosp'"),
        ("dorp=1%", "flops", closeness, "unknown resource 'dorp'"),
        (0.5, "flops", None, "found 0.5"),
    ],
)
def test_options_that_do_not_go_together(
    budget: Any, minimize: str, evaluate: Callable[[nn.Module], float] | None, found: str
) -> None:
    with pytest.raises(BudgetError, match=found):
        read_drop(budget, None, "knapsack", minimize, evaluate)


def test_budgets_without_a_drop_pass() -> None:
    assert read_drop("flops=50%", None, "knapsack", "flops", None) is None
    assert read_drop(None, "vbmf", "knapsack", "flops", None) is None


def test_the_planner_must_take_the_limits_and_what_is_minimized() -> None:
    assert read_drop("drop=1%", None, "greedy", "flops", closeness) is not None
    with pytest.raises(OptionError, match="greedy"):
        read_drop("drop=1%,params=50%", None, "greedy", "flops", closeness)
    with pytest.raises(OptionError, match="budget 'drop=1%' and ranks=vbmf"):
        read_drop("drop=1%", "vbmf", "knapsack", "flops", closeness)


def test_a_search_needs_a_drop() -> None:
    with pytest.raises(BudgetError, match="has no drop"):
        search("flops=50%", evaluate=None)


def test_a_profile_of_another_model_is_refused() -> None:
    with pytest.raises(PlanError, match="another capture"):
        cheapest(capture(network(1), captured().args), profiled(), "drop=1%", evaluate=closeness)


def test_plan_sends_a_drop_to_compress() -> None:
    with pytest.raises(BudgetError, match=r"use tdfx\.compress with evaluate"):
        plan(profiled(), "drop=1%")


def compressed(**options: Any) -> Result:
    return compress(network(), captured().args, methods=["svd"], target=None, rank_multiple=1, **options)


def test_compress_searches() -> None:
    found = compressed(budget="drop=10%", minimize="params", evaluate=closeness)
    wanted = search("drop=10%", minimize="params")
    assert found.plan == wanted.plan
    assert found.report.notes == wanted.report.notes
    assert found.report.timings_s["search"] > 0
    assert closeness(found.module) >= 0.9


def test_compress_refuses_before_the_slow_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdfx.stages.compress.capture_model", None)
    with pytest.raises(BudgetError, match="needs evaluate"):
        compressed(budget="drop=1%")
    with pytest.raises(BudgetError, match="has no drop"):
        compressed(budget="flops=50%", evaluate=closeness)
    with pytest.raises(BudgetError, match="minimize"):
        compressed(budget="flops=50%", minimize="time")


def test_compress_warns_of_choices_otherwise_not_offered() -> None:
    with pytest.warns(UserWarning, match="reachable only with choices that are otherwise not offered"):
        compress(
            network(),
            captured().args,
            methods=["svd"],
            target=None,
            rank_multiple=16,
            budget="drop=100%",
            evaluate=lambda model: 1.0,
        )
