"""A small network with calibration images, and how moments of it are compared."""

# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdfx.moments import Moments, SiteMoments
from tdfx.records.capture import Capture
from tdfx.stages.capture import capture

SITES = ["0", "2", "6"]
LIMIT = 8 * (36 * 36 + 4 * 4) + 100  # bytes for the second convolution alone


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5),
        )  # fmt: skip


def images(count: int = 10) -> Tensor:
    return torch.randn(count, 3, 7, 7, generator=torch.Generator().manual_seed(2))


@cache
def captured() -> Capture:
    return capture(network(), images(2))


def assert_site(found: SiteMoments, expected: SiteMoments, rtol: float = 1e-4, scale: float = 1.0) -> None:
    """Agreement to ``rtol`` of the largest entry; of gradients up to a known scale."""
    pairs = [(found.mean, expected.mean), (found.in_cov, expected.in_cov)]
    assert (found.out_cov is None) == (expected.out_cov is None)
    if found.out_cov is not None and expected.out_cov is not None:
        pairs.append((found.out_cov, expected.out_cov * scale))
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


def assert_same(found: Moments, expected: Moments) -> None:
    """Bit by bit."""
    assert found.fingerprint == expected.fingerprint
    assert (found.samples, found.output, found.skipped) == (expected.samples, expected.output, expected.skipped)


def cross_entropies(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(output, labels, reduction="none")
