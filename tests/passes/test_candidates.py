"""Candidates: what is offered, at what cost and error, and what is remembered of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from tdfx.cache import ListCache
from tdfx.decompositions import registry
from tdfx.decompositions.base import KNOTS
from tdfx.decompositions.svd import SVD
from tdfx.errors import OptionError, WeightError
from tdfx.passes.candidates import FindCandidates, chain_cost, site_weight
from tdfx.passes.shape_prop import ShapeProp
from tdfx.passes.sites import FindSites
from tdfx.rank_rules import RankRule
from tdfx.records.candidate import Candidate
from tdfx.records.cost import Workload
from tdfx.records.layer import Site, Skipped
from tdfx.scoring import Scoring
from tdfx.selection import Selection
from tdfx.stages.capture import capture
from tdfx.targets import ORT_CPU, Target, layer_cost

METHODS = tuple(registry())
DIRECT = ("svd", "channel_svd", "spatial_svd")
WEIGHT = Scoring("weight:relative", None, {})


class Net(nn.Module):
    """A convolution, a 1 x 1 convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 16, 3)
        self.point = nn.Conv2d(16, 24, 1)
        self.head = nn.Linear(24, 20)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.point(self.conv(x)).mean((2, 3)))
        return y


X = torch.randn(2, 12, 6, 6, generator=torch.Generator().manual_seed(0))


def module_of(model: nn.Module, x: Tensor = X) -> fx.GraphModule:
    return capture(model, x).module


@pytest.fixture
def module() -> fx.GraphModule:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return module_of(Net())


def sites_of(module: fx.GraphModule, x: Tensor = X) -> tuple[Site, ...]:
    return FindSites(ShapeProp((x,)).run(module)).run(module)[0]


def find(
    module: fx.GraphModule,
    methods: Sequence[str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    metric: str = "weight:absolute",
    target: Target | None = None,
    multiple: int = 4,
    seed: int = 0,
    cache: Path | None = None,
    x: Tensor = X,
) -> tuple[tuple[Candidate, ...], tuple[Skipped, ...]]:
    selection = Selection.of(methods, None, None, overrides)
    return FindCandidates(
        sites_of(module, x), selection, Scoring(metric, None, {}), target, multiple, seed, ListCache(cache)
    ).run(module)


@pytest.mark.parametrize("target", [None, ORT_CPU])
def test_dense_is_offered_for_every_site(module: fx.GraphModule, target: Target | None) -> None:
    found, skipped = find(module, target=target, multiple=8)
    assert skipped == ()
    for site in sites_of(module):
        first, *others = (candidate for candidate in found if candidate.site == site.name)
        assert first == Candidate(site.name, "dense", (), layer_cost(site.layer, target), 0.0, "weight:absolute")
        assert others
        assert not any(candidate.is_dense for candidate in others)
        assert len({(candidate.method, candidate.rank) for candidate in others}) == len(others)


@pytest.mark.parametrize(
    ("method", "metric"),
    [*((method, "weight:absolute") for method in METHODS), ("svd", "weight:relative"), ("svd", "weight:scaled")],
)
def test_errors_are_those_of_the_factors(module: fx.GraphModule, method: str, metric: str) -> None:
    found, _ = find(module, [method], metric=metric, seed=3, multiple=8)
    decomposition = registry()[method]
    assert any(not candidate.is_dense for candidate in found)
    offered = {site: [c for c in group if not c.is_dense] for site, group in groupby(found, lambda c: c.site)}
    for candidate in found:
        assert candidate.metric == metric
        if candidate.is_dense:
            continue
        is_computed = len(offered[candidate.site]) <= KNOTS or method in DIRECT
        weight = module.get_submodule(candidate.site).get_parameter("weight").detach().double()
        left = weight - decomposition.reconstruct(decomposition.decompose(weight, candidate.rank, seed=3))
        scale = {"weight:absolute": 1.0, "weight:relative": float(weight.norm()), "weight:scaled": weight.numel()}
        assert candidate.error == pytest.approx(float(left.norm()) / scale[metric], rel=1e-6 if is_computed else 0.1)


def test_costs_are_those_of_the_chain(module: fx.GraphModule) -> None:
    sites = {site.name: site for site in sites_of(module)}
    found, _ = find(module, target=ORT_CPU, multiple=8)
    for candidate in found:
        if not candidate.is_dense:
            chain = registry()[candidate.method].chain(sites[candidate.site], candidate.rank)
            costs = [layer_cost(layer, ORT_CPU) for layer in chain]
            assert candidate.cost == sum(costs[1:], start=costs[0])
            assert candidate.cost.params == sum(layer.params for layer in chain)


class Timed(Target):
    """Whose operators all take what ``second`` says of their MACs."""

    second: Callable[[int], float]

    def latency(self, workload: Workload) -> float:
        return self.second(workload.macs)


def timed(second: Callable[[int], float]) -> Target:
    target = Timed(**vars(ORT_CPU))
    object.__setattr__(target, "second", second)
    return target


BY_MACS, BY_OPERATORS, INSTANT = timed(float), timed(lambda macs: 1.0), timed(lambda macs: 0.0)
SLOWER, OFF_GRID = "estimated slower than dense", "rank off the grid of 4"
BOTH = f"{OFF_GRID} and {SLOWER}"


@pytest.mark.parametrize(
    ("target", "caveats"),
    [
        (None, {"", OFF_GRID}),
        (BY_MACS, {"", OFF_GRID, SLOWER}),
        (BY_OPERATORS, {BOTH, SLOWER}),
        (INSTANT, {BOTH, SLOWER}),  # as slow is slower: there is nothing to gain
    ],
)
def test_caveats_say_what_is_off_the_grid_or_slower_than_dense(
    module: fx.GraphModule, target: Target | None, caveats: set[str]
) -> None:
    found, _ = find(module, ["svd", "tucker2"], target=target)
    dense = {candidate.site: candidate.cost for candidate in found if candidate.is_dense}
    factored = [candidate for candidate in found if not candidate.is_dense]
    assert {candidate.caveat for candidate in factored} == caveats
    assert not any(candidate.caveat for candidate in found if candidate.is_dense)
    for candidate in factored:
        before, after = dense[candidate.site].latency_s, candidate.cost.latency_s
        off_grid = any(rank % 4 for rank in candidate.rank)
        slower = before is not None and after is not None and after >= before
        assert candidate.caveat == {(0, 0): "", (1, 0): OFF_GRID, (0, 1): SLOWER, (1, 1): BOTH}[off_grid, slower]


def test_ranks_are_on_the_grid_but_for_those_below_it(module: fx.GraphModule) -> None:
    ranks = {c.rank for c in find(module, ["svd"], multiple=8)[0] if c.site == "head"}
    assert ranks == {(), (1,), (2,), (4,), (8,)}
    assert {c.rank for c in find(module, ["svd"], multiple=1)[0] if c.site == "head"} == {
        (),
        *((r,) for r in range(1, 11)),
    }


def test_a_pinned_rank_is_the_only_choice(module: fx.GraphModule) -> None:
    found, _ = find(module, ["svd", "tucker2"], {"head": {"rank": 3}, "conv": {"rank": (5, 7)}}, target=BY_OPERATORS)
    pinned = [c for c in found if c.site in ("head", "conv")]
    assert [(c.site, c.method, c.rank, c.caveat) for c in pinned] == [
        ("conv", "tucker2", (5, 7), ""),
        ("head", "svd", (3,), ""),
    ]
    assert any(c.is_dense for c in found if c.site == "point")


def test_a_pinned_rank_that_saves_nothing_is_taken_all_the_same(module: fx.GraphModule) -> None:
    found, _ = find(module, ["svd", "tucker2"], {"head": {"rank": 20}})
    (pinned,) = (c for c in found if c.site == "head")
    assert pinned.rank == (20,)
    assert pinned.cost.params > 24 * 20 + 20


@pytest.mark.parametrize(
    ("rank", "reason"),
    [(21, "no rank of svd fits"), ((2, 2), "no rank of svd fits"), ((3, 3, 3), "kernel larger than 1")],
)
def test_a_pinned_rank_that_no_method_has_is_refused(module: fx.GraphModule, rank: object, reason: str) -> None:
    with pytest.raises(OptionError, match=f"overrides: no method takes rank .* at head: .*{reason}"):
        find(module, ["svd", "tucker2"], {"head": {"rank": rank}})


def test_overrides_choose_methods(module: fx.GraphModule) -> None:
    found, _ = find(module, overrides={"conv": {"methods": ["tucker2"]}})
    assert {c.method for c in found if c.site == "conv"} == {"dense", "tucker2"}


def test_a_site_that_nothing_makes_cheaper_is_skipped_with_reasons() -> None:
    x = torch.randn(2, 1)
    found, skipped = find(module_of(nn.Sequential(nn.Linear(1, 8)), x), x=x)
    assert found == ()
    (entry,) = skipped
    assert entry.layer == "0"
    assert "no rank of svd fits or saves anything" in entry.reason
    assert len(entry.reason.split("; ")) == len(METHODS)


def ruled(module: fx.GraphModule, text: str, method: str = "tucker2", **options: Any) -> Any:
    """Candidates by site and skips by layer with a rank rule."""
    selection = Selection.of([method], None, None, options.pop("overrides", None))
    multiple, target = options.pop("multiple", 1), options.pop("target", None)
    cache = ListCache(options.pop("cache", None))
    find = FindCandidates(sites_of(module), selection, WEIGHT, target, multiple, 0, cache, rule=RankRule.parse(text))
    found, skipped = find.run(module)
    return {candidate.site: candidate for candidate in found}, {entry.layer: entry.reason for entry in skipped}


def test_a_rule_leaves_one_candidate_for_each_site(module: fx.GraphModule) -> None:
    found, skipped = ruled(module, "ratio=0.3")
    candidate = found["conv"]
    assert (list(found), candidate.method, candidate.rank, candidate.caveat) == (["conv"], "tucker2", (5, 4), "")
    weight = module.get_submodule("conv").get_parameter("weight").detach().double()
    (error,) = registry()["tucker2"].errors(weight, [(5, 4)])
    assert candidate.error == pytest.approx(error / float(weight.norm()), rel=1e-9)
    assert skipped == dict.fromkeys(("point", "head"), "tucker2 takes convolutions with a kernel larger than 1")


def test_a_rules_ranks_are_rounded_to_multiples(module: fx.GraphModule) -> None:
    assert ruled(module, "ratio=0.5", multiple=4)[0]["conv"].rank == (8, 8)
    assert ruled(module, "ratio=0.05", multiple=4)[0]["conv"].rank == (4, 4)
    assert ruled(module, "ratio=0.3", multiple=3)[0]["conv"].rank == (6, 3)


def test_a_rules_rank_that_saves_nothing_leaves_the_layer(module: fx.GraphModule) -> None:
    found, skipped = ruled(module, "ratio=0.9", "svd")
    assert found == {}
    assert skipped["head"] == "rank 18 of svd, from ranks=ratio=0.9, saves neither MACs nor parameters"
    assert "rank 16 of svd" in ruled(module, "ratio=0.5", "svd", multiple=16)[1]["head"]


def test_a_layer_in_which_vbmf_finds_noise_is_left(module: fx.GraphModule) -> None:
    found, skipped = ruled(module, "vbmf", "svd")
    assert found == {}
    assert skipped["head"] == "ranks=vbmf finds only noise (rank 0 of svd)"


def test_overrides_go_before_a_rule(module: fx.GraphModule) -> None:
    overrides = {"point": {"methods": ["svd"], "rank": 16}, "head": {"methods": ["svd"]}}
    found, skipped = ruled(module, "ratio=0.25", overrides=overrides)
    assert {name: (c.method, c.rank) for name, c in found.items()} == {
        "conv": ("tucker2", (4, 3)),
        "point": ("svd", (16,)),
        "head": ("svd", (5,)),
    }
    assert skipped == {}


def test_a_rule_warns_of_what_is_slower_but_not_of_the_grid(module: fx.GraphModule) -> None:
    assert ruled(module, "ratio=0.3", target=BY_OPERATORS)[0]["conv"].caveat == SLOWER
    assert ruled(module, "ratio=0.3", target=BY_MACS)[0]["conv"].caveat == ""


def test_what_a_rule_asks_of_errors_is_remembered(
    module: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ruled(module, "energy=0.6", "cp", cache=tmp_path)
    assert first[0]
    forbid(monkeypatch)
    assert ruled(module, "energy=0.6", "cp", cache=tmp_path) == first


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> list[float]:
        raise AssertionError("computed anew")

    for method in registry().values():
        monkeypatch.setattr(type(method), "errors", fail)


def test_a_second_run_computes_nothing(module: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = find(module, cache=tmp_path, multiple=8)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files
    forbid(monkeypatch)
    assert find(module, cache=tmp_path, multiple=8) == first
    relative = find(module, cache=tmp_path, multiple=8, metric="weight:relative", target=ORT_CPU)[0]
    assert [c.rank for c in relative] == [c.rank for c in first[0]]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("text", ["", "[1.0, 2", "{}", '["a"]', "\xff"])
def test_a_corrupt_cache_file_is_computed_anew(module: fx.GraphModule, tmp_path: Path, text: str) -> None:
    first = find(module, ["svd"], cache=tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path in files:
        path.write_text(text, encoding="latin-1")
    assert find(module, ["svd"], cache=tmp_path) == first
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("change", ["weight", "seed", "ranks", "method"])
def test_what_errors_depend_on_is_computed_anew(
    module: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    find(module, ["svd"], cache=tmp_path)
    options: dict[str, Any] = {"seed": {"seed": 1}, "ranks": {"multiple": 2}}.get(change, {})
    if change == "weight":
        module.get_submodule("head").get_parameter("weight").data[0, 0] += 1
    if change == "method":
        monkeypatch.setattr(SVD, "name", "svd2")
    forbid(monkeypatch)
    with pytest.raises(Exception, match="computed anew"):
        find(module, ["svd"], cache=tmp_path, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(module: fx.GraphModule, value: float) -> None:
    module.get_submodule("point").get_parameter("weight").data[:2, 3] = value
    with pytest.raises(WeightError, match="layer point: 2 of 384 weights are NaN or Inf; repair"):
        find(module, ["svd"])


def test_weights_are_decomposed_in_float64() -> None:
    module = module_of(Net().bfloat16(), X.bfloat16())
    site = sites_of(module, X.bfloat16())[0]
    assert site_weight(module, site).dtype == torch.float64
    assert not site_weight(module, site).requires_grad


def test_the_cost_of_a_chain_is_summed_over_its_layers(module: fx.GraphModule) -> None:
    site = next(site for site in sites_of(module) if site.name == "head")
    cost = chain_cost(registry()["svd"], site, (3,), None)
    assert (cost.params, cost.macs, cost.latency_s) == (24 * 3 + 3 * 20 + 20, 2 * (24 * 3 + 3 * 20), None)


def test_progress_counts_the_sites(module: fx.GraphModule) -> None:
    calls: list[tuple[str, int, int]] = []
    FindCandidates(
        sites_of(module),
        Selection.of(["svd"], None, None, None),
        WEIGHT,
        None,
        4,
        0,
        ListCache(None),
        lambda description, done, total: calls.append((description, done, total)),
    ).run(module)
    assert [(done, total) for _, done, total in calls] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert {description for description, _, _ in calls[1:]} == {f"decomposed {s.name}" for s in sites_of(module)}
