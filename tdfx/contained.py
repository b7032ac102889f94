"""Calls into torch and ONNX Runtime, contained: no chatter, errors of one line."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from tdfx.errors import ExportError

DEPENDS_ON_VALUES = (
    "its control flow depends on values, which has no ONNX form here: export the parts between such decisions one by "
    "one, or run the network in PyTorch, as tdfx.save and tdfx apply keep it without an ONNX file"
)


@contextmanager
def failing_as(what: str, fix: str) -> Iterator[None]:
    """Turn any failure inside into an ExportError of one line."""
    try:
        yield
    except Exception as error:
        fix = DEPENDS_ON_VALUES if isinstance(cause(error), GuardOnDataDependentSymNode) else fix
        raise ExportError(f"{what}: {reason(error)}; {fix}") from error


def cause(error: BaseException) -> BaseException:
    """The innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def reason(error: BaseException) -> str:
    """Type and first line of the innermost cause: the exporter wraps it in advice and tracebacks."""
    error = cause(error)
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    line = lines[0] if len(lines[0]) <= 400 else f"{lines[0][:150]} ... {lines[0][-250:]}"
    return f"{type(error).__name__}: {line}"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence prints, warnings and logs; what goes wrong comes as an exception."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Turn off torch's fast path for transformer layers, whose outputs at padded positions no export reproduces."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
