"""Errors at many ranks from those at a few."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from tdfx.records.layer import Rank

LEAST = 1e-9  # of the largest, below which no guess or error is told from another


def from_knots(
    error: Callable[[Rank], float], ranks: Sequence[Rank], guesses: Sequence[float], knots: int
) -> list[float]:
    """Errors at all ranks, computed at ``knots`` of them.

    In between, the error's logarithm is a monotone cubic function of the guess's; knots are about evenly spaced on that
    scale, the ends among them. Ranks of equal guesses get equal errors.

    Source: Fritsch and Carlson 1980, section 4, with the derivatives of Fritsch and Butland 1984 (PCHIP).

    Args:
        error: computes the error of a rank, not negative.
        ranks: where errors are wanted.
        guesses: one for each rank, not negative.
        knots: at least 2.
    """
    places = _logarithms(guesses)
    wanted, first = np.unique(places, return_index=True)
    even = np.linspace(wanted[0], wanted[-1], knots)
    chosen = np.unique([np.abs(wanted - place).argmin() for place in even])
    computed = [error(ranks[first[index]]) for index in chosen]
    if len(chosen) == 1 or max(computed) == 0.0:
        return computed[:1] * len(ranks)
    curve = PchipInterpolator(wanted[chosen], _logarithms(computed))
    between: list[float] = np.exp(curve(places)).tolist()
    exact = {float(wanted[index]): value for index, value in zip(chosen, computed, strict=True)}
    return [exact.get(float(place), value) for place, value in zip(places, between, strict=True)]


def _logarithms(values: Sequence[float]) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64)
    return np.log(np.maximum(found, LEAST * found.max() or 1.0))
