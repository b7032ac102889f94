"""Shapes and dtypes of example inputs."""

from __future__ import annotations

from dataclasses import dataclass

from tdfx.records.layer import Shape


@dataclass(frozen=True)
class InputSpec:
    """One argument of a network.

    Attributes:
        name: the keyword it is given by, None for a positional argument.
        shape: as given, the batch included.
        dtype: name of its dtype, e.g. "float32".
    """

    name: str | None
    shape: Shape
    dtype: str
