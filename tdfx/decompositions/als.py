"""Alternating least squares for CP: the sum of R outer products nearest to a tensor of two large and some small modes.

Two things keep it fast and well behaved: a ridge on every normal equation, relative to the mean of its diagonal,
bounds the cancelling components that CP is prone to; and extrapolating each sweep along its step, taken back whenever
the error grew, reaches in 60 sweeps what plain alternation needs some 200 for. Sweeps multiply in float32; normal
equations and the last factor are in float64.

Sources: Kolda and Bader 2009, section 3.4 (ALS) and 3.3 (degeneracy); Ang, Cohen, Gillis and Hien 2020, algorithm 1
(extrapolation with restarts).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from tdfx.decompositions.spectrum import leading_basis

SWEEPS, LEAST_SWEEPS = 80, 16
WORK = 2e10  # floating-point operations in the large products, after which LEAST_SWEEPS are enough
RIDGE = 1e-5  # of the mean diagonal of a normal equation
LAST_RIDGE = 1e-10  # of the last, exact one
STEP, STEP_GROWTH, STEP_MOST = 0.5, 1.05, 0.95  # extrapolation
PATIENCE, LEAST_GAIN = 10, 1e-3  # stop when the error falls by less than this share in so many sweeps

Factors = tuple[Tensor, ...]
"""One matrix (mode, R) a mode: out, in, then the kernel's."""


def exact_rank(shape: Sequence[int]) -> int:
    """Number of components of ``exact``: the product of all modes but the largest."""
    return math.prod(shape) // max(shape)


def exact(tensor: Tensor) -> Factors:
    """CP factors that reproduce a tensor exactly, with ``exact_rank`` components.

    The largest mode keeps its fibres; the other modes are enumerated by unit vectors.
    """
    kept = max(range(tensor.dim()), key=lambda mode: tensor.shape[mode])
    factors: list[Tensor] = []
    inner = exact_rank(tensor.shape)
    outer = 1
    for mode, size in enumerate(tensor.shape):
        if mode == kept:
            factors.append(tensor.movedim(mode, 0).flatten(1))
            continue
        inner //= size
        factors.append(torch.eye(size, dtype=tensor.dtype).repeat_interleave(inner, 1).repeat(1, outer))
        outer *= size
    return tuple(factors)


def alternate(tensor: Tensor, rank: int, seed: int, most: int = SWEEPS) -> Factors:
    """CP factors of a float64 tensor (out, in, *kernel) by ridge-regularised, extrapolated ALS; ``most`` sweeps."""
    scale = torch.linalg.vector_norm(tensor)
    if scale == 0:
        return tuple(torch.zeros(n, rank, dtype=tensor.dtype) for n in tensor.shape)
    tensor = tensor / scale
    slices = tensor.flatten(2).permute(2, 0, 1).contiguous()  # (kernel, out, in)
    single = slices.float()
    current = _initial(tensor, rank, seed)
    best, best_error, step = current, math.inf, STEP
    history: list[float] = []
    for _ in range(min(most, sweeps(tensor.shape, rank))):
        updated, error = _sweep(single, current)
        if error > best_error:
            if current is best:
                break  # no extrapolation to take back: float32 resolves no further gain
            current, step = best, step / 2
            continue
        current = _extrapolate(best, updated, step) if math.isfinite(best_error) else updated
        best, best_error, step = updated, error, min(step * STEP_GROWTH, STEP_MOST)
        history.append(error)
        if len(history) > PATIENCE and error > (1 - LEAST_GAIN) * history[-1 - PATIENCE]:
            break
    a, b, *kernel = best
    # The last kernel factor is solved once more, in float64 against the tensor itself.
    products = ((slices @ b) * a).sum(1)
    kernel[-1] = _kernel_factor(products, (a.T @ a) * (b.T @ b), kernel, len(kernel) - 1, LAST_RIDGE)
    return (a * scale, b, *kernel)


def flops(shape: Sequence[int], rank: int) -> int:
    """Floating-point operations of the two large products in a sweep."""
    return 4 * math.prod(shape) * rank


def sweeps(shape: Sequence[int], rank: int) -> int:
    """Most sweeps for a tensor: the larger it is, the fewer, since the first ones bring most.

    On a 256 x 256 x 3 x 3 weight, 16 sweeps end within 2% of the error of 60 at rank 128, within 10% at rank 570.
    """
    return min(SWEEPS, max(LEAST_SWEEPS, int(WORK / flops(shape, rank))))


def balance_components(factors: Factors) -> Factors:
    """The same components, each with equal norms in all factors; a zero component is all zeros."""
    norms = [torch.linalg.vector_norm(factor, dim=0) for factor in factors]
    mean = math.prod(norms[1:], start=norms[0]) ** (1 / len(norms))
    tiny = torch.finfo(mean.dtype).tiny
    return tuple(factor * (mean / norm.clamp_min(tiny)) for factor, norm in zip(factors, norms, strict=True))


def balance_chain(factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The same for the weights of a chain: (R, ...) all but the last one, which is (out, R, ...)."""
    *others, expand = factors
    last, *first = balance_components((expand.flatten(1), *(factor.flatten(1).T for factor in others)))
    return *(new.T.reshape(old.shape) for new, old in zip(first, others, strict=True)), last.reshape(expand.shape)


def khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Column-wise Kronecker product of matrices (n_1, R), (n_2, R), ...: (n_1 n_2 ..., R)."""
    return reduce(lambda left, right: (left.unsqueeze(1) * right).flatten(0, 1), factors)


def _sweep(slices: Tensor, factors: Factors) -> tuple[Factors, float]:
    """One update of all factors, of "in" last, and the squared error after it, for a tensor of norm 1.

    Two large products a sweep: all factors but "in" share the one with it. Sums of elementwise products beat einsum
    by far here.
    """
    _, b, *kernel = factors
    gram_b, whole = b.T @ b, khatri_rao(kernel)
    with_b = slices @ b.float()  # (kernel, out, R)
    a = _solve(gram_b * (whole.T @ whole), (with_b * whole.float().unsqueeze(1)).sum(0).double())
    gram_a, single = a.T @ a, a.float()
    products = (with_b * single).sum(1).double()  # (kernel, R)
    for mode in range(len(kernel)):
        kernel[mode] = _kernel_factor(products, gram_a * gram_b, kernel, mode, RIDGE)
    whole = khatri_rao(kernel)
    with_a = slices.transpose(1, 2) @ single  # (kernel, in, R)
    gram, rhs = gram_a * (whole.T @ whole), (with_a * whole.float().unsqueeze(1)).sum(0).double()
    b = _solve(gram, rhs)
    return (a, b, *kernel), float(1 + (b * (b @ gram - 2 * rhs)).sum())


def _kernel_factor(products: Tensor, gram: Tensor, kernel: Sequence[Tensor], mode: int, ridge: float) -> Tensor:
    """Least squares for one of the kernel's factors, the tensor's products (kernel, R) with out and in given."""
    products = products.reshape(*(len(factor) for factor in kernel), -1).movedim(mode, 0)
    others = [factor for index, factor in enumerate(kernel) if index != mode]
    for other in others:
        products = (products * other.reshape(len(other), *[1] * (products.dim() - 3), -1)).sum(1)
        gram = gram * (other.T @ other)
    return _solve(gram, products, ridge)


def _solve(gram: Tensor, rhs: Tensor, ridge: float = RIDGE) -> Tensor:
    """X of X (G + ridge mean(diag G) I) = rhs, in float64; the ridge makes the matrix safely positive definite."""
    damped = gram.clone()
    damped.diagonal().add_(ridge * gram.diagonal().mean())
    solution = torch.cholesky_solve(rhs.T, torch.linalg.cholesky(damped))
    return solution.T


def _extrapolate(old: Factors, new: Factors, step: float) -> Factors:
    return tuple(n + step * (n - o) for o, n in zip(old, new, strict=True))


def _initial(tensor: Tensor, rank: int, seed: int) -> Factors:
    """HOSVD bases, filled up with random columns where a mode is shorter than the rank."""
    generator = torch.Generator().manual_seed(seed)

    def basis(mode: int) -> Tensor:
        size = tensor.shape[mode]
        leading = leading_basis(tensor.movedim(mode, 0).flatten(1), min(rank, size))
        missing = max(rank - size, 0)
        filling = torch.randn(size, missing, generator=generator, dtype=tensor.dtype) / math.sqrt(size)
        return torch.cat([leading, filling], 1)

    return tuple(basis(mode) for mode in range(tensor.dim()))
