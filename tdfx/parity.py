"""Outputs of an ONNX file in ONNX Runtime against those of the network it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from tdfx.contained import failing_as
from tdfx.errors import VerificationError

LEAST_OUTPUT = 1e-6  # below this magnitude, agreement says nothing
TINY = 1e-300  # keeps a difference from an all-zero output a number
OTHER_EXAMPLE = "use trained weights or other example inputs"


@dataclass(frozen=True)
class OutputParity:
    """How far one output of the file is from the network's.

    Attributes:
        name: the output's name in the file.
        max_abs_diff: largest absolute difference, in output units.
        max_rel_diff: that difference divided by the largest magnitude of the network's output.
    """

    name: str
    max_abs_diff: float
    max_rel_diff: float


def session_options() -> Any:
    """Options of a session that reports errors as exceptions and uses torch's number of threads."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions
    options.intra_op_num_threads = torch.get_num_threads()
    return options


def compare(session: Any, inputs: Sequence[Tensor], wanted: list[Tensor], rtol: float, hint: str) -> list[OutputParity]:
    """Run a session on inputs in the order of the file's and compare each output with the network's.

    Raises:
        ExportError: ONNX Runtime fails; the message ends with ``hint``.
        VerificationError: an output differs by more than ``rtol`` of its largest magnitude, or is too small to tell.
    """
    with failing_as("ONNX Runtime cannot run the exported file", hint):
        arrays = [tensor.cpu().numpy() for tensor in inputs]
        names = [value.name for value in session.get_inputs()]
        found = session.run(None, dict(zip(names, arrays, strict=True)))
    names = [value.name for value in session.get_outputs()]
    if len(names) != len(wanted):
        raise VerificationError(f"the ONNX file has {len(names)} outputs, the network {len(wanted)}")
    return [_parity(*output, rtol) for output in zip(names, wanted, found, strict=True)]


def differences(wanted: Tensor, found: Tensor) -> tuple[float, float]:
    """Largest absolute difference, and that divided by the largest magnitude wanted; finite numbers of one shape."""
    absolute = _largest(wanted.double() - found.double())
    return absolute, absolute / max(_largest(wanted), TINY)


def _parity(name: str, wanted: Tensor, found: Any, rtol: float) -> OutputParity:
    a, b = wanted.detach().cpu(), torch.tensor(np.asarray(found))
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        raise VerificationError(
            f"output {name!r} is {b.dtype} {tuple(b.shape)} in ONNX Runtime, {a.dtype} {tuple(a.shape)} in the network"
        )
    for where, values in (("the network", a), ("ONNX Runtime", b)):
        if not values.isfinite().all():
            raise VerificationError(f"output {name!r} holds NaN or Inf in {where}; {OTHER_EXAMPLE}")
    exact = not a.is_floating_point()
    scale, (difference, relative) = _largest(a), differences(a, b)
    amounts = {"max_abs_diff": difference, "max_rel_diff": relative}
    if not exact and scale < LEAST_OUTPUT:
        raise VerificationError(
            f"output {name!r} is at most {scale:.3g} in magnitude, below {LEAST_OUTPUT:g} and too small to compare; "
            + OTHER_EXAMPLE,
            **amounts,
        )
    if not torch.equal(a, b) if exact else relative > rtol:
        raise VerificationError(
            f"output {name!r}, {tuple(a.shape)}, differs in ONNX Runtime by {difference:.3g}, {relative:.3g} of its "
            f"largest magnitude (allowed: {0 if exact else rtol:g}); no file was written",
            **amounts,
        )
    return OutputParity(name, difference, relative)


def _largest(values: Tensor) -> float:
    return float(values.double().abs().max()) if values.numel() else 0.0
