from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest

from tdfx.budget import RESOURCES, Budget, Drop, Limit, find_resource
from tdfx.errors import BudgetError
from tdfx.records.cost import Cost

WHOLE = Cost(params=1001, macs=10**15 + 1, weight_bytes=4004)


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("flops=50%", [("flops", "0.5", True)]),
        ("flops=50%,params=40%", [("flops", "0.5", True), ("params", "0.4", True)]),
        ("macs=1.2G", [("macs", "1.2e9", False)]),
        ("params=2M", [("params", "2e6", False)]),
        ("bytes=8MB", [("bytes", "8e6", False)]),
        ("bytes=8M", [("bytes", "8e6", False)]),
        ("bytes=1.5kb, macs=3k", [("bytes", "1500", False), ("macs", "3000", False)]),
        ("bytes=2GB", [("bytes", "2e9", False)]),
        ("flops=2T", [("flops", "2e12", False)]),
        ("params=.5K", [("params", "500", False)]),
        ("params=1234567", [("params", "1234567", False)]),
        ("macs=1e9", [("macs", "1e9", False)]),
        (" FLOPs = 12.5 % ", [("flops", "0.125", True)]),
        ("params=100%", [("params", "1", True)]),
        ("latency=12ms", [("latency", "12e6", False)]),
        ("latency=.5s,macs=1K", [("latency", "5e8", False), ("macs", "1e3", False)]),
        ("latency=800 US", [("latency", "8e5", False)]),
        ("latency=35%", [("latency", "0.35", True)]),
    ],
)
def test_parse(text: str, limits: list[tuple[str, str, bool]]) -> None:
    budget = Budget.parse(text)
    assert budget == Budget(tuple(Limit(name, Decimal(amount), share) for name, amount, share in limits))
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    "text",
    [
        "flops=50%,params=2M",
        "macs=1.2G",
        "bytes=12.5%",
        "params=1001",
        "bytes=8MB",
        "bytes=4004B",
        "macs=1.5M",
        "latency=12ms",
        "latency=825us",
        "latency=1.5s",
        "latency=50%",
    ],
)
def test_str_is_what_one_would_write(text: str) -> None:
    assert str(Budget.parse(text)) == text


def test_round_trip_keeps_every_digit() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        digits = "".join(map(str, rng.integers(0, 10, rng.integers(1, 40)))) + "1"
        share = Limit("flops", Decimal(f"0.{digits}"), True)
        number = Limit("bytes", Decimal(f"1{digits}e{rng.integers(-len(digits), 5)}"), False)
        budget = Budget((share, number))
        assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("flops=0%", "greater than 0, found 0"),
        ("params=0", "greater than 0, found 0"),
        ("flops=-10%", "greater than 0, found -0.10"),
        ("params=-2M", "greater than 0, found -2"),
        ("flops=150%", "at most 100%, found 150%"),
        ("flops=100.0001%", "at most 100%, found 100.0001%"),
        ("flops=fifty", "the amount of flops is not understood, found 'fifty'"),
        ("flops=", "the amount of flops is not understood, found ''"),
        ("flops=nan", "found 'nan'"),
        ("flops=1_0", "found '1_0'"),
        ("flops=5 0%", "found '5 0%'"),
        ("flops=\u0665%", "found '\u0665%'"),
        ("params=1e999", "found '1e999'"),
        ("params=2MB", "the amount of params is not understood, found '2MB'"),
        ("bytes=8MiB", "found '8MiB'"),
        ("bytes=8%b", "found '8%b'"),
        ("flops=0.5", "write 50%"),
        ("macs=0.125", "write 12.5%"),
        ("params=0.0001K", "write 10%"),
        ("latency=12", "the amount of latency is not understood, found '12'"),
        ("latency=12min", "found '12min'"),
        ("latency=0.5ns", "write 50%"),
        ("drop=", "the amount of drop is not understood, found ''"),
        ("drop=1pt", "the amount of drop is not understood, found '1pt'"),
        ("drop=-1%", "the amount of drop must be 0 or more, found -0.01"),
        ("drop=101%", "the share of drop must be at most 100%, found 101%"),
        ("drop=1%,drop=0.1", "expected drop once, found 'drop=1%,drop=0.1'"),
        ("drop=1%,flops=50%,flops=1G", "each resource once"),
        ("flosp=50%", "unknown resource 'flosp'; did you mean 'flops'?"),
        ("parameters=50%", "unknown resource 'parameters'; did you mean 'params'?"),
        ("=50%", "unknown resource ''"),
        ("flops", "expected resource=amount, found 'flops'"),
        ("flops=50%,", "expected resource=amount, found ''"),
        ("50%", "expected resource=amount, found '50%'"),
        ("params=1M,params=2M", "each resource once, found 'params=1M,params=2M'"),
        ("", "expected resource=amount, found ''"),
        (" ", "found ' '"),
        (None, "found None"),
        (0.5, "found 0.5"),
        ({"flops": 0.5}, "found {'flops': 0.5}"),
    ],
)
def test_refusals_say_what_was_found_and_what_is_understood(text: str, found: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse(text)
    message = str(caught.value)
    assert found in message
    assert all(name in message for name in RESOURCES)
    assert 'Example: "flops=50%,params=2M"' in message
    assert caught.value.least == {} and caught.value.scale is None


@pytest.mark.parametrize("amount", [0.5, 1, "1", None, Decimal("nan"), Decimal("inf")])
def test_limit_refuses_what_is_no_finite_decimal(amount: Decimal) -> None:
    with pytest.raises(BudgetError, match="greater than 0"):
        Limit("flops", amount, True)


def test_limit_refuses_an_unknown_resource() -> None:
    with pytest.raises(BudgetError, match="unknown resource 'mac'; did you mean 'macs'"):
        Limit("mac", Decimal("0.5"), True)


def test_budget_refuses_no_limits() -> None:
    with pytest.raises(BudgetError, match="at least one limit"):
        Budget(())


def test_the_example_in_the_messages_is_understood() -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse("")
    assert Budget.parse(str(caught.value).split('"')[-2]).limits


@pytest.mark.parametrize(
    ("text", "amounts"),
    [
        ("macs=50%", {"macs": 500_000_000_000_000}),
        ("flops=50%", {"macs": 500_000_000_000_000}),
        ("flops=100%", {"macs": 10**15 + 1}),
        ("macs=99.9999999999999%", {"macs": 10**15 - 1}),
        ("flops=1001", {"macs": 500}),
        ("flops=1G,macs=400M", {"macs": 400_000_000}),
        ("flops=1G,macs=600M", {"macs": 500_000_000}),
        ("macs=600M,flops=1G", {"macs": 500_000_000}),
        ("params=50%", {"params": 500}),
        ("params=1.5", {"params": 1}),
        ("bytes=33.3333%,params=10%", {"bytes": 1334, "params": 100}),
        ("params=0.01%", {"params": 0}),
        ("bytes=4MB", {"bytes": 4_000_000}),
        ("params=1e99", {"params": 2**63 - 1}),
    ],
)
def test_resolve_floors_exactly(text: str, amounts: dict[str, int]) -> None:
    assert Budget.parse(text).resolve(WHOLE) == amounts


def test_resources_of_a_cost() -> None:
    amounts = {name: amount(replace(WHOLE, latency_s=0.0123456789)) for name, amount in RESOURCES.items()}
    assert amounts == {
        "flops": 2 * 10**15 + 2, "macs": 10**15 + 1, "params": 1001, "bytes": 4004, "latency": 12345679
    }  # fmt: skip


def test_a_latency_that_is_not_known_is_no_budget() -> None:
    with pytest.raises(BudgetError, match="give a target"):
        Budget.parse("latency=50%").resolve(WHOLE)


def test_latency_is_rounded_up_but_for_what_floats_are_off_by() -> None:
    def ns(latency_s: float) -> int:
        return RESOURCES["latency"](Cost(0, 0, 0, latency_s))

    assert (ns(3e-9), ns(3.01e-9), sum([1e-9] * 3) != 3e-9, ns(sum([0.1e-6] * 3))) == (3, 4, True, 300)


@pytest.mark.parametrize(
    ("text", "amount", "share", "caps"),
    [
        ("drop=1%", "0.01", True, ()),
        ("drop=0.01", "0.01", False, ()),
        ("drop=0", "0", False, ()),
        ("drop=100%", "1", True, ()),
        ("drop=2.5", "2.5", False, ()),
        ("drop=1%,params=2M", "0.01", True, (Limit("params", Decimal("2e6"), False),)),
    ],
)
def test_a_drop(text: str, amount: str, share: bool, caps: tuple[Limit, ...]) -> None:
    budget = Budget.parse(text)
    assert budget == Budget(caps, Drop(Decimal(amount), share))
    assert str(budget) == text


def test_a_drop_is_read_in_any_place_and_case() -> None:
    assert Budget.parse(" params=2M , DROP = 1 % ") == Budget.parse("drop=1%,params=2M")


@pytest.mark.parametrize("amount", [0.5, Decimal("nan"), Decimal("-1")])
def test_a_drop_refuses_what_is_no_amount(amount: Decimal) -> None:
    with pytest.raises(BudgetError, match="must be 0 or more"):
        Drop(amount, False)


@pytest.mark.parametrize(
    ("text", "original", "least"),
    [
        ("1%", 90.0, "89.1"),
        ("0.01", 0.9, "0.89"),
        ("0.1", 0.8, "0.7"),  # 0.8 - 0.1 > 0.7 in binary
        ("1%", -2.0, "-2.02"),
        ("0", 0.3, "0.3"),
        ("5%", 0.0, "0"),
    ],
)
def test_least_score_is_exact_in_the_digits_shown(text: str, original: float, least: str) -> None:
    assert Drop.parse(text).least_score(original) == Decimal(least)


def test_a_drop_alone_says_nothing_of_costs() -> None:
    with pytest.raises(BudgetError, match=r"budget drop=1%: .* use tdfx\.compress with evaluate"):
        Budget.parse("drop=1%").resolve(WHOLE)


def test_find_resource_names_the_option() -> None:
    assert find_resource("bytes", "minimize")(WHOLE) == 4004
    with pytest.raises(BudgetError, match="minimize: unknown resource 'flosp'; did you mean 'flops'"):
        find_resource("flosp", "minimize")
