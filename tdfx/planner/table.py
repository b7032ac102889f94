"""What planners share: the checks of their arguments, the candidates as one table, and single-site improvement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from tdfx.planner import FloatArray, IntArray


def check(values: Sequence[FloatArray], costs: Sequence[IntArray], limits: IntArray) -> None:
    """Raises ValueError for arguments that ``Planner`` does not allow."""
    if limits.ndim != 1 or (limits < 0).any():
        raise ValueError(f"limits must be a vector of numbers >= 0, found {limits!r}")
    if len(values) != len(costs):
        raise ValueError(f"found values of {len(values)} sites, but costs of {len(costs)}")
    for i, (value, cost) in enumerate(zip(values, costs, strict=True)):
        if value.ndim != 1 or not value.size or cost.shape != (value.size, limits.size):
            raise ValueError(
                f"site {i}: expected values of shape (n,) and costs of shape (n, {limits.size}) with n > 0, "
                f"found {value.shape} and {cost.shape}"
            )
        if not (np.isfinite(value) & (value >= 0)).all():
            raise ValueError(f"site {i}: values must be finite and >= 0, found {value}")
        if (cost < 0).any():
            raise ValueError(f"site {i}: costs must be >= 0, found {cost}")


@dataclass(frozen=True)
class Table:
    """Candidates, site after site: ``site`` (n,) ascending, ``value`` (n,), ``cost`` (n, resources)."""

    site: IntArray
    value: FloatArray
    cost: IntArray

    @classmethod
    def of(cls, values: Sequence[FloatArray], costs: Sequence[IntArray]) -> Table:
        """The table of at least one site."""
        site = np.repeat(np.arange(len(values)), [len(value) for value in values])
        return cls(site, np.concatenate(values), np.concatenate(costs))

    @property
    def starts(self) -> IntArray:
        """The first row of each site."""
        return np.flatnonzero(np.diff(self.site, prepend=-1))

    @property
    def least_cost(self) -> IntArray:
        """(sites, resources)."""
        least: IntArray = np.minimum.reduceat(self.cost, self.starts)
        return least

    @property
    def least_value(self) -> FloatArray:
        """(sites,)."""
        least: FloatArray = np.minimum.reduceat(self.value, self.starts)
        return least

    @property
    def largest_value(self) -> float:
        """Above the least of the site."""
        return float((self.value - self.least_value[self.site]).max())

    def at(self, rows: IntArray) -> Table:
        """The table of these rows."""
        return Table(self.site[rows], self.value[rows], self.cost[rows])

    def first_least(self, key: FloatArray) -> IntArray:
        """Per site, the first row with the least key."""
        rows: IntArray = np.lexsort((key, self.site))[self.starts]
        return rows


def polish(table: Table, limits: IntArray, choice: IntArray) -> IntArray:
    """Changes single sites, the best change first, as long as one lowers the value within the limits."""
    choice = choice.copy()
    while True:
        now = choice[table.site]
        room = limits - table.cost[choice].sum(axis=0)
        fits = (table.cost - table.cost[now] <= room).all(axis=1)
        gain = np.where(fits, table.value[now] - table.value, 0)
        best = int(gain.argmax())
        if gain[best] <= 0:
            return choice
        choice[table.site[best]] = best


def at_least(number: Fraction) -> float:
    """The nearest float that is not below the number."""
    rounded = float(number)
    return rounded if Fraction(rounded) >= number else math.nextafter(rounded, math.inf)
