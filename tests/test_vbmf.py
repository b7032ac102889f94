from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from tdfx.vbmf import noise_variance, threshold, vbmf_rank

SHAPES = [(40, 40), (30, 60), (16, 144), (64, 576)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noisy(shape: tuple[int, int], rank: int, noise: float, seed: int = 0) -> Tensor:
    """Rank ``rank`` and independent noise; the factors' products have variance ``rank``."""
    return (
        randn(shape[0], rank, seed=seed) @ randn(rank, shape[1], seed=seed + 1) + randn(*shape, seed=seed + 2) * noise
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("noise", [1e-3, 0.1, 0.5])
def test_the_rank_behind_noise_is_found(shape: tuple[int, int], rank: int, noise: float) -> None:
    assert [vbmf_rank(noisy(shape, rank, noise, seed)) for seed in range(3)] == [rank] * 3


@pytest.mark.parametrize("shape", [*SHAPES, (7, 7), (3, 50), (1, 9), (1, 1)])
def test_noise_has_rank_0(shape: tuple[int, int]) -> None:
    assert [vbmf_rank(randn(*shape, seed=seed)) for seed in range(5)] == [0] * 5


@pytest.mark.parametrize("shape", SHAPES)
def test_neither_transposition_nor_scale_matters(shape: tuple[int, int]) -> None:
    for seed in range(3):
        matrix = noisy(shape, 12, 3.0, seed)  # near the limit, where the rank found is not the true one
        rank = vbmf_rank(matrix)
        assert rank > 0
        assert [vbmf_rank(other) for other in (matrix.T, 1e-9 * matrix, -1e9 * matrix)] == [rank] * 3


def test_without_noise_the_rank_is_the_algebraic_one() -> None:
    assert vbmf_rank(torch.zeros(6, 9, dtype=torch.float64)) == 0
    assert vbmf_rank(noisy((20, 30), 5, 0.0)) == 5


def test_the_threshold_of_a_square_matrix_is_the_published_one() -> None:
    tau = 2.5129  # root of log(1 + t) / t = 1 / 2
    assert threshold(1.0) == pytest.approx((1 + tau) * (1 + 1 / tau), rel=1e-4)


def free_energy(log_values: np.ndarray, singular: float, size: tuple[int, int]) -> float:
    """Of one component, of means and variances of both factors and of their priors, at noise variance 1.

    Relative to that of the zero solution: a Gaussian's divergence from its prior, for either factor, and the expected
    squared residual.
    """
    a, b, var_a, var_b, prior_a, prior_b = np.exp(log_values)
    less, more = size
    square_a, square_b = a**2 + more * var_a, b**2 + less * var_b
    divergence = (
        more * math.log(prior_a / var_a) + square_a / prior_a - more
        + less * math.log(prior_b / var_b) + square_b / prior_b - less
    )  # fmt: skip
    return float(divergence - 2 * singular * a * b + square_a * square_b)


@pytest.mark.parametrize("size", [(20, 20), (10, 40), (4, 100)])
def test_the_threshold_is_where_a_component_lowers_the_variational_free_energy(size: tuple[int, int]) -> None:
    less, more = size
    limit = math.sqrt(more * threshold(less / more))

    def least(singular: float) -> float:
        found = []
        for scale in (0.5, 0.7, 0.9):
            mean = math.sqrt(scale * singular)
            start = np.log([mean, mean, 1 / singular, 1 / singular, mean**2 / more, mean**2 / less])
            options = {"maxiter": 20_000, "maxfev": 20_000, "xatol": 1e-10, "fatol": 1e-10}
            found.append(minimize(free_energy, start, (singular, size), "Nelder-Mead", options=options).fun)
        return float(min(found))

    assert least(1.01 * limit) < -1e-3
    assert least(0.99 * limit) > 1e-3


def test_the_noise_variance_is_found_and_has_the_least_free_energy() -> None:
    singular = torch.linalg.svdvals(noisy((60, 200), 6, 0.5)).numpy()
    found = noise_variance(singular**2 / 200, 60 / 200)
    assert found == pytest.approx(0.25, rel=0.05)


def test_of_several_minima_the_least_is_taken() -> None:
    # Two dead rows beside fourteen of slowly falling energy: a bounded search from the middle ends in another minimum.
    spectrum = np.concatenate([np.linspace(3, 0.8, 14), [0.1, 0.05]]) ** 2
    aspect, bar = 16 / 144, threshold(16 / 144)

    def objective(variance: float) -> float:
        x = spectrum / variance
        kept = x[x > bar]
        tau = (kept - 1 - aspect + np.sqrt((kept - 1 - aspect) ** 2 - 4 * aspect)) / 2
        return float(
            (x - np.log(x)).sum() + (np.log1p(tau) + aspect * np.log1p(tau / aspect) - tau).sum()
        )  # the paper's psi_0 and psi_1

    found = noise_variance(spectrum, aspect)
    tried = np.geomspace(spectrum[-2:].mean(), spectrum.mean(), 5_000)
    assert objective(found) <= min(map(objective, tried)) + 1e-6
