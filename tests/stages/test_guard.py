"""Networks that are timed before they are handed over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from timed_networks import INPUT, Machine, compress, measured_once, network, profiled
from torch import nn

import tdfx
from tdfx.errors import BudgetError, OptionError
from tdfx.records.latency import Measured, Runtime
from tdfx.records.profile import Profile
from tdfx.records.result import Result
from tdfx.stages import guard as guard_stage
from tdfx.stages.frontier import least_amount
from tdfx.stages.latency import with_latency


def test_a_network_in_time_is_returned_at_once(timed: list[bytes | str], ratios: list[float]) -> None:
    ratios[:] = [1.05]
    result = compress("latency=60%")
    measured = result.report.measured
    assert measured is not None and measured.plans == 1
    assert measured.ratio == pytest.approx(1.05 * measured.predicted_ratio)
    assert measured.predicted_ratio <= 0.6
    assert result.plan.latency_source == "measured"
    assert not [note for note in result.report.notes if "latency" in note]
    assert "measured" in str(result.report) and "predicted" in str(result.report)
    assert tdfx.Report.from_json(result.report.to_json()) == result.report


def test_a_network_that_misses_is_planned_anew(timed: list[bytes | str], ratios: list[float]) -> None:
    ratios[:] = [1.3, 1.0]
    result = compress("latency=60%")
    assert result.report.measured is not None and result.report.measured.plans == 2
    first = tdfx.plan(with_latency(profiled(), measured_once()), "latency=60%")
    assert result.after.flops < first.after.flops


def test_a_limit_in_seconds_holds_for_the_seconds_measured(
    timed: list[bytes | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine has become half as fast since the table was made."""
    measured_of = guard_stage.measured_of

    def slow(captured: object, original: Path, result: Result, runtime: Runtime) -> Measured:
        before, after = measured_once().network_s, result.plan.after.latency_s
        assert after is not None
        found = result.plan.before.latency_s
        assert found is not None
        return measured_of([2 * before] * 5, [2 * before * after / found] * 5, result.plan, runtime)

    monkeypatch.setattr(guard_stage, "time_against_original", slow)
    limit_us = round(1e6 * 1.2 * measured_once().network_s)
    result = compress(f"latency={limit_us}us")
    measured = result.report.measured
    assert measured is not None and measured.plans == 2
    assert measured.compressed_s <= 1.1e-6 * limit_us


def test_a_network_that_misses_is_handed_over_where_nothing_is_quicker(
    timed: list[bytes | str], ratios: list[float]
) -> None:
    ratios[:] = [3.0, 1.0]  # the third plan would be the second one again
    with pytest.warns(UserWarning, match=r"asked 2.0% of the original's time, measured \d+.\d%; 2 plans were made"):
        result = compress("latency=2%")
    assert result.report.measured is not None


def test_the_quickest_plan_is_timed_where_corrected_times_leave_nothing_in_reach(
    timed: list[bytes | str], ratios: list[float]
) -> None:
    ratios[:] = [3.0, 0.5]
    result = compress("latency=2%")
    table = with_latency(profiled(), measured_once())
    least = least_amount(table, "latency") * 1e-9 / measured_once().network_s
    assert least < 0.02 < 3 * least
    measured = result.report.measured
    assert measured is not None and measured.plans == 2 and measured.ratio <= 0.02
    assert measured.predicted_ratio == pytest.approx(3 * least, abs=1e-3)
    assert result.plan.candidates != tdfx.plan(table, "latency=2%").candidates


def test_after_three_plans_the_user_is_told(timed: list[bytes | str], ratios: list[float]) -> None:
    ratios[:] = [1.3, 1.3, 1.3]
    with pytest.warns(UserWarning, match=r"asked 60.0% of the original's time, measured \d+.\d%; 3 plans"):
        result = compress("latency=60%")
    assert any("3 plans were made" in note for note in result.report.notes)


def test_a_guarded_network_is_faster_or_refused(timed: list[bytes | str], ratios: list[float]) -> None:
    ratios[:] = [1.9, 1.0]
    result = compress("flops=60%", guard="measured")
    assert result.report.measured is not None and result.report.measured.ratio < 0.98
    assert result.after.flops <= 0.6 * result.before.flops


def test_a_guard_that_no_network_passes_names_layers_and_what_is_reachable(
    timed: list[bytes | str], ratios: list[float]
) -> None:
    ratios[:] = [1.9, 1.9, 1.9]
    with pytest.raises(
        BudgetError, match=r"takes 1\d\d.\d% of .* compressed: .*2.* least reachable .* flops"
    ) as caught:
        compress("flops=75%", guard="measured")
    least = caught.value.least["flops"]
    assert 0 < least <= 0.75 * profiled().before.flops
    ratios[:] = [1.9]
    with pytest.raises(BudgetError, match=r"ranks=ratio=0.5 is not reachable with the guard"):
        tdfx.compress(network(), INPUT, ranks="ratio=0.5", methods=["spatial_svd"], guard="measured")


@pytest.mark.parametrize("planner", ["knapsack", "greedy"])
@pytest.mark.parametrize("budget", ["params=99%", "params=95%", "flops=98.5%", "flops=95%"])
def test_a_budget_that_slow_networks_keep_has_quicker_ones(machine: Machine, budget: str, planner: str) -> None:
    result = compress(budget, guard="measured", planner=planner)
    measured = result.report.measured
    assert measured is not None and measured.ratio <= 0.98
    assert result.plan.budget == budget and result.report.plan.budget == budget


@pytest.mark.parametrize(
    ("pace", "chain", "of_least", "of_asked"),
    [(1.4, 1, 1.3, 1.1), (8.5, 1, 8, 1.1), (1.6, 0.8, 1.4, 1.0)],
)
def test_a_limit_in_seconds_on_a_machine_that_became_slower(
    machine: Machine, pace: float, chain: float, of_least: float, of_asked: float
) -> None:
    """The first plan is late, and by its pace alone nothing is in reach, or all of it by both corrections."""
    machine.pace, machine.chain = pace, chain
    asked_ns = round(of_least * least_amount(table(), "latency"))
    result = compress(f"latency={asked_ns}ns")
    measured = result.report.measured
    assert measured is not None and measured.compressed_s <= 1e-9 * of_asked * asked_ns
    assert machine.plans > 1


def table() -> Profile:
    return with_latency(profiled(), measured_once())


def test_the_quickest_plan_keeps_the_other_limits(machine: Machine) -> None:
    params = 2 * least_amount(profiled(), "params")
    quickest = least_within(f"params={params}")
    whole_ns = 1e9 * measured_once().network_s
    machine.chain = 4.0
    budget = f"latency={100 * 3 * quickest / whole_ns:.4f}%,params={params}"
    with pytest.warns(UserWarning, match="latency is missed: asked .*; 2 plans were made"):
        result = compress(budget)
    assert machine.plans == 2 and result.after.params <= params
    wanted = tdfx.plan(table(), f"latency={quickest}ns,params={params}")
    assert [(c.method, c.rank) for c in result.plan.candidates] == [(c.method, c.rank) for c in wanted.candidates]


def least_within(others: str) -> int:
    """Nanoseconds of the quickest plan by the table, found to one."""
    low, high = 0, round(1e9 * measured_once().network_s)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            tdfx.plan(table(), f"latency={middle}ns,{others}")
            high = middle
        except BudgetError:
            low = middle
    return high


def test_a_network_slower_than_the_original_is_told(machine: Machine) -> None:
    machine.chain = 1000.0
    for budget, options in (("latency=98%", {}), ("drop=50%", {"minimize": "latency", "evaluate": kept})):
        with pytest.warns(UserWarning, match=r"latency is missed: .*(measured|takes) \d{3,4}.\d%"):
            compress(budget, **options)


def test_a_network_slower_than_the_original_makes_way(machine: Machine) -> None:
    machine.chain = 1.1
    result = compress("latency=98%")
    measured = result.report.measured
    assert measured is not None and measured.plans > 1 and measured.ratio <= 1


def test_a_network_that_leaves_time_unused_makes_way(timed: list[bytes | str], ratios: list[float]) -> None:
    ratios[:] = [0.7, 1.0]
    result = compress("latency=60%")
    first = tdfx.plan(with_latency(profiled(), measured_once()), "latency=60%")
    assert result.report.measured is not None and result.report.measured.plans == 2
    assert result.after.flops > first.after.flops


def test_what_is_in_time_is_kept_where_later_networks_are_not(timed: list[bytes | str], ratios: list[float]) -> None:
    ratios[:] = [0.7, 1.6, 1.6]
    result = compress("latency=60%")
    measured = result.report.measured
    assert measured is not None and measured.plans == 3 and measured.ratio < 0.6
    assert any("left unused: asked 60.0%" in note and "no plan made anew" in note for note in result.report.notes)


def test_time_that_no_choice_takes_is_explained(timed: list[bytes | str], ratios: list[float]) -> None:
    ratios[:] = [1.0]
    result = compress("latency=95%,flops=40%")
    assert any("left unused" in note and "no plan within the budget" in note for note in result.report.notes)


def test_time_that_a_search_leaves_needs_no_explanation(timed: list[bytes | str], ratios: list[float]) -> None:
    ratios[:] = [1.0]
    result = compress("drop=50%,latency=60%", evaluate=lambda module: 1.0, minimize="flops")
    assert not any("left unused" in note for note in result.report.notes)


def kept(module: nn.Module) -> float:
    """A score that every parameter counts in."""
    return float(sum(parameter.numel() for parameter in module.parameters()))


def test_a_drop_with_latency_is_planned_anew(timed: list[bytes | str], ratios: list[float]) -> None:
    ratios[:] = [1.6, 1.0]
    result = compress("drop=50%,latency=60%", evaluate=kept, minimize="params")
    measured = result.report.measured
    assert measured is not None and measured.plans == 2 and measured.ratio <= 0.6


def test_latency_that_is_minimized_is_measured(timed: list[bytes | str], ratios: list[float]) -> None:
    ratios[:] = [1.0]
    result = compress("drop=50%", evaluate=lambda module: 1.0, minimize="latency")
    assert result.plan.latency_source == "measured" and result.after.latency_s is not None
    assert result.after.latency_s < 0.6 * measured_once().network_s


def test_without_the_guard_nothing_is_timed(timed: list[bytes | str], ratios: list[float]) -> None:
    result = compress("flops=60%")
    assert not timed and result.report.measured is None and result.plan.latency_source == "estimated"


def test_a_table_of_another_device_is_planned_with(timed: list[bytes | str], ratios: list[float]) -> None:
    table = measured_once()
    result = compress("latency=60%", latency=table)
    assert result.report.measured is None and result.plan.latency_source == "measured"
    assert result.after.latency_s is not None and result.after.latency_s <= 0.6 * table.network_s


def test_a_guard_by_a_table_says_that_nothing_was_timed_here(timed: list[bytes | str], ratios: list[float]) -> None:
    result = compress("flops=60%", latency=measured_once(), guard="measured")
    for found in (result, compress("latency=60%", latency=measured_once())):
        assert any("the network itself was not timed" in note for note in found.report.notes)
    assert not any("was not timed" in note for note in compress("flops=60%", latency=measured_once()).report.notes)


def test_a_runtime_that_is_not_the_table_s_is_refused(timed: list[bytes | str]) -> None:
    with pytest.raises(OptionError, match=r"runtime is .*2 threads, and the latency table was measured in .*1 thread;"):
        compress("latency=60%", latency=measured_once(), runtime=Runtime(threads=2))
    assert compress("latency=60%", latency=measured_once(), runtime=Runtime()).plan.latency_source == "measured"


def test_a_plan_edited_after_its_times_were_measured_has_estimates(timed: list[bytes | str]) -> None:
    planned = tdfx.plan(with_latency(profiled(), measured_once()), "latency=60%")
    kept = tdfx.apply(network(), INPUT, planned)
    assert kept.plan.latency_source == "measured" and kept.after.latency_s == planned.after.latency_s
    changed = [c.site for c in planned.candidates if not c.is_dense]
    dense = tuple(replace(c, method="dense", rank=()) for c in planned.candidates)
    found = tdfx.apply(network(), INPUT, replace(planned, candidates=dense))
    assert found.plan.latency_source == "estimated" and found.after.latency_s == found.before.latency_s
    note = f"{', '.join(changed)} changed after latency was measured: it is estimated now"
    assert note in found.report.notes


def test_a_rule_whose_network_is_slower_is_refused_by_the_guard(timed: list[bytes | str], ratios: list[float]) -> None:
    ratios[:] = [1.9]
    with pytest.raises(BudgetError, match=r"ranks=energy=0.9.* not reachable with the guard.* Choose a rule of lower"):
        tdfx.compress(network(), INPUT, ranks="energy=0.9", methods=["spatial_svd"], guard="measured")


def test_a_network_left_as_it_is_passes_the_guard(timed: list[bytes | str], ratios: list[float]) -> None:
    ratios[:] = [1.0]
    result = compress("flops=100%", guard="measured")
    assert all(candidate.is_dense for candidate in result.plan.candidates)


def test_an_unknown_guard_is_refused() -> None:
    with pytest.raises(OptionError, match="guard is 'on'; expected one of 'estimated', 'measured'"):
        compress("flops=60%", guard="on")
