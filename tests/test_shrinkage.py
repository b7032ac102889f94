"""Shrinkage of covariances: its ends, its share against the formula, and what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tdfx.shrinkage import shrunk


def covariance(count: int, spread: Tensor) -> Tensor:
    rows = torch.randn(count, len(spread), generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    return torch.cov((rows * spread).T, correction=0)


SPREAD = torch.arange(1, 21, dtype=torch.float64) ** -0.5


def test_unknown_and_endless_observations_leave_it_alone() -> None:
    given = covariance(50, SPREAD)
    assert torch.equal(shrunk(given, None), given)
    torch.testing.assert_close(shrunk(given, 10**15), given, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("given", [torch.zeros(3, 3).double(), 2 * torch.eye(4).double(), torch.ones(1, 1).double()])
def test_a_multiple_of_the_identity_stays(given: Tensor) -> None:
    torch.testing.assert_close(shrunk(given, 2), given, rtol=1e-12, atol=0.0)


def test_the_share_is_that_of_the_formula() -> None:
    given, n, p = covariance(30, SPREAD), 30, 20
    values = np.linalg.eigvalsh(given.numpy())
    squares, trace = (values**2).sum(), values.sum()
    share = ((1 - 2 / p) * squares + trace**2) / ((n + 1 - 2 / p) * (squares - trace**2 / p))
    assert 0 < share < 1
    wanted = (1 - share) * values + share * trace / p
    np.testing.assert_allclose(np.linalg.eigvalsh(shrunk(given, n).numpy()), wanted, rtol=1e-9)


def test_it_is_nearer_to_the_truth_and_of_full_rank() -> None:
    given, truth = covariance(10, SPREAD), torch.diag(SPREAD.square())
    found = shrunk(given, 10)
    assert torch.linalg.matrix_rank(given) < 20 == torch.linalg.matrix_rank(found)
    assert float((found - truth).norm()) < 0.9 * float((given - truth).norm())
    assert float(found.trace()) == pytest.approx(float(given.trace()), rel=1e-12)


def test_blocks_of_groups_are_shrunk_one_by_one() -> None:
    given = covariance(30, torch.cat([SPREAD, 10 * SPREAD.flip(0)]))
    blocks = torch.stack([given[:20, :20], given[20:, 20:]])
    wanted = torch.stack([shrunk(block, 30) for block in blocks])
    torch.testing.assert_close(shrunk(blocks, 30, 2), wanted, rtol=1e-12, atol=0.0)
    whole = shrunk(given, 30, 2)
    torch.testing.assert_close(torch.stack([whole[:20, :20], whole[20:, 20:]]), wanted, rtol=1e-12, atol=1e-15)
    assert float(torch.linalg.eigvalsh(whole)[0]) > 0
    between = whole[:20, 20:] / given[:20, 20:]
    torch.testing.assert_close(between, between[0, 0].expand(20, 20), rtol=1e-9, atol=0.0)
    assert 0 < float(between[0, 0]) < 1


def test_single_values_are_no_reason_to_forget_what_they_share() -> None:
    given = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    assert torch.equal(shrunk(given, 5, 2), given)
