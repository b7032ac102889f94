"""CP: a convolution as 1 x 1 to R channels, one depthwise kernel on each, and 1 x 1 to the outputs.

The kernel as a three-way tensor (out, in, k k) is a sum of R outer products,
W[o, i, p] = sum_r A[o, r] B[i, r] C[p, r]: the spatial modes stay together, unlike in the four-operator form.

Alternating least squares from HOSVD factors. Two things keep it fast and well behaved: a ridge on every normal
equation, relative to the mean of its diagonal, bounds the cancelling components that CP is prone to; and
extrapolating each sweep along its step, taken back whenever the error grew, reaches in 60 sweeps what plain
alternation needs some 200 for. Sweeps multiply in float32; normal equations and the last factor are in float64.

Sources: Kolda and Bader 2009, section 3.4 (ALS) and 3.3 (degeneracy); Ang, Cohen, Gillis and Hien 2020,
algorithm 1 (extrapolation with restarts); Lebedev et al. 2015 for CP of convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tdfx.decompositions.base import Decomposition, Factors
from tdfx.decompositions.chain import link, pointwise, spatial
from tdfx.decompositions.spectrum import leading_basis
from tdfx.records.layer import LayerSpec, Rank, Site

SWEEPS = 80
RIDGE = 1e-5  # of the mean diagonal of a normal equation
LAST_RIDGE = 1e-10  # of the last, exact one
STEP, STEP_GROWTH, STEP_MOST = 0.5, 1.05, 0.95  # extrapolation
PATIENCE, LEAST_GAIN = 10, 1e-3  # stop when the error falls by less than this share in so many sweeps
MEMORY = 2**31  # bytes of the largest intermediate, kernel x channels x rank in float32

Triple = tuple[Tensor, Tensor, Tensor]


class CP(Decomposition):
    """Pointwise, depthwise, pointwise in place of a convolution."""

    name = "cp"
    summary = "k x k conv -> 1 x 1, depthwise k x k, 1 x 1"
    source = "Kolda & Bader 2009, sec. 3.4; Lebedev et al. 2015"
    max_ranks = 12

    def unsupported(self, site: Site) -> str | None:
        if site.kind == "linear" or math.prod(site.layer.kernel_size) == 1:
            return "cp takes convolutions with a kernel larger than 1"
        return None

    def full_rank(self, site: Site) -> Rank:
        """Rank of the exact construction: one component per slice along the two cheapest modes."""
        layer = site.layer
        return (_exact_rank(layer.out_channels, layer.in_channels, math.prod(layer.kernel_size)),)

    def ranks(self, site: Site, multiple: int = 1) -> tuple[Rank, ...]:
        layer = site.layer
        bytes_per_rank = 4 * math.prod(layer.kernel_size) * max(layer.in_channels, layer.out_channels)
        return tuple(rank for rank in super().ranks(site, multiple) if rank[0] * bytes_per_rank <= MEMORY)

    def chain(self, site: Site, rank: Rank) -> tuple[LayerSpec, ...]:
        layer, (r,) = site.layer, rank
        return link(
            layer,
            (
                pointwise(layer, "reduce", layer.in_channels, r),
                spatial(layer, "depthwise", r, r, groups=r),
                pointwise(layer, "expand", r, layer.out_channels),
            ),
        )

    def decompose(self, weight: Tensor, rank: Rank, *, seed: int = 0) -> Factors:
        (r,) = rank
        tensor = weight.flatten(2)
        factors = exact(tensor) if r == _exact_rank(*tensor.shape) else alternate(tensor, r, seed)
        a, b, c = _balance_components(factors)
        ones = (1,) * (weight.dim() - 2)
        return b.T.reshape(r, -1, *ones), c.T.reshape(r, 1, *weight.shape[2:]), a.reshape(-1, r, *ones)

    def reconstruct(self, factors: Sequence[Tensor]) -> Tensor:
        reduce, depthwise, expand = factors
        return torch.einsum("or,r...,ri->oi...", expand.flatten(1), depthwise.squeeze(1), reduce.flatten(1))


def exact(tensor: Tensor) -> Triple:
    """CP factors (A, B, C) that reproduce a tensor (out, in, kernel) at ``full_rank`` exactly.

    One mode keeps its slices; the other two are enumerated by unit vectors. The mode kept is the largest, so
    the number of components is the product of the two smaller.
    """
    kept = max(range(3), key=lambda mode: tensor.shape[mode])
    others = [mode for mode in range(3) if mode != kept]
    first, second = (tensor.shape[mode] for mode in others)
    factors: list[Tensor] = [tensor] * 3
    factors[kept] = tensor.movedim(kept, 0).flatten(1)
    factors[others[0]] = torch.eye(first, dtype=tensor.dtype).repeat_interleave(second, 1)
    factors[others[1]] = torch.eye(second, dtype=tensor.dtype).repeat(1, first)
    return factors[0], factors[1], factors[2]


def alternate(tensor: Tensor, rank: int, seed: int) -> Triple:
    """CP factors (A, B, C) of a float64 tensor (out, in, kernel) by ridge-regularised, extrapolated ALS."""
    scale = torch.linalg.vector_norm(tensor)
    if scale == 0:
        return tuple(torch.zeros(n, rank, dtype=tensor.dtype) for n in tensor.shape)  # type: ignore[return-value]
    tensor = tensor / scale
    slices = tensor.permute(2, 0, 1).float().contiguous()  # (kernel, out, in)
    current = _initial(tensor, rank, seed)
    best, best_error, step = current, math.inf, STEP
    history: list[float] = []
    for _ in range(SWEEPS):
        updated, error = _sweep(slices, current)
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
    a, b, _ = best
    # The kernel factor is solved once more, in float64 against the tensor itself.
    c = _solve((a.T @ a) * (b.T @ b), ((tensor.permute(2, 0, 1) @ b) * a).sum(1), LAST_RIDGE)
    return a * scale, b, c


def _sweep(slices: Tensor, factors: Triple) -> tuple[Triple, float]:
    """One update of A, C and B in turn and the squared error after it, for a tensor of norm 1.

    Two large products a sweep: A and C share the one with B. Sums of elementwise products beat einsum by far here.
    """
    _, b, c = factors
    with_b = slices @ b.float()  # (kernel, out, R)
    a = _solve((b.T @ b) * (c.T @ c), (with_b * c.float().unsqueeze(1)).sum(0))
    c = _solve((b.T @ b) * (a.T @ a), (with_b * a.float()).sum(1))
    with_a = slices.transpose(1, 2) @ a.float()  # (kernel, in, R)
    gram, rhs = (a.T @ a) * (c.T @ c), (with_a * c.float().unsqueeze(1)).sum(0).double()
    b = _solve(gram, rhs)
    return (a, b, c), float(1 - 2 * (b * rhs).sum() + (b * (b @ gram)).sum())


def _solve(gram: Tensor, rhs: Tensor, ridge: float = RIDGE) -> Tensor:
    """X of X (G + ridge mean(diag G) I) = rhs, in float64; the ridge makes the matrix safely positive definite."""
    damped = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.cholesky_solve(rhs.double().T, torch.linalg.cholesky(damped))
    return solution.T


def _extrapolate(old: Triple, new: Triple, step: float) -> Triple:
    a, b, c = (n + step * (n - o) for o, n in zip(old, new, strict=True))
    return a, b, c


def _initial(tensor: Tensor, rank: int, seed: int) -> Triple:
    """HOSVD bases, filled up with random columns where a mode is shorter than the rank."""
    generator = torch.Generator().manual_seed(seed)

    def basis(mode: int) -> Tensor:
        size = tensor.shape[mode]
        leading = leading_basis(tensor.movedim(mode, 0).flatten(1), min(rank, size))
        missing = max(rank - size, 0)
        filling = torch.randn(size, missing, generator=generator, dtype=tensor.dtype) / math.sqrt(size)
        return torch.cat([leading, filling], 1)

    return basis(0), basis(1), basis(2)


def _balance_components(factors: Triple) -> Triple:
    """The same components, each with equal norms in the three factors; a zero component is all zeros."""
    norms = [torch.linalg.vector_norm(factor, dim=0) for factor in factors]
    product = norms[0] * norms[1] * norms[2]
    a, b, c = (
        factor * torch.where(product > 0, product ** (1 / 3) / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0)
        for factor, norm in zip(factors, norms, strict=True)
    )
    return a, b, c


def _exact_rank(*shape: int) -> int:
    smallest, middle, _ = sorted(shape)
    return smallest * middle
