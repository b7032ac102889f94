"""Rank of a matrix by empirical variational Bayesian matrix factorization (EVBMF), solved analytically.

The model of V (L, M), L <= M, is V = B A^T + noise of variance s^2, with Gaussian priors on the columns of A and B
whose variances are found from V too. Its variational posterior keeps the singular value g_h if and only if
x_h = g_h^2 / (M s^2) is above the threshold (1 + t) (1 + a / t), where a = L / M and t is the root of
log(1 + t) + a log(1 + t / a) = t. The noise variance is the one of least free energy,

    Omega(s^2) = sum_h x_h + L log s^2 + sum_{kept h} (log(1 + t_h) + a log(1 + t_h / a) - t_h),

up to constants, with t_h the larger root of x_h = (1 + t_h) (1 + a / t_h).

Sources: Nakajima, Sugiyama, Babacan and Tomioka 2013, JMLR 14, section 4 (analytic solution); Nakajima, Tomioka,
Sugiyama and Babacan 2012, NIPS 25 (the threshold in closed form; objective and bounds of the noise variance).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

GRID = 64  # noise variances tried before the best one's neighbourhood is searched: Omega may have several minima
PRECISION = 1e-12  # least noise assumed, of the largest singular value: below are errors of the SVD

FloatArray = NDArray[np.float64]


def vbmf_rank(matrix: Tensor) -> int:
    """Number of singular values of a float64 matrix that EVBMF keeps, from 0 to less than its smaller side."""
    singular = torch.linalg.svdvals(matrix).numpy()
    less, more = sorted(matrix.shape)
    if singular[0] == 0:
        return 0
    normalized = np.square(singular / singular[0]) / more  # x_h times the noise variance
    kept = normalized > noise_variance(normalized, less / more) * threshold(less / more)
    return int(kept.sum())


def threshold(aspect: float) -> float:
    """Above which x_h is kept; aspect is L / M."""
    root: float = brentq(lambda tau: _gain(np.array(tau), aspect), aspect, 4.0)
    return (1 + root) * (1 + aspect / root)


def noise_variance(normalized: FloatArray, aspect: float) -> float:
    """The noise variance of least free energy, in the units of ``normalized``, g_h^2 / M in descending order."""
    size, least_kept = normalized.size, threshold(aspect)
    most_rank = min(math.ceil(size / (1 + aspect)) - 1, size - 1)
    most = float(normalized.mean())
    least = max(normalized[most_rank] / least_kept, normalized[most_rank:].mean(), PRECISION**2 * normalized[0])
    if least >= most:
        return most

    def free_energy(log_variance: float) -> float:
        x = normalized / math.exp(log_variance)
        kept = x[x > least_kept] - (1 + aspect)
        tau = (kept + np.sqrt(np.square(kept) - 4 * aspect)) / 2
        return float(x.sum() + size * log_variance + _gain(tau, aspect).sum())

    grid = np.linspace(math.log(least), math.log(most), GRID)
    best = int(np.argmin([free_energy(value) for value in grid]))
    around = grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)]
    return math.exp(minimize_scalar(free_energy, bounds=around, method="bounded", options={"xatol": 1e-9}).x)


def _gain(tau: FloatArray, aspect: float) -> FloatArray:
    """What keeping a singular value adds to the free energy: negative above the threshold."""
    gain: FloatArray = np.log1p(tau) + aspect * np.log1p(tau / aspect) - tau
    return gain
