from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdfx.errors import PlanError
from tdfx.records.candidate import Candidate, format_rank
from tdfx.records.cost import Cost
from tdfx.records.layer import Skipped
from tdfx.records.plan import MOST_SEED, Plan

PLAN = Plan(
    candidates=(
        Candidate("conv1", "tucker2", (16, 32), Cost(120, 4_000, 480, 1e-5), 0.25, "weight:relative"),
        Candidate("fc", "dense", (), Cost(30, 100, 120, 2e-6), 0.0, "weight:relative", "estimated slower than dense"),
    ),
    skipped=(Skipped("embedding", "Embedding layers are not compressed"),),
    budget="flops=50%",
    before=Cost(500, 9_000, 2_000, 3e-5),
    after=Cost(150, 4_100, 600, 1.2e-5),
    metric="weight:relative",
    planner="knapsack",
    target="ort-cpu",
    rank_multiple=16,
    trainable=False,
    seed=0,
    latency_source="estimated",
    structure="abc",
    weights="def",
    notes=("a note",),
)

text = st.text(max_size=8)
counts = st.integers(min_value=0)
numbers = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
costs = st.builds(Cost, counts, counts, counts, st.none() | numbers)
candidates = st.builds(
    Candidate, text, text, st.lists(st.integers(min_value=1), max_size=3).map(tuple), costs, numbers, text, text
)
skips = st.builds(Skipped, text, text)
plans = st.builds(
    Plan,
    seed=st.integers(min_value=0, max_value=MOST_SEED),
    candidates=st.lists(candidates, unique_by=lambda candidate: candidate.site, max_size=3).map(tuple),
    skipped=st.just(()),
    budget=text,
    before=costs,
    after=costs,
    metric=text,
    planner=text,
    target=st.none() | text,
    rank_multiple=counts,
    trainable=st.booleans(),
    latency_source=st.none() | text,
    structure=text,
    weights=text,
    notes=st.lists(text, max_size=2).map(tuple),
)


def edited(edit: Callable[[dict[str, Any]], object]) -> str:
    values = json.loads(PLAN.to_json())
    edit(values)
    return json.dumps(values)


@settings(deadline=None, max_examples=30)
@given(plans, st.lists(skips, max_size=3))
def test_every_plan_survives_its_json(plan: Plan, skipped: list[Skipped]) -> None:
    sites = {candidate.site for candidate in plan.candidates}
    plan = replace(plan, skipped=tuple(entry for entry in skipped if entry.layer not in sites))
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text


def test_a_number_without_a_point_survives_too() -> None:
    text = replace(PLAN, before=Cost(0, 0, 0, 0)).to_json()
    assert Plan.from_json(text).to_json() == text


def test_order_is_stable_and_candidates_have_a_line_each() -> None:
    text = PLAN.to_json()
    order = [
        "version",
        "budget",
        "before",
        "after",
        "metric",
        "planner",
        "target",
        "rank_multiple",
        "trainable",
        "seed",
    ]
    order += [
        "latency_source",
        "structure",
        "weights",
        "notes",
        "corrected",
        "moments",
        "capture",
        "candidates",
        "skipped",
    ]
    assert list(json.loads(text)) == order
    assert [line for line in text.split("\n") if '"site": "conv1"' in line] == [
        '    {"site": "conv1", "method": "tucker2", "rank": [16, 32], "cost": {"params": 120, "macs": 4000, '
        '"weight_bytes": 480, "latency_s": 1e-05}, "error": 0.25, "metric": "weight:relative", "caveat": ""},'
    ]
    assert text.endswith("}\n")


def test_indentation_and_order_are_free() -> None:
    values = json.loads(PLAN.to_json())
    assert Plan.from_json(json.dumps(dict(reversed(values.items())), indent=7)) == PLAN


def test_notes_and_caveats_may_be_left_out() -> None:
    def strip(values: dict[str, Any]) -> None:
        del values["notes"]
        for candidate in values["candidates"]:
            del candidate["caveat"]

    plan = Plan.from_json(edited(strip))
    assert plan.notes == () and [candidate.caveat for candidate in plan.candidates] == ["", ""]


@pytest.mark.parametrize(
    "name", [name for name in json.loads(PLAN.to_json()) if name not in ("version", "notes", "capture")]
)  # fmt: skip
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(PlanError, match=f"^plan: missing '{name}'"):
        Plan.from_json(edited(lambda values: values.pop(name)))


@pytest.mark.parametrize("name", ["site", "method", "rank", "cost", "error", "metric"])
def test_a_missing_field_of_a_candidate_is_named(name: str) -> None:
    with pytest.raises(PlanError, match=rf"^plan.candidates\[1\]: missing '{name}'"):
        Plan.from_json(edited(lambda values: values["candidates"][1].pop(name)))


@pytest.mark.parametrize("name", ["params", "macs", "weight_bytes", "latency_s"])
def test_a_missing_part_of_a_cost_is_named(name: str) -> None:
    with pytest.raises(PlanError, match=rf"^plan.candidates\[0\].cost: missing '{name}'"):
        Plan.from_json(edited(lambda values: values["candidates"][0]["cost"].pop(name)))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v.update(planer="x"), r"^plan: unknown 'planer'; expected are candidates, skipped, budget"),
        (lambda v: v["candidates"][0].update(ranks=[4]), r"^plan.candidates\[0\]: unknown 'ranks'"),
        (lambda v: v["before"].update(flops=4), r"^plan.before: unknown 'flops'"),
        (lambda v: v["skipped"][0].update(why=""), r"^plan.skipped\[0\]: unknown 'why'"),
    ],
)
def test_an_unknown_field_is_named(edit: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_json(edited(edit))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("budget", 50, "a string"),
        ("metric", None, "a string"),
        ("target", 3, "a string"),
        ("trainable", 1, "true or false"),
        ("trainable", "false", "true or false"),
        ("seed", -1, "a whole number of 0 or more"),
        ("seed", 1.0, "a whole number of 0 or more"),
        ("rank_multiple", True, "a whole number of 0 or more"),
        ("candidates", {}, "a list"),
        ("notes", "a note", "a list"),
        ("notes.0", 1, "a string"),
        ("candidates.0", "conv1", "an object"),
        ("candidates.0.rank", 16, "a list"),
        ("candidates.0.rank.1", 0, "a positive whole number"),
        ("candidates.0.rank.1", True, "a positive whole number"),
        ("candidates.0.rank.1", 1.5, "a positive whole number"),
        ("candidates.0.cost", [1], "an object"),
        ("candidates.0.cost.params", 1.5, "a whole number of 0 or more"),
        ("candidates.0.cost.macs", "4K", "a whole number of 0 or more"),
        ("candidates.0.cost.latency_s", "1 ms", "a finite number of 0 or more"),
        ("candidates.0.error", True, "a finite number of 0 or more"),
        ("candidates.0.error", None, "a finite number of 0 or more"),
        ("candidates.0.error", -0.1, "a finite number of 0 or more"),
        ("candidates.0.error", float("nan"), "a finite number of 0 or more"),
        ("candidates.0.error", float("inf"), "a finite number of 0 or more"),
        ("candidates.0.error", 10**400, "a finite number of 0 or more"),
        ("skipped.0", None, "an object"),
        ("skipped.0.layer", ["a"], "a string"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(path: str, value: object, expected: str) -> None:
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))

    def edit(values: Any) -> None:
        for part in parents:
            values = values[part]
        values[last] = value

    name = "plan" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in (*parents, last))
    with pytest.raises(PlanError) as caught:
        Plan.from_json(edited(edit))
    assert str(caught.value) == f"{name} is {value!r}; expected {expected}"


def test_the_largest_number_is_fine() -> None:
    plan = replace(PLAN, candidates=(replace(PLAN.candidates[0], error=sys.float_info.max),))
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("version", [None, 0, 2, "1", True, 1.0])
def test_another_version_is_refused(version: object) -> None:
    with pytest.raises(
        PlanError, match=f"the plan has version {version!r}; this tdfx reads version 1: make the plan anew"
    ):
        Plan.from_json(edited(lambda values: values.update(version=version)))


def test_a_plan_without_version_is_refused() -> None:
    with pytest.raises(PlanError, match="the plan has version None"):
        Plan.from_json(edited(lambda values: values.pop("version")))


@pytest.mark.parametrize("text", ["", "plan", "{'version': 1}", PLAN.to_json()[:-3], "[" * 100_000, PLAN.to_json() * 2])
def test_text_that_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"^the plan is no JSON: "):
        Plan.from_json(text)


@pytest.mark.parametrize(("text", "kind"), [("[]", "list"), ("3", "int"), ("null", "NoneType"), ('"x"', "str")])
def test_json_that_is_no_object_is_refused(text: str, kind: str) -> None:
    with pytest.raises(PlanError, match=f"^the plan is a JSON {kind}; expected an object"):
        Plan.from_json(text)


def test_a_site_has_one_candidate() -> None:
    with pytest.raises(PlanError, match="more than one candidate for conv1; keep one each"):
        Plan.from_json(edited(lambda values: values["candidates"].append(values["candidates"][0])))
    with pytest.raises(PlanError, match="more than one candidate for conv1, fc"):
        replace(PLAN, candidates=PLAN.candidates * 2)


def test_a_site_is_not_skipped_as_well() -> None:
    with pytest.raises(PlanError, match="both skips and has a candidate for fc; keep one of the two"):
        Plan.from_json(edited(lambda values: values["skipped"].append({"layer": "fc", "reason": ""})))


def test_a_plan_prints_as_a_table() -> None:
    lines = str(PLAN).split("\n")
    assert lines[0].split() == ["layer", "method", "rank", "params", "macs", "latency", "error"]
    assert lines[2].split() == ["conv1", "tucker2", "16x32", "120", "4K", "0.01", "ms", "0.25"]
    assert lines[3].split() == ["fc", "dense", "-", "30", "100", "0.002", "ms", "0"]
    assert lines[-2:] == ["budget flops=50%; error is weight:relative; latency is estimated", "note: a note"]
    silent = replace(PLAN, target=None, latency_source=None, before=replace(PLAN.before, latency_s=None))
    assert "latency is not estimated" in str(silent)


def test_ranks_are_written_with_crosses() -> None:
    assert [format_rank(rank) for rank in ((), (16,), (32, 48))] == ["-", "16", "32x48"]
