"""Every error tdfx raises on purpose. Messages say what was found, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Mapping


class TdfxError(Exception):
    """Base of all errors raised by tdfx."""


class InputError(TdfxError):
    """A model, example input, weights file or output path cannot be used."""


class OptionError(TdfxError):
    """An option has a value that is not understood."""


class CaptureError(TdfxError):
    """The model's graph cannot be captured; names the construct that stands in the way."""


class PassError(TdfxError):
    """A graph pass left an invalid graph or broke its contract; names the pass and the node."""


class WeightError(TdfxError):
    """A layer's weight cannot be decomposed (NaN or Inf); names the layer."""


class BudgetError(TdfxError):
    """A budget is not understood or not reachable.

    Attributes:
        least: for an unreachable budget, the least reachable amount of each budgeted resource on its own
            (keys as in the budget: "flops", "macs", "params", "bytes"); empty otherwise.
        scale: for an unreachable budget, the smallest factor by which all limits together must be multiplied
            to become reachable; None otherwise.
    """

    def __init__(self, message: str, *, least: Mapping[str, int] | None = None, scale: float | None = None) -> None:
        super().__init__(message)
        self.least: dict[str, int] = dict(least or {})
        self.scale = scale


class PlanError(TdfxError):
    """A plan is malformed, of another version, or was made for another model."""


class ExportError(TdfxError):
    """The ONNX file cannot be made or written."""


class VerificationError(TdfxError):
    """A rewritten or exported network does not compute what it should.

    Attributes:
        max_abs_diff: largest absolute difference found, in output units.
        max_rel_diff: that difference divided by the largest magnitude of the reference.
    """

    def __init__(self, message: str, *, max_abs_diff: float = float("nan"), max_rel_diff: float = float("nan")) -> None:
        super().__init__(message)
        self.max_abs_diff = max_abs_diff
        self.max_rel_diff = max_rel_diff
