"""What a compressed network may cost, as in ``Budget.parse("flops=50%,params=2M")``, or lose, as in "drop=1%"."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction

from tdfx.errors import BudgetError
from tdfx.records.cost import Cost

LATENCY = "latency"
ROUNDING = 1e-3  # of a nanosecond, which sums of floats may be off by


def nanoseconds(cost: Cost) -> int:
    """Latency in nanoseconds, rounded up: sums of them are no less than the sum's.

    Raises:
        BudgetError: it is not known.
    """
    if cost.latency_s is None:
        raise BudgetError(
            "the latency is not known and cannot be limited: give a target, whose latency is estimated, or measure it"
        )
    return math.ceil(cost.latency_s * 1e9 - ROUNDING)


RESOURCES: Mapping[str, Callable[[Cost], int]] = {
    "flops": lambda cost: cost.flops,
    "macs": lambda cost: cost.macs,
    "params": lambda cost: cost.params,
    "bytes": lambda cost: cost.weight_bytes,
    LATENCY: nanoseconds,
}
"""What can be limited, and how much of it a cost is."""

DROP = "drop"

_FLOPS_PER_MAC = Cost(params=0, macs=1, weight_bytes=0).flops
_MOST = 2**63 - 1  # planners count in 64 bits
_POWERS = {"": 0, "k": 3, "m": 6, "g": 9, "t": 12}
_POWERS_OF_LATENCY = {"ns": 0, "us": 3, "ms": 6, "s": 9}
_AMOUNT = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:e([+-]?\d\d?))?\s*([a-z%]*)", re.ASCII)
_FORMS = (
    f"Write resource=amount, several separated by commas; resource: {', '.join(RESOURCES)} (of the weights); "
    'amount: a share of the whole model ("50%") or a number ("1.2G", "2M", for bytes also "8MB"; K, M, G, T are powers '
    'of 1000), for latency a time ("12ms", "800us"). With tdfx.compress(..., evaluate=...) also drop=amount, what the '
    "score may lose: a share of the "
    'original\'s ("drop=1%") or a number ("drop=0.01"). Example: "flops=50%,params=2M"'
)


@dataclass(frozen=True)
class Limit:
    """The most that a compressed network may use of one resource.

    Attributes:
        resource: "flops", "macs", "params", "bytes" (of the weights) or "latency" (of one run).
        amount: a share of the whole model before compression (0.5 for 50%), or a number of units; of nanoseconds for
            latency.
        share: whether ``amount`` is a share.

    Raises:
        BudgetError: unknown resource, or an amount that is no Decimal in range (a share up to 1, else at least 1).
    """

    resource: str
    amount: Decimal
    share: bool

    def __post_init__(self) -> None:
        _check_resource(self.resource)
        if not isinstance(self.amount, Decimal) or not self.amount.is_finite() or self.amount <= 0:
            raise _refusal(f"the amount of {self.resource} must be greater than 0, found {self.amount}")
        if self.share and self.amount > 1:
            raise _refusal(f"the share of {self.resource} must be at most 100%, found {_digits(self.amount, 2)}%")
        if not self.share and self.amount < 1:
            raise _refusal(
                f"{_digits(self.amount)} {self.resource} is less than one; for a share of the whole model write "
                f"{_digits(self.amount, 2)}%"
            )

    @classmethod
    def parse(cls, text: str) -> Limit:
        """The limit written as e.g. "flops=50%" or "bytes=8MB", in upper or lower case.

        Raises:
            BudgetError: the text is not understood.
        """
        name, equals, amount = (part.strip() for part in text.partition("="))
        if not equals:
            raise _refusal(f"expected resource=amount, found {text!r}")
        name = name.lower()
        _check_resource(name)
        match = _AMOUNT.fullmatch(amount.lower())
        number, exponent, suffix = match.groups() if match else ("", "", "?")
        powers = _POWERS_OF_LATENCY if name == LATENCY else _POWERS
        power = -2 if suffix == "%" else powers.get(suffix.removesuffix("b") if name == "bytes" else suffix)
        if power is None:
            raise _refusal(f"the amount of {name} is not understood, found {amount!r}")
        # As text, since arithmetic of Decimal rounds.
        return cls(name, Decimal(f"{number}e{int(exponent or 0) + power}"), suffix == "%")

    def __str__(self) -> str:
        if self.share:
            return f"{self.resource}={_digits(self.amount, 2)}%"
        if self.resource == LATENCY:
            times = (f"{_digits(self.amount, -power)}{unit}" for unit, power in reversed(_POWERS_OF_LATENCY.items()))
            return f"{self.resource}={min(times, key=len)}"
        unit = "B" if self.resource == "bytes" else ""
        amounts = (f"{_digits(self.amount, -power)}{prefix.upper()}{unit}" for prefix, power in _POWERS.items())
        return f"{self.resource}={min(amounts, key=len)}"


@dataclass(frozen=True)
class Drop:
    """The most that a compressed network's score may be below the original's.

    Attributes:
        amount: a share of the original's score (0.01 for 1%), or a difference of scores.
        share: whether ``amount`` is a share.

    Raises:
        BudgetError: the amount is no Decimal of 0 or more, or a share above 1.
    """

    amount: Decimal
    share: bool

    def __post_init__(self) -> None:
        if not isinstance(self.amount, Decimal) or not self.amount.is_finite() or self.amount < 0:
            raise _refusal(f"the amount of {DROP} must be 0 or more, found {self.amount}")
        if self.share and self.amount > 1:
            raise _refusal(f"the share of {DROP} must be at most 100%, found {_digits(self.amount, 2)}%")

    @classmethod
    def parse(cls, text: str) -> Drop:
        """The amount written as e.g. "1%" or "0.01".

        Raises:
            BudgetError: the text is not understood.
        """
        match = _AMOUNT.fullmatch(text.strip().lower())
        number, exponent, suffix = match.groups() if match else ("", "", "?")
        if suffix not in ("", "%"):
            raise _refusal(f"the amount of {DROP} is not understood, found {text.strip()!r}")
        return cls(Decimal(f"{number}e{int(exponent or 0) - 2 * len(suffix)}"), suffix == "%")

    def least_score(self, original: float) -> Decimal:
        """What a network must reach where the original has this score; of the digits that Python shows."""
        score = Decimal(repr(original))
        return score - self.amount * (abs(score) if self.share else 1)

    def __str__(self) -> str:
        return f"{DROP}={_digits(self.amount, 2)}%" if self.share else f"{DROP}={_digits(self.amount)}"


@dataclass(frozen=True)
class Budget:
    """Limits on what a whole network may cost, those parts included that cannot be compressed.

    Attributes:
        limits: each of another resource; at least one where there is no drop.
        drop: what the network's measured score may lose besides; None for a network that is not measured.

    Raises:
        BudgetError: there is neither a limit nor a drop, or there are two limits of the same resource.
    """

    limits: tuple[Limit, ...]
    drop: Drop | None = None

    def __post_init__(self) -> None:
        names = [limit.resource for limit in self.limits]
        if len(set(names)) != len(names) or not (names or self.drop):
            raise _refusal(f"expected at least one limit and each resource once, found {str(self)!r}")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """The budget written as e.g. "flops=50%,params=40%", "bytes=8MB", "latency=12ms" or "drop=1%,params=2M".

        Raises:
            BudgetError: the text is not understood; the message says what was found and what is.
        """
        if not isinstance(text, str):
            raise _refusal(f"expected text, found {text!r}")
        parts = [part.partition("=") for part in text.split(",")]
        drops = [amount for name, _, amount in parts if name.strip().lower() == DROP]
        if len(drops) > 1:
            raise _refusal(f"expected {DROP} once, found {text!r}")
        limits = tuple(Limit.parse("".join(part)) for part in parts if part[0].strip().lower() != DROP)
        return cls(limits, Drop.parse(drops[0]) if drops else None)

    def with_limit(self, limit: Limit) -> Budget:
        """The budget with this limit in place of its own on the same resource, if it has one."""
        return replace(self, limits=(*self.without(limit.resource), limit))

    def without(self, resource: str) -> tuple[Limit, ...]:
        """The limits on other resources."""
        return tuple(limit for limit in self.limits if limit.resource != resource)

    def resolve(self, before: Cost) -> dict[str, int]:
        """The largest whole amounts allowed of "macs", "params", "bytes" and "latency" (in nanoseconds), where limited.

        Flops are limited as macs.

        Args:
            before: cost of the whole model as given.

        Raises:
            BudgetError: the budget has a drop, which says nothing of costs before networks are measured; or a share of
                latency, which is not known.
        """
        if self.drop is not None:
            raise BudgetError(
                f"budget {self}: what the score loses shows only in networks that are measured; use tdfx.compress with "
                "evaluate=a function from a network to its score, or leave the drop out"
            )
        amounts: dict[str, int] = {}
        for limit in self.limits:
            amount = Fraction(limit.amount) * (RESOURCES[limit.resource](before) if limit.share else 1)
            name = limit.resource
            if name == "flops":
                name, amount = "macs", amount / _FLOPS_PER_MAC
            most = min(math.floor(amount), _MOST)
            amounts[name] = min(most, amounts.get(name, most))
        return amounts

    def __str__(self) -> str:
        return ",".join(map(str, (*((self.drop,) if self.drop else ()), *self.limits)))


def find_resource(name: str, option: str) -> Callable[[Cost], int]:
    """How much of a resource a cost is.

    Args:
        name: "flops", "macs", "params", "bytes" or "latency".
        option: where the name was given, for the message.

    Raises:
        BudgetError: unknown resource.
    """
    if name not in RESOURCES:
        raise BudgetError(f"{option}: {_unknown(name)}. Known are {', '.join(RESOURCES)}")
    return RESOURCES[name]


def _check_resource(name: str) -> None:
    if name not in RESOURCES:
        raise _refusal(_unknown(name))


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(str(name), RESOURCES, 1)
    return f"unknown resource {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _digits(number: Decimal, power: int = 0) -> str:
    """``number * 10**power`` written out, exactly."""
    text = f"{Decimal(f'{number:f}e{power}'):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _refusal(problem: str) -> BudgetError:
    return BudgetError(f"budget not understood: {problem}. {_FORMS}")
