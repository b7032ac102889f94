"""Error metrics: what a candidate's error is measured in, and what a planner adds up.

With W the weight unfolded to (out, in k k) and D = W - W~: ``weight:absolute`` is ||D||_F, ``weight:relative``
||D||_F / ||W||_F, ``weight:scaled`` ||D||_F divided by the number of elements of W.
"""

from __future__ import annotations

import difflib

import torch
from torch import Tensor

from tdfx.errors import OptionError

METRICS = ("weight:absolute", "weight:relative", "weight:scaled")
DEFAULT = "weight:relative"


def find_metric(name: str | None) -> str:
    """The metric's full name; None is the default, "weight" alone means relative.

    Raises:
        OptionError: for an unknown name.
    """
    if name is None or name == "weight":
        return DEFAULT
    if name in METRICS:
        return name
    near = difflib.get_close_matches(str(name), METRICS, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    raise OptionError(f"unknown metric {name!r}{hint} known metrics: {', '.join(METRICS)}")


def error_scale(metric: str, weight: Tensor) -> float:
    """What ||D||_F is divided by to give the error in this metric; 1 for a relative error of a zero weight."""
    if metric == "weight:relative":
        return float(torch.linalg.vector_norm(weight, dtype=torch.float64)) or 1.0
    return float(weight.numel()) if metric == "weight:scaled" else 1.0


def contribution(error: float) -> float:
    """What a candidate adds to the planner's objective: its squared error, for all weight metrics."""
    return error * error
