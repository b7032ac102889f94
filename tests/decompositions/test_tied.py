"""Weights of embeddings, and weights that several layers share, against brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tdfx.decompositions import registry
from tdfx.decompositions.metric import Metric
from tdfx.decompositions.tied import TiedMetric, truncated
from tdfx.records.layer import LayerSpec, Lookup, Site

SVD = registry()["svd"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(size: int, seed: int) -> Tensor:
    root = normal(size, 2 * size, seed=seed)
    return root @ root.T / size


def frequencies(rows: int) -> Tensor:
    return torch.arange(1, rows + 1, dtype=torch.float64) / (rows * (rows + 1) / 2)


def root_of(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.sqrt()) @ vectors.T


@pytest.mark.parametrize("shape", [(6, 15), (15, 6)])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_diagonal_covariance_is_a_weighted_svd(shape: tuple[int, int], with_gradients: bool) -> None:
    weight, shares = normal(*shape), frequencies(shape[1])
    out_cov = covariance(shape[0], 1) if with_gradients else None
    out_root = root_of(torch.eye(shape[0], dtype=torch.float64) if out_cov is None else out_cov)
    u, s, vt = torch.linalg.svd(out_root @ weight @ shares.sqrt().diag(), full_matrices=False)
    form = Metric(shares, out_cov)
    for rank in (1, 4, 6):
        expected = torch.linalg.inv(out_root) @ (u[:, :rank] * s[:rank]) @ vt[:rank] @ (1 / shares.sqrt()).diag()
        found = SVD.reconstruct(SVD.solve(weight, (rank,), form))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
        (error,) = SVD.errors(weight, [(rank,)], form)
        assert error == pytest.approx(float(s[rank:].norm()), rel=1e-7, abs=1e-7)
        assert form.norm(weight - found) == pytest.approx(error, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("form", [None, Metric(frequencies(20)), Metric(frequencies(20), covariance(8, 3))])
@pytest.mark.parametrize("rows", [20, 5])
def test_a_row_of_zeros_stays_one_exactly(form: Metric | None, rows: int) -> None:
    weight = normal(8, rows)
    weight[:, 3] = 0
    form = None if form is None else Metric(frequencies(rows), form.out_cov)
    reduce, _ = SVD.solve(weight, (4,), form)
    assert not reduce[:, 3].any()
    assert reduce[:, :3].all()


def uses(rows: int, columns: int, *, gradients: bool) -> tuple[Metric, Metric]:
    """Of an embedding and of a head."""
    lookups = Metric(frequencies(rows), covariance(columns, 4) if gradients else None)
    return lookups, Metric(covariance(columns, 5) / rows, covariance(rows, 6) if gradients else None)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("columns", [7, 14])
def test_errors_of_a_tie_are_those_of_both_uses(gradients: bool, columns: int) -> None:
    weight = normal(columns, 12)
    embedding, head = uses(12, columns, gradients=gradients)
    form = TiedMetric.of([(embedding, False), (head, True)])
    ranks = [(1,), (3,), (6,)]
    errors = SVD.errors(weight, ranks, form)
    for rank, error in zip(ranks, errors, strict=True):
        difference = weight - SVD.reconstruct(SVD.solve(weight, rank, form))
        both = (embedding.norm(difference) ** 2 + head.norm(difference.T) ** 2) ** 0.5
        assert error == pytest.approx(both, rel=1e-7)
        alone = [
            weight - SVD.reconstruct(SVD.solve(weight, rank, embedding)),
            weight - SVD.reconstruct(SVD.solve(weight.T, rank, head)).T,
        ]
        assert both == pytest.approx(min(map(form.norm, alone)), rel=1e-7)
    full = min(weight.shape)
    left, right = truncated(weight, form, full)
    torch.testing.assert_close(left @ right, weight, rtol=1e-8, atol=1e-8)
    assert SVD.errors(weight, [(full,)], form) == [0.0]


def test_chains_of_a_tie_count_the_shared_factors_once() -> None:
    table = LayerSpec("table", "embedding", 40, 16, lookup=Lookup()).called_on(((2, 5),))
    head = LayerSpec("head", "linear", 16, 40, bias=True, tied=True).called_on(((2, 5, 16),))
    site = Site("table", (table, head), "embedding")
    chains = SVD.chains(site, (8,))
    assert [[layer.params for layer in chain] for chain in chains] == [[320, 128], [0, 40]]
    assert [[layer.macs for layer in chain] for chain in chains] == [[0, 1280], [1280, 3200]]
    assert SVD.saves(site, (8,))
    assert not SVD.saves(site, (16,))
