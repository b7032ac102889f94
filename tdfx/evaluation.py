"""What callers' functions say of networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

from torch import Tensor, nn

from tdfx.errors import OptionError

Evaluate = Callable[[nn.Module], float]
"""A network's score, higher is better."""


def check_evaluate(evaluate: object) -> None:
    """Raises OptionError unless it can be called."""
    if not callable(evaluate):
        raise OptionError(f"evaluate is a {type(evaluate).__name__}; expected a function from a network to a score")


def score(evaluate: Evaluate, network: nn.Module) -> float:
    """A network's score.

    Raises:
        OptionError: the function returns no finite number.
    """
    value: object = evaluate(network)
    found = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not isinstance(found, Real) or isinstance(found, bool) or not math.isfinite(found):
        raise OptionError(f"evaluate returned {value!r}; expected a finite number, higher for better networks")
    return float(found)
