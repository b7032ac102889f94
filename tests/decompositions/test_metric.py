"""Factors solved in a metric: against closed forms, brute force and other starting points."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from tdfx.decompositions import registry
from tdfx.decompositions.base import Decomposition
from tdfx.decompositions.grouped import in_groups
from tdfx.decompositions.metric import FLOOR, Metric, metric_svd, roots
from tdfx.decompositions.refine import refine
from tdfx.records.layer import LayerSpec, Rank, Site


def site(inputs: int = 6, outputs: int = 5, kernel: int = 3) -> Site:
    spec = LayerSpec("c", "conv2d", inputs, outputs, (kernel, kernel), (1, 1), (1, 1), "zeros", (1, 1), dtype="float64")
    return Site.of(spec.called_on(((2, inputs, 8, 8),)))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(n: int, samples: int, seed: int = 1) -> Tensor:
    """Of correlated variables of very different sizes."""
    rows = draw(samples, n, seed=seed) @ (draw(n, n, seed=seed + 1) * torch.logspace(0, -1, n, dtype=torch.float64))
    return rows.T @ rows / samples


def metric_for(weight: Tensor, samples: int = 200) -> Metric:
    return Metric(covariance(weight[0].numel(), samples), covariance(len(weight), samples, seed=5))


def whitened_svd_norms(weight: Tensor, metric: Metric) -> Tensor:
    """Independent: singular values of G^1/2 W S^1/2 by scipy's Cholesky factors, which give the same."""
    assert metric.out_cov is not None
    left, right = (np.linalg.cholesky(cov.numpy()) for cov in (metric.out_cov, metric.in_cov))
    return torch.from_numpy(np.linalg.svd(left.T @ weight.flatten(1).numpy() @ right, compute_uv=False).copy())


@pytest.mark.parametrize(("outputs", "inputs"), [(5, 9), (9, 5), (6, 6)])
def test_the_svd_in_a_metric_is_the_whitened_one(outputs: int, inputs: int) -> None:
    weight = draw(outputs, inputs)
    metric = metric_for(weight)
    left, right, norms = metric_svd(weight, metric)
    expected = whitened_svd_norms(weight, metric)
    torch.testing.assert_close(norms[: len(expected)], expected, rtol=1e-5, atol=1e-5 * float(expected[0]))
    for rank in range(len(norms) + 1):
        left_over = metric.norm(weight - left[:, :rank] @ right[:rank])
        assert left_over == pytest.approx(float(expected[rank:].square().sum().sqrt()), rel=1e-4, abs=1e-8)
    torch.testing.assert_close(left @ right, weight, rtol=1e-8, atol=1e-8)


def test_components_have_equal_norms() -> None:
    left, right, _ = metric_svd(draw(5, 9), metric_for(draw(5, 9)))
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1), rtol=1e-10, atol=0)


RANKS: dict[str, Rank] = {
    "channel_svd": (2,),
    "spatial_svd": (4,),
    "tucker2": (3, 3),
    "tt": (3, 3, 3),
    "cp": (4,),
    "cp4": (4,),
}


@pytest.mark.parametrize("name", RANKS)
def test_solving_in_the_metric_beats_solving_without(name: str) -> None:
    method, weight = registry()[name], draw(5, 6, 3, 3)
    metric = metric_for(weight)
    plain, solved = (method.solve(weight, RANKS[name], form) for form in (None, metric))
    assert _left(method, weight, metric, solved) < 0.9 * _left(method, weight, metric, plain)


@pytest.mark.parametrize("name", RANKS)
def test_brute_force_over_all_factors_finds_nothing_much_better(name: str) -> None:
    method, weight = registry()[name], draw(5, 6, 3, 3)
    metric = metric_for(weight)
    solved = method.solve(weight, RANKS[name], metric)
    best = _brute_force(method, weight, metric, solved)
    assert _left(method, weight, metric, solved) <= 1.05 * best


@pytest.mark.parametrize("name", [name for name in registry() if name != "svd"])
def test_full_rank_is_exact_in_a_metric_without_full_rank(name: str) -> None:
    """Three samples in 54 dimensions and a dead channel."""
    method, weight = registry()[name], draw(5, 6, 3, 3)
    rows = draw(3, 54)
    rows[:, :9] = 0
    metric = Metric(rows.T @ rows / 3, covariance(5, 2))
    factors = method.solve(weight, method.full_rank(site()), metric)
    torch.testing.assert_close(method.reconstruct(factors), weight, rtol=1e-7, atol=1e-7)


def test_the_identity_changes_nothing() -> None:
    weight = draw(5, 6, 3, 3)
    metric = Metric(torch.eye(54, dtype=torch.float64), torch.eye(5, dtype=torch.float64))
    method = registry()["channel_svd"]
    plain, solved = (method.reconstruct(method.solve(weight, (2,), form)) for form in (None, metric))
    torch.testing.assert_close(solved, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", RANKS)
def test_declared_errors_are_those_of_the_factors(name: str) -> None:
    method, weight = registry()[name], draw(5, 6, 3, 3)
    metric = metric_for(weight)
    (declared,) = method.errors(weight, [RANKS[name]], metric)
    factors = method.solve(weight, RANKS[name], metric, draft=True)
    assert declared == pytest.approx(_left(method, weight, metric, factors), rel=1e-6)


def test_refinement_never_makes_it_worse() -> None:
    """The start is exact, which no refined factors are, to the last digit."""
    method, weight = registry()["cp"], draw(5, 6, 3, 3)
    metric = metric_for(weight)
    exact = method.decompose(weight, method.full_rank(site()))
    refined = refine(method.filters, weight, exact, metric, 50)
    assert _left(method, weight, metric, refined) <= _left(method, weight, metric, exact)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_solutions_do_not_depend_on_units(scale: float) -> None:
    method, weight = registry()["tucker2"], draw(5, 6, 3, 3)
    metric = metric_for(weight)
    scaled = Metric(metric.in_cov * scale, metric.out_cov)
    solved = method.solve(weight, (3, 3), metric), method.solve(weight, (3, 3), scaled)
    left = [_left(method, weight, metric, factors) for factors in solved]
    assert left[1] == pytest.approx(left[0], rel=1e-3)


def test_a_zero_covariance_leaves_the_frobenius_norm() -> None:
    method, weight = registry()["spatial_svd"], draw(5, 6, 3, 3)
    metric = Metric(torch.zeros(54, 54, dtype=torch.float64))
    plain, solved = (method.reconstruct(method.solve(weight, (4,), form)) for form in (None, metric))
    assert metric.norm(weight) == 0.0
    assert float((solved - weight).norm()) == pytest.approx(float((plain - weight).norm()), rel=1e-6)


def test_roots_are_inverse_to_each_other_and_floored() -> None:
    flat = torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    root, inverse = roots(flat)
    torch.testing.assert_close(root @ inverse, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-9)
    assert float(root[2, 2]) == pytest.approx(math.sqrt(4 * FLOOR), rel=1e-9)


def test_the_largest_eigenvalue_of_a_large_covariance() -> None:
    cov = covariance(600, 50)
    assert Metric(cov).floor == pytest.approx(FLOOR * float(torch.linalg.eigvalsh(cov)[-1]), rel=1e-2)


def _left(method: Decomposition, weight: Tensor, metric: Metric, factors: tuple[Tensor, ...]) -> float:
    return metric.norm(weight - method.reconstruct(factors))


def _brute_force(method: Decomposition, weight: Tensor, metric: Metric, factors: tuple[Tensor, ...]) -> float:
    """All factors at once by BFGS on the error itself, from a disturbed start."""
    shapes = [factor.shape for factor in factors]
    sizes = [factor.numel() for factor in factors]

    def value(vector: np.ndarray) -> tuple[float, np.ndarray]:  # type: ignore[type-arg]
        flat = torch.from_numpy(vector).requires_grad_(True)
        parts = [part.reshape(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]  # type: ignore[no-untyped-call]
        difference = (weight - method.reconstruct(parts)).flatten(1)
        energy = ((metric.out_cov @ difference @ metric.in_cov) * difference).sum()
        energy.backward()
        assert flat.grad is not None
        return float(energy.detach()), flat.grad.numpy()

    start = torch.cat([factor.flatten() * (1 + 0.01 * draw(factor.numel(), seed=9)) for factor in factors]).numpy()
    return math.sqrt(minimize(value, start, jac=True, method="BFGS", options={"maxiter": 800}).fun)


def test_large_metrics_lose_nothing_by_single_precision_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    method, weight = registry()["cp"], draw(5, 6, 3, 3)
    metric = metric_for(weight)
    double = method.solve(weight, (4,), metric), method.solve(weight, (4,), metric, draft=True)
    monkeypatch.setattr("tdfx.decompositions.metric.LARGE", 1)
    metric = metric_for(weight)
    single = method.solve(weight, (4,), metric), method.solve(weight, (4,), metric, draft=True)
    for one, other in zip(double, single, strict=True):
        found = _left(method, weight, metric, other)
        assert found == pytest.approx(_left(method, weight, metric, one), rel=0.05)


def test_norms_in_single_precision() -> None:
    cov = covariance(1100, 300)
    difference = 1e-30 * draw(4, 1100)
    exact = math.sqrt(float((difference @ cov @ difference.T).trace()))
    assert Metric(cov).norm(difference) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("kind", ["zero", "rows that sum to zero"])
def test_large_metrics_without_a_direction_have_a_floor(kind: str) -> None:
    n = 576
    centred = torch.eye(n, dtype=torch.float64) - 1 / n
    metric = Metric(torch.zeros_like(centred) if kind == "zero" else centred)
    assert metric.floor == pytest.approx(1.0 if kind == "zero" else FLOOR, rel=1e-3)


GROUPS = 3


def in_three_groups(outputs: int = 5, inputs: int = 6) -> tuple[Tensor, Metric]:
    weight = draw(GROUPS * outputs, inputs, 3, 3)
    form = Metric(covariance(GROUPS * inputs * 9, 400), covariance(len(weight), 200, seed=5), GROUPS)
    return weight, form


def dense(weight: Tensor) -> Tensor:
    """The matrix (out, n) of a weight in groups."""
    return torch.block_diag(*weight.flatten(1).chunk(GROUPS))


def blocks(matrix: Tensor) -> Tensor:
    size = len(matrix) // GROUPS
    return torch.stack([matrix[i : i + size, i : i + size] for i in range(0, len(matrix), size)])


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_the_norm_of_a_weight_in_groups_is_that_of_the_matrix(gradients: bool, whole: bool) -> None:
    weight, form = in_three_groups()
    assert form.out_cov is not None
    in_cov, out_cov = form.in_cov, form.out_cov if gradients else None
    given = Metric(in_cov if whole else blocks(in_cov), out_cov, GROUPS)
    matrix = dense(weight)
    between = in_cov if whole else torch.block_diag(*blocks(in_cov))
    weighted = matrix if out_cov is None else out_cov @ matrix
    assert given.norm(weight) == pytest.approx(float(((weighted @ between) * matrix).sum()) ** 0.5, rel=1e-9)
    assert given.crosses_groups == (gradients and whole)


def test_each_group_is_solved_in_its_own_block() -> None:
    weight, form = in_three_groups()
    assert form.out_cov is not None
    for name, rank in RANKS.items():
        method = registry()[name]
        found = in_groups(method, GROUPS).solve(weight, rank, form, draft=True)
        of_groups = [
            method.solve(part, rank, Metric(*pair), draft=True)
            for part, *pair in zip(weight.chunk(GROUPS), blocks(form.in_cov), blocks(form.out_cov), strict=True)
        ]
        for factor, own in zip(found, zip(*of_groups, strict=True), strict=True):
            torch.testing.assert_close(factor, torch.cat(own), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", RANKS)
def test_declared_errors_of_groups_are_those_of_the_whole_layer(name: str, whole: bool) -> None:
    weight, form = in_three_groups()
    form = form if whole else Metric(blocks(form.in_cov), form.out_cov, GROUPS)
    method = in_groups(registry()[name], GROUPS)
    (declared,) = method.errors(weight, [RANKS[name]], form)
    factors = method.solve(weight, RANKS[name], form, draft=True)
    assert declared == pytest.approx(form.norm(weight - method.reconstruct(factors)), rel=1e-6)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", ["channel_svd", "tucker2", "cp"])
def test_errors_of_groups_between_the_computed_ones_are_near(name: str, whole: bool) -> None:
    weight, form = in_three_groups(16, 16)
    form = form if whole else Metric(blocks(form.in_cov), form.out_cov, GROUPS)
    method = in_groups(registry()[name], GROUPS)
    (most,) = {min(full) for full in [method.full_rank(Site.of(_in_groups(16, 16)))]}
    ranks = [(r,) * (2 if name == "tucker2" else 1) for r in range(1, min(most, 16), 2)]
    exact = [form.norm(weight - method.reconstruct(method.solve(weight, rank, form, draft=True))) for rank in ranks]
    np.testing.assert_allclose(method.errors(weight, ranks, form), exact, rtol=0.15)


def test_whitened_groups_are_whitened_by_themselves() -> None:
    weight, form = in_three_groups()
    assert form.out_cov is not None
    wanted = [
        Metric(*pair).whitened(part)
        for part, *pair in zip(weight.chunk(GROUPS), blocks(form.in_cov), blocks(form.out_cov), strict=True)
    ]
    torch.testing.assert_close(form.whitened(weight), torch.cat(wanted), rtol=1e-12, atol=1e-12)


def _in_groups(outputs: int, inputs: int) -> LayerSpec:
    return LayerSpec(
        "c", "conv2d", GROUPS * inputs, GROUPS * outputs, (3, 3), (1, 1), (1, 1), dilation=(1, 1), groups=GROUPS
    )  # fmt: skip
