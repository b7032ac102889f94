"""Embeddings, bags and tied heads from capture to ONNX Runtime."""

# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import tdfx
from tdfx.latency.micro_model import Piece
from tdfx.moments import Moments
from tdfx.records.cost import Cost
from tdfx.records.layer import LayerSpec, Lookup
from tdfx.records.result import Result

OPTIONS: dict[str, Any] = {"methods": ["svd"], "rank_multiple": 4, "target": None}


class Recommender(nn.Module):
    """Users, the items that each has seen, and two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(300, 32, padding_idx=3)
        self.seen = nn.EmbeddingBag(200, 32, mode="mean", padding_idx=0)
        self.mlp = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, user: Tensor, seen: Tensor) -> Tensor:
        return self.mlp(torch.cat([self.user(user), self.seen(seen)], 1))


class Pair(nn.Module):
    """A user and an item, and two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(300, 32), nn.Embedding(200, 32)
        self.mlp = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return self.mlp(torch.cat([self.user(user), self.item(item)], 1))


class LanguageModel(nn.Module):
    """Tokens at up to 6 positions; the head is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(600, 32), nn.Embedding(6, 32)
        self.block = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))
        self.head = nn.Linear(32, 600)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(6, device=tokens.device))
        return self.head(x + self.block(x))


def draw(rows: int, *shape: int) -> Tensor:
    """Indices, low ones more often."""
    generator = torch.Generator().manual_seed(1)
    return (rows * torch.rand(shape, generator=generator).square()).long()


NETWORKS: dict[str, tuple[type[nn.Module], tuple[Tensor, ...], tuple[Tensor, ...]]] = {
    "recommender": (Recommender, (draw(300, 4), draw(200, 4, 5)), (draw(300, 64), draw(200, 64, 5))),
    "pair": (Pair, (draw(300, 4), draw(200, 4)), (draw(300, 64), draw(200, 64))),
    "language": (LanguageModel, (draw(600, 2, 6),), (draw(600, 32, 6),)),
}


def network(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NETWORKS[name][0]().eval()


@cache
def compressed(name: str, budget: str, metric: str = "weight") -> Result:
    _, example, data = NETWORKS[name]
    options = OPTIONS if metric == "weight" else {**OPTIONS, "calibration": data, "metric": metric}
    return tdfx.compress(network(name), example, budget=budget, verify="full", **options)


def chosen(result: Result) -> dict[str, str]:
    return {candidate.site: candidate.method for candidate in result.plan.candidates}


@cache
def moments(name: str) -> Moments:
    return tdfx.calibrate(tdfx.capture(network(name), NETWORKS[name][1]), NETWORKS[name][2])


@pytest.mark.parametrize(("name", "budget"), [*((name, "params=50%") for name in NETWORKS), ("pair", "bytes=50%")])
def test_tables_are_factorized_for_their_size(name: str, budget: str) -> None:
    result = compressed(name, budget)
    large = {"recommender": {"user", "seen"}, "pair": {"user", "item"}, "language": {"tokens"}}[name]
    assert "svd" in {chosen(result)[site] for site in large}
    assert result.after.params == sum(parameter.numel() for parameter in result.module.parameters())
    assert result.after.params <= result.before.params / 2


def test_a_budget_of_flops_leaves_tables_alone() -> None:
    methods = chosen(compressed("recommender", "flops=80%"))
    assert (methods["user"], methods["seen"]) == ("dense", "dense")
    assert "svd" in methods.values()


@pytest.mark.parametrize(("name", "metric"), [("pair", "weight"), ("language", "loss")])
def test_onnx_runtime_agrees_on_a_file_that_is_no_larger(name: str, metric: str, tmp_path: Path) -> None:
    example = NETWORKS[name][1]
    result = compressed(name, "params=50%", metric)
    before = tdfx.export_onnx(network(name), tmp_path / "dense.onnx", example)
    after = tdfx.export_onnx(result.module, tmp_path / "compressed.onnx", example)
    assert after.max_rel_diff <= 1e-5
    assert after.file_bytes < before.file_bytes


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_indices_of_either_width(dtype: torch.dtype) -> None:
    example = tuple(value.to(dtype) for value in NETWORKS["recommender"][1])
    result = tdfx.compress(network("recommender"), example, budget="params=50%", **OPTIONS)
    with torch.no_grad():
        wide = result.module(*(value.long() for value in example))
        torch.testing.assert_close(result.module(*example), wide, rtol=0, atol=0)


@pytest.mark.parametrize("metric", ["weight", "loss"])
def test_padding_stays_zero_and_untrained(metric: str) -> None:
    result = compressed("recommender", "params=50%", metric)
    user, seen = result.module.get_submodule("user.svd.reduce"), result.module.get_submodule("seen.svd.reduce")
    assert isinstance(user, nn.Embedding)
    assert isinstance(seen, nn.EmbeddingBag)
    assert (user.padding_idx, seen.padding_idx, seen.mode) == (3, 0, "mean")
    assert not user.weight[3].any()
    assert user.weight[4].all()
    assert result.module.get_submodule("user.svd.expand").get_parameter("weight").shape == (32, user.embedding_dim)
    assert "bias" not in dict(result.module.get_submodule("user").named_parameters())


def test_a_trained_row_of_padding_is_kept() -> None:
    model = network("recommender")
    with torch.no_grad():
        model.get_parameter("user.weight")[3] = 5.0
    result = tdfx.compress(model, NETWORKS["recommender"][1], budget="params=50%", **OPTIONS)
    found = result.module.get_submodule("user")(torch.tensor([3]))
    assert float((found.detach() - 5.0).norm()) <= 0.2 * 5 * 32**0.5


def test_factors_of_a_tie_are_shared_and_stay_so_in_training() -> None:
    example = NETWORKS["language"][1]
    result = tdfx.compress(network("language"), example, budget="params=50%", trainable=True, **OPTIONS)
    module = result.module
    table, head = (module.get_parameter(f"{path}.weight") for path in ("tokens.svd.reduce", "head.svd.expand"))
    assert table is head
    assert [name for name in module.state_dict() if name.startswith("head.")] == [
        "head.svd.expand.weight",
        "head.svd.expand.bias",
    ]
    expand = module.get_parameter("tokens.svd.expand.weight")
    module.zero_grad()
    hidden = torch.randn(1, 6, 32)
    (torch.matmul(hidden, expand) @ table.T).sum().backward()  # type: ignore[no-untyped-call]
    assert expand.grad is not None
    assert result.plan.candidates[0].site == "tokens"
    assert "tokens and head share their factors" in result.report.notes


@pytest.mark.parametrize("metric", ["weight", "feature"])
def test_the_head_of_a_tie_is_the_product_of_the_tables(metric: str) -> None:
    module = compressed("language", "params=50%", metric).module
    table = module.get_parameter("tokens.svd.reduce.weight") @ module.get_parameter("tokens.svd.expand.weight").T
    dense = network("language")
    with torch.no_grad():
        dense.get_parameter("tokens.weight").copy_(table)
        for site in ("block.1", "block.3"):
            part = module.get_submodule(site)
            dense.get_submodule(site).load_state_dict(part.state_dict() if isinstance(part, nn.Linear) else {})
        example = NETWORKS["language"][1]
        torch.testing.assert_close(module(*example), dense(*example), rtol=1e-4, atol=1e-4)


def test_what_is_left_on_the_data_is_what_the_plan_says() -> None:
    result = compressed("recommender", "params=50%", "feature:absolute")
    dense = network("recommender")
    users, _ = NETWORKS["recommender"][2]
    with torch.no_grad():
        found = result.module.get_submodule("user")(users) - dense.get_submodule("user")(users)
    (error,) = (candidate.error for candidate in result.plan.candidates if candidate.site == "user")
    assert error == pytest.approx(float(found.square().sum(1).mean().sqrt()), rel=1e-4)


def test_moments_of_lookups_are_shares_of_rows() -> None:
    users, items = NETWORKS["recommender"][2]
    found = moments("recommender").sites
    shares = torch.bincount(users, minlength=300) / len(users)
    torch.testing.assert_close(found["user"].in_cov, shares, rtol=1e-6, atol=0)
    assert found["user"].out_cov is not None
    assert found["user"].out_cov.shape == (32, 32)
    sums = torch.zeros(200, dtype=torch.float64)
    for bag in items.tolist():
        kept = [row for row in bag if row]
        for row in set(kept):
            sums[row] += (kept.count(row) / len(kept)) ** 2
    torch.testing.assert_close(found["seen"].in_cov, (sums / len(items)).float(), rtol=1e-5, atol=1e-9)


def test_moments_survive_a_file_and_a_memory_limit(tmp_path: Path) -> None:
    moments("language").save(tmp_path / "moments.safetensors")
    assert Moments.load(tmp_path / "moments.safetensors").fingerprint == moments("language").fingerprint
    _, example, data = NETWORKS["language"]
    kept = tdfx.calibrate(tdfx.capture(network("language"), example), data, metric="feature", memory_limit="20KB")
    assert {"tokens", "head", "positions"} <= kept.sites.keys()
    tight = tdfx.calibrate(tdfx.capture(network("language"), example), data, metric="feature", memory_limit="10KB")
    assert {"tokens", "head"}.isdisjoint(tight.sites)


def test_results_are_saved_and_applied_again(tmp_path: Path) -> None:
    for name in ("recommender", "language"):
        result, example = compressed(name, "params=50%", "feature"), NETWORKS[name][1]
        tdfx.save(result, tmp_path / name)
        loaded = tdfx.load(tmp_path / name).module
        again = tdfx.apply(network(name), example, result.plan, factors=result.module.state_dict()).module
        with torch.no_grad():
            for module in (loaded, again):
                torch.testing.assert_close(module(*example), result.module(*example), rtol=0, atol=0)
    assert loaded.get_parameter("tokens.svd.reduce.weight") is loaded.get_parameter("head.svd.expand.weight")


@pytest.mark.parametrize(
    "option", [{"exclude": "head"}, {"include": "block.*"}, {"overrides": {"head": {"skip": True}}}]
)
def test_an_option_for_one_layer_of_a_tie_is_for_all(option: dict[str, Any]) -> None:
    profile = tdfx.profile(tdfx.capture(network("language"), NETWORKS["language"][1]), **option)
    assert "tokens" not in {site.name for site in profile.sites}
    reasons = {entry.layer: entry.reason for entry in profile.skipped}
    assert reasons["head"] == f"its weight is that of tokens: {reasons['tokens']}"


def test_a_batch_norm_is_not_folded_into_a_table() -> None:
    model = nn.Sequential(nn.Embedding(20, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).eval()
    captured = tdfx.capture(model, torch.arange(5))
    assert isinstance(captured.module.get_submodule("1"), nn.BatchNorm1d)
    reasons = {entry.layer: entry.reason for entry in captured.skipped}
    assert "it follows Embedding" in reasons["1"]


class Offsets(nn.Module):
    def __init__(self, *, branch: bool) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(120, 24, mode="sum", include_last_offset=True)
        self.branch = branch

    def forward(self, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        if self.branch and rows.shape[0] == 1:  # what torch.fx cannot trace
            return weights
        return self.bag(rows, offsets, weights)


@pytest.mark.parametrize("branch", [False, True])
def test_bags_of_offsets(branch: bool) -> None:
    example = (draw(120, 9), torch.tensor([0, 3, 3, 9]), torch.rand(9))
    model = Offsets(branch=branch).eval()
    options = {**OPTIONS, "calibration": [example], "metric": "feature"}
    result = tdfx.compress(model, example, budget="params=50%", **options)
    assert result.report.tier == ("export" if branch else "fx")
    bag = result.module.get_submodule("bag.svd")
    table = bag.get_parameter("reduce.weight") @ bag.get_parameter("expand.weight").T
    with torch.no_grad():
        model.bag.weight.copy_(table)
        torch.testing.assert_close(result.module(*example), model(*example), rtol=1e-5, atol=1e-5)


def test_a_bag_runs_in_onnx_runtime(tmp_path: Path) -> None:
    example = draw(40, 3, 4)
    model = nn.Sequential(nn.EmbeddingBag(40, 16, mode="sum")).eval()
    result = tdfx.compress(model, example, budget="params=50%", **OPTIONS)
    assert tdfx.export_onnx(result.module, tmp_path / "bag.onnx", example, dynamic=None).max_rel_diff <= 1e-5


@pytest.mark.parametrize(
    ("kind", "lookup", "shape"),
    [
        ("embedding", Lookup(), (3, 5)),
        ("embeddingbag", Lookup(mode="mean"), (3, 5)),
        ("embeddingbag", Lookup(mode="sum"), (7,)),
    ],
)
def test_models_to_time_lookups_run(kind: Any, lookup: Lookup, shape: tuple[int, ...]) -> None:
    layer = LayerSpec("table", kind, 50, 8, lookup=lookup).called_on((shape,))
    session = ort.InferenceSession(Piece((layer,), 0, "").model(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.zeros(shape, np.int64)})
    assert found.shape == layer.calls[0].output_shape


def test_a_lookup_costs_time_but_no_arithmetic() -> None:
    captured = tdfx.capture(network("recommender"), NETWORKS["recommender"][1])
    profile = tdfx.profile(captured, methods=["svd"], rank_multiple=4)
    dense = {c.site: c.cost for c in profile.candidates if c.is_dense}
    assert dense["user"].macs == 0
    assert 1e-6 < (dense["user"].latency_s or 0) < 1e-5
    chains = [c for c in profile.of_site("user") if not c.is_dense]
    assert all(c.cost.macs == 4 * c.rank[0] * 32 for c in chains)
    assert any(not c.caveat for c in chains)
    assert _added(dense.values()).macs == profile.before.macs


def _added(costs: Any) -> Cost:
    return sum(costs, start=Cost(0, 0, 0, 0.0))
