"""What a layer or a network costs."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """One convolution or matrix product, as the cost and latency models see it.

    Attributes:
        positions: output positions (batch x spatial, or rows of a matrix product); of a transposed convolution, which
            places its kernel at every element of its input, input positions.
        in_channels: length of the contracted dimension, all groups together, without the kernel.
        out_channels: output channels, all groups together.
        kernel: product of the kernel's extents (1 for matrix products).
        groups: number of groups; equals in_channels for a depthwise convolution.
        inputs: number of elements read from the input.
        itemsize: bytes per element.
        conv: whether the operator is a 2-d convolution, transposed or not.
        scattered: elements of the output of a transposed convolution; 0 for other operators.
    """

    positions: int
    in_channels: int
    out_channels: int
    kernel: int = 1
    groups: int = 1
    inputs: int = 0
    itemsize: int = 4
    conv: bool = False
    scattered: int = 0

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations."""
        return self.positions * self.out_channels * (self.in_channels // self.groups) * self.kernel

    @property
    def outputs(self) -> int:
        """Elements of the output."""
        return self.scattered or self.positions * self.out_channels

    @property
    def weight_elements(self) -> int:
        """Elements of the weight or second matrix, biases left out."""
        return self.out_channels * (self.in_channels // self.groups) * self.kernel


@dataclass(frozen=True)
class Cost:
    """Cost of a layer or network for the example inputs as given.

    Attributes:
        params: number of parameters, shared ones counted once.
        macs: multiply-accumulate operations of all convolutions and matrix products.
        weight_bytes: bytes of the parameters in their own dtypes (1 MB = 10^6 bytes).
        latency_s: seconds on the target, None without a target. Whether estimated or measured is said
            by ``latency_source`` of the plan or report that holds the cost.
    """

    params: int
    macs: int
    weight_bytes: int
    latency_s: float | None = None

    @property
    def flops(self) -> int:
        """Floating-point operations: two per multiply-accumulate."""
        return 2 * self.macs

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.params + other.params,
            self.macs + other.macs,
            self.weight_bytes + other.weight_bytes,
            None if self.latency_s is None or other.latency_s is None else self.latency_s + other.latency_s,
        )

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.params - other.params,
            self.macs - other.macs,
            self.weight_bytes - other.weight_bytes,
            None if self.latency_s is None or other.latency_s is None else self.latency_s - other.latency_s,
        )


def whole_ns(latency_s: float) -> float:
    """Rounded to nanoseconds, so that sums of latencies compare as whole numbers do."""
    return round(latency_s, 9)


def elements(shape: tuple[int, ...]) -> int:
    """Number of elements of a tensor of this shape."""
    return math.prod(shape)
