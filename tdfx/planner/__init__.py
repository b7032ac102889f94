"""Planners: pure solvers that choose one candidate per site within integer limits; one file each, found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tdfx.errors import OptionError, TdfxError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class Planner(Protocol):
    """A module of this package is a planner if it has a function ``solve`` of this form."""

    def __call__(self, values: Sequence[FloatArray], costs: Sequence[IntArray], limits: IntArray) -> list[int]:
        """Chooses one candidate per site so that the total value is small and no total cost exceeds its limit.

        Args:
            values: per site, what each candidate adds to the objective, shape (candidates,), finite and >= 0.
            costs: per site, what each candidate uses, shape (candidates, resources), >= 0.
            limits: largest allowed total of each resource, shape (resources,), >= 0. Parts of a network that cannot
                be changed count too if they come as a site with a single candidate.

        Returns:
            Per site, the index of the chosen candidate.

        Raises:
            Infeasible: no choice is within all limits.
            ValueError: a shape does not fit, or a number is NaN, infinite or negative.
        """
        ...


class Infeasible(TdfxError):
    """No choice of candidates is within all limits.

    Attributes:
        least: the least total of each resource on its own, in the order of the limits.
        scale: the smallest factor by which all limits together must be multiplied so that a choice is within
            ``floor(scale * limits)``, infinite where a limit of 0 stands in the way.
    """

    def __init__(self, least: Sequence[int], scale: float) -> None:
        self.least = list(least)
        self.scale = scale
        super().__init__(
            f"no choice is within all limits: each resource on its own needs at least {self.least}, "
            f"all limits together must grow by a factor of {scale:.6g}"
        )


def planners() -> dict[str, Planner]:
    """All planners by name, which is the name of their module."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    solvers: dict[str, Any] = {
        name: getattr(importlib.import_module(f"{__name__}.{name}"), "solve", None) for name in names
    }
    return {name: solver for name, solver in solvers.items() if solver is not None}


def find_planner(name: str) -> Planner:
    """The planner of this name.

    Raises:
        OptionError: there is no such planner.
    """
    known = planners()
    if name not in known:
        raise OptionError(f"planner={name!r} is not known; choose one of: {', '.join(known)}")
    return known[name]
