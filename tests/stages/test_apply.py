from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tdfx.decompositions import registry
from tdfx.errors import OptionError, PlanError, VerificationError
from tdfx.passes.factorize import Factorize
from tdfx.passes.sites import layer_spec
from tdfx.records.candidate import Candidate
from tdfx.records.inputs import InputSpec
from tdfx.records.layer import Call, Rank, Site
from tdfx.records.plan import Plan
from tdfx.records.result import Report, Result
from tdfx.stages import apply as stage
from tdfx.stages.apply import apply
from tdfx.stages.capture import capture
from tdfx.stages.plan import plan
from tdfx.stages.profile import profile

METHODS = ["svd", "spatial_svd", "tucker2"]
INPUTS = torch.linspace(-1, 1, 2 * 8 * 6 * 6).reshape(2, 8, 6, 6).sin()


def network(seed: int = 0, dtype: torch.dtype = torch.float32, channels: int = 24) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(8, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.Flatten(),
            nn.Linear(144, 20),
        )
        with torch.no_grad():
            model(torch.randn(4, 8, 6, 6))
    return model.eval().to(dtype)


@cache
def planned(budget: str = "flops=60%", dtype: torch.dtype = torch.float32, metric: str | None = None) -> Plan:
    captured = capture(network(dtype=dtype), INPUTS.to(dtype))
    return plan(profile(captured, methods=METHODS, rank_multiple=1, metric=metric), budget)


@cache
def applied() -> Result:
    """Not to be changed."""
    return apply(network(), INPUTS, planned())


def edited(edit: Callable[[dict[str, Any]], object], site: str = "3") -> Plan:
    """The plan after an edit of one candidate's JSON."""
    values = json.loads(planned().to_json())
    edit(next(candidate for candidate in values["candidates"] if candidate["site"] == site))
    return Plan.from_json(json.dumps(values))


def of_site(result: Result, site: str = "3") -> Candidate:
    (candidate,) = (candidate for candidate in result.plan.candidates if candidate.site == site)
    return candidate


def folded_weights(model: nn.Sequential) -> dict[str, Tensor]:
    """Weights in float64 with the BatchNorm folded in."""
    state = {name: value.double() for name, value in model.state_dict().items()}
    scale = state["1.weight"] / (state["1.running_var"] + 1e-5).sqrt()
    return {"0": state["0.weight"] * scale[:, None, None, None], "3": state["3.weight"], "5": state["5.weight"]}


def recomputed_norm(result: Result, candidate: Candidate, weight: Tensor) -> float:
    """||W - W~|| from the factors in the result's state dict."""
    prefix = f"{candidate.site}.{candidate.method}."
    factors = [
        v.double() for n, v in result.module.state_dict().items() if n.startswith(prefix) and n.endswith("weight")
    ]
    return float((weight - registry()[candidate.method].reconstruct(factors)).norm())


def output(module: nn.Module, inputs: Tensor = INPUTS) -> Tensor:
    with torch.no_grad():
        found: Tensor = module(inputs)
    return found


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(
        left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left
    )


def largest_ratio(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


def test_the_plan_is_carried_out() -> None:
    result, given = applied(), planned()
    assert len({candidate.method for candidate in given.candidates}) > 1
    for old, new in zip(given.candidates, result.plan.candidates, strict=True):
        assert replace(new, error=0.0) == replace(old, error=0.0)
        assert new.error == pytest.approx(old.error, rel=1e-6, abs=1e-12)
        if not new.is_dense:
            assert new.method in dict(result.module.get_submodule(new.site).named_children())
    assert replace(result.plan, candidates=given.candidates) == given
    assert (result.before, result.skipped) == (given.before, given.skipped)
    assert (result.plan.after.macs, result.plan.after.params) == (given.after.macs, given.after.params)


def test_the_result_computes_the_model_with_the_reconstructed_weights() -> None:
    result, model = applied(), network()
    state = model.state_dict()
    for candidate in result.plan.candidates:
        if not candidate.is_dense:
            prefix = f"{candidate.site}.{candidate.method}."
            factors = [
                v for n, v in result.module.state_dict().items() if n.startswith(prefix) and n.endswith("weight")
            ]
            weight = registry()[candidate.method].reconstruct(factors)
            biases = [v for n, v in result.module.state_dict().items() if n.startswith(prefix) and n.endswith("bias")]
            if candidate.site == "0":
                scale = folded_weights(model)["0"].sum((1, 2, 3)) / state["0.weight"].double().sum((1, 2, 3))
                weight = (weight.double() / scale[:, None, None, None]).float()
            elif biases:
                state[f"{candidate.site}.bias"] = biases[0]
            state[f"{candidate.site}.weight"] = weight.detach()
    model.load_state_dict(state)
    assert largest_ratio(output(model), output(result.module)) < 1e-5


def test_costs_are_what_an_independent_count_finds() -> None:
    result = applied()
    for module, cost in ((network(), result.before), (result.module, result.after)):
        with FlopCounterMode(display=False) as counter:
            output(module)
        assert cost.flops == counter.get_total_flops()
        assert cost.params == sum(parameter.numel() for parameter in module.parameters())
        assert cost.weight_bytes == sum(parameter.nbytes for parameter in module.parameters())
    latency = result.plan.after.latency_s
    assert latency == pytest.approx(result.after.latency_s, rel=1e-9)
    assert replace(result.plan.after, latency_s=None) == replace(result.after, latency_s=None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("metric", ["weight:absolute", "weight:relative", "weight:scaled"])
def test_declared_errors_are_those_of_the_spliced_factors(dtype: torch.dtype, metric: str) -> None:
    model = network(dtype=dtype)
    result = apply(model, INPUTS.to(dtype), planned(dtype=dtype, metric=metric))
    weights = folded_weights(model)
    for candidate in result.plan.candidates:
        if not candidate.is_dense:
            weight = weights[candidate.site]
            norm = float(weight.norm())
            scale = {"weight:absolute": 1.0, "weight:relative": norm, "weight:scaled": weight.numel()}[metric]
            found = recomputed_norm(result, candidate, weight)
            assert candidate.metric == metric
            assert candidate.error * scale == pytest.approx(found, rel=1e-6, abs=4 * torch.finfo(dtype).eps * norm)


@pytest.mark.parametrize("method", registry().values(), ids=list(registry()))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_method_declares_its_error(method: Any, dtype: torch.dtype) -> None:
    model = network(dtype=dtype)
    dense = {name: Site.of(layer_spec(name, model.get_submodule(name), ())) for name in ("0", "3", "5")}  # type: ignore[arg-type]
    site = next(site for site in reversed(dense.values()) if method.unsupported(site) is None)
    rank: Rank = tuple(max(1, r // 4) for r in method.full_rank(site))
    given = planned(dtype=dtype)
    wanted = tuple(
        replace(c, method=method.name, rank=rank) if c.site == site.name else replace(c, method="dense", rank=())
        for c in given.candidates
    )
    result = apply(model, INPUTS.to(dtype), replace(given, candidates=wanted))
    weight = folded_weights(model)[site.name]
    norm = float(weight.norm())
    found = recomputed_norm(result, of_site(result, site.name), weight)
    assert 0.05 * norm < found < norm
    declared = of_site(result, site.name).error * norm
    assert declared == pytest.approx(found, rel=1e-6, abs=4 * torch.finfo(dtype).eps * norm)


@pytest.mark.parametrize("rank", [3, 24])
def test_a_rank_edited_by_hand_is_obeyed_and_costed_anew(rank: int) -> None:
    result = apply(
        network(),
        INPUTS,
        edited(lambda c: c.update(method="spatial_svd", rank=[rank], error=0, cost=dict(c["cost"], params=1))),
    )
    candidate = of_site(result)
    weight = folded_weights(network())["3"]
    unfolded = weight.permute(1, 2, 0, 3).reshape(24 * 3, 16 * 3)
    tail = torch.linalg.svdvals(unfolded)[rank:].norm() / weight.norm()
    assert candidate.rank == (rank,)
    assert candidate.cost.params == rank * 3 * (24 + 16) + 16
    assert candidate.cost.macs == 2 * 9 * rank * 3 * (24 + 16)
    assert candidate.error == pytest.approx(float(tail), rel=1e-9)
    assert result.after.params == sum(parameter.numel() for parameter in result.module.parameters())


def test_a_layer_made_dense_by_hand_is_dense_in_every_field() -> None:
    result = apply(
        network(), INPUTS, edited(lambda c: c.update(method="dense", rank=[4], error=0.5, caveat="slow", metric="x"))
    )
    candidate = of_site(result)
    assert (candidate.rank, candidate.error, candidate.caveat, candidate.metric) == ((), 0.0, "", "weight:relative")
    assert candidate.cost.params == 24 * 16 * 9 + 16
    assert type(result.module.get_submodule("3")) is nn.Conv2d


def test_another_method_by_hand() -> None:
    result = apply(network(), INPUTS, edited(lambda c: c.update(method="tucker2", rank=[5, 7])))
    assert [name for name, _ in result.module.get_submodule("3.tucker2").named_children()] == [
        "reduce",
        "core",
        "expand",
    ]


def test_a_layer_skipped_by_hand() -> None:
    values = json.loads(planned().to_json())
    values["candidates"] = [candidate for candidate in values["candidates"] if candidate["site"] != "3"]
    values["skipped"].append({"layer": "3", "reason": "I want it so"})
    result = apply(network(), INPUTS, Plan.from_json(json.dumps(values)))
    assert type(result.module.get_submodule("3")) is nn.Conv2d
    assert result.skipped[-1].reason == "I want it so"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(method="svdd"), "3: unknown method 'svdd'; known are dense, .*svd"),
        (lambda c: c.update(method="svd", rank=[4]), "3: svd does not apply: kernel is 3x3"),
        (
            lambda c: c.update(method="spatial_svd", rank=[49]),
            "3: spatial_svd has no rank 49 here; its full rank is 48",
        ),
        (lambda c: c.update(method="spatial_svd", rank=[4, 4]), "3: spatial_svd has no rank 4x4 here"),
        (lambda c: c.update(method="spatial_svd", rank=[]), "3: spatial_svd has no rank - here"),
        (
            lambda c: c.update(method="tucker2", rank=[16, 25]),
            "3: tucker2 has no rank 16x25 here; its full rank is 16x24",
        ),
        (lambda c: c.update(site="4"), "the plan names 4; the model's compressible layers are 0, 3, 5"),
    ],
)
def test_a_candidate_that_does_not_fit_is_named(edit: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        apply(network(), INPUTS, edited(edit))


def test_a_layer_that_the_plan_leaves_out_is_named() -> None:
    with pytest.raises(PlanError, match="the plan says nothing of 0, 5; add a candidate each"):
        apply(network(), INPUTS, replace(planned(), candidates=(planned().candidates[1],)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "gpu"}, "the plan cannot be carried out: target is 'gpu'"),
        ({"metric": "entropy"}, "the plan cannot be carried out: unknown metric 'entropy'"),
    ],
)
def test_a_target_or_metric_that_does_not_exist(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        apply(network(), INPUTS, replace(planned(), **change))


def test_a_metric_in_short_means_the_same() -> None:
    result = apply(network(), INPUTS, replace(planned(), metric="weight"))
    assert result.plan == applied().plan


def test_a_plan_carried_out_again_is_itself() -> None:
    result = applied()
    again = apply(network(), INPUTS, Plan.from_json(result.plan.to_json()))
    assert again.plan == result.plan
    assert same_bits(again.module, result.module)


def test_other_inputs_have_other_costs() -> None:
    result = apply(network(), INPUTS.repeat(3, 1, 1, 1), planned())
    assert result.before.macs == 3 * applied().before.macs
    assert result.after.macs == result.plan.after.macs == 3 * applied().after.macs


@pytest.mark.parametrize(
    "other", [network(channels=32), network(dtype=torch.float64), nn.Sequential(*list(network())[:4], nn.Flatten())]
)
def test_a_model_of_another_structure_is_refused(other: nn.Module) -> None:
    inputs = INPUTS.to(next(other.parameters()).dtype)
    for factors in (None, applied().module.state_dict()):
        with pytest.raises(
            PlanError, match=r"made for a model of another structure \(fingerprint .*make a plan for this model"
        ):
            apply(other, inputs, planned(), factors=factors)


def test_a_model_with_other_weights_is_refused() -> None:
    with pytest.raises(PlanError, match=r"made for other weights \(fingerprint .* pass the factors of the result"):
        apply(network(seed=1), INPUTS, planned())


def test_factors_rebuild_the_result_to_the_bit_from_structure_alone() -> None:
    result = applied()
    text = result.plan.to_json()
    rebuilt = apply(network(seed=1), INPUTS, Plan.from_json(text), factors=result.module.state_dict())
    assert same_bits(rebuilt.module, result.module)
    assert torch.equal(output(rebuilt.module), output(result.module))
    assert rebuilt.plan == result.plan
    assert rebuilt.after == result.after


def test_empty_factors_are_for_load_state_dict() -> None:
    result = applied()
    empty = apply(network(seed=1), INPUTS, planned(), factors="empty")
    assert bool(output(empty.module).isnan().all())
    assert (empty.plan, empty.after) == (planned(), result.after)
    assert list(empty.report.verification) == ["capture"]
    assert "load_state_dict before use" in empty.report.notes[-1]
    empty.module.load_state_dict(result.module.state_dict())
    assert torch.equal(output(empty.module), output(result.module))


def test_empty_factors_have_the_dtype_of_their_layer() -> None:
    empty = apply(network(dtype=torch.float64), INPUTS.double(), planned(dtype=torch.float64), factors="empty")
    assert {parameter.dtype for parameter in empty.module.parameters()} == {torch.float64}


@pytest.mark.parametrize("factors", ["Empty", torch.ones(2), [1]])
def test_other_factors_are_refused(factors: Any) -> None:
    with pytest.raises(PlanError, match=r'^factors is a \w+; expected a state dict or "empty"$'):
        apply(network(), INPUTS, planned(), factors=factors)


def test_the_report_survives_its_json() -> None:
    report = apply(network(), INPUTS, planned(), verify="full").report
    found = Report.from_json(report.to_json())
    assert found == report
    assert found.inputs == (InputSpec(None, (2, 8, 6, 6), "float32"),)


def test_factors_are_copied() -> None:
    factors = {name: value.clone() for name, value in applied().module.state_dict().items()}
    rebuilt = apply(network(), INPUTS, planned(), factors=factors)
    with torch.no_grad():
        for parameter in rebuilt.module.parameters():
            parameter.zero_()
    assert all(torch.equal(value, applied().module.state_dict()[name]) for name, value in factors.items())


def _first_factor(factors: dict[str, Any]) -> str:
    return next(name for name in factors if ".spatial_svd." in name or ".tucker2." in name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: f.pop(_first_factor(f)), r"factors: .*\.weight: found no such tensor, expected shape \("),
        (
            lambda f: f.update({_first_factor(f): torch.zeros(2, 2)}),
            r"factors: .*\.weight: found shape \(2, 2\), expected shape",
        ),
        (lambda f: f.update({_first_factor(f): [0.0]}), "found no such tensor"),
        (lambda f: f.clear(), "found no such tensor"),
        (lambda f: f.pop("5.bias", f.pop("5.svd.expand.bias", None)), "factors do not fit the plan's network: .*bias"),
        (
            lambda f: f.update(extra=torch.zeros(1)),
            "factors do not fit the plan's network: .*extra.*state dict of its result",
        ),
    ],
)
def test_factors_that_do_not_fit_are_named(edit: Callable[[dict[str, Any]], object], message: str) -> None:
    factors = dict(applied().module.state_dict())
    edit(factors)
    with pytest.raises(PlanError, match=f"(?s){message}"):
        apply(network(), INPUTS, planned(), factors=factors)


def test_moments_are_refused() -> None:
    with pytest.raises(PlanError, match="the plan was made without moments; leave moments out"):
        apply(network(), INPUTS, planned(), moments={})  # type: ignore[arg-type]


@pytest.mark.parametrize("verify", ["", "all", None, True])
def test_a_verification_that_is_not_known_is_refused(verify: Any) -> None:
    with pytest.raises(OptionError, match=f"verify is {verify!r}; expected one of 'plan', 'full'"):
        apply(network(), INPUTS, planned(), verify=verify)


def test_what_is_verified_is_reported() -> None:
    result = applied()
    compressed = {candidate.site for candidate in result.plan.candidates if not candidate.is_dense}
    assert list(result.report.verification) == ["capture", "chains", "network"]
    assert set(result.report.verification["chains"]) == compressed
    assert max(result.report.verification["chains"].values()) < 1e-9
    assert result.report.verification["network"] < 1e-4


def test_full_verification_covers_every_method_at_every_site() -> None:
    full = apply(network(), INPUTS, planned(), verify="full").report.verification["full_rank"]
    model = network()
    sites = [Site.of(layer_spec(name, model.get_submodule(name), (Call((), ()),))) for name in ("0", "3", "5")]  # type: ignore[arg-type]
    assert set(full) == {f"{s.name}.{m.name}" for s in sites for m in registry().values() if m.unsupported(s) is None}
    assert all(value < 1e-8 for value in full.values())


def test_a_chain_that_is_not_its_layer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    method = registry()["spatial_svd"]
    build = method.build

    def careless(site: Site, rank: Rank, factors: Any, bias: Tensor | None) -> nn.Sequential:
        chain = build(site, rank, factors, bias)
        last: Any = chain[-1]
        last.padding = (0, 0)
        last.padding_mode, last.stride = "zeros", (1, 1)
        return chain

    monkeypatch.setattr(type(method), "build", lambda self, *args: careless(*args))
    with pytest.raises(VerificationError, match="layer 3: its chain differs from the layer"):
        apply(network(), INPUTS, edited(lambda c: c.update(method="spatial_svd", rank=[8])))


@pytest.mark.parametrize("stored", [False, True])
def test_a_chain_that_is_not_of_its_factors_is_refused(stored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = edited(lambda c: c.update(method="spatial_svd", rank=[8]))
    factors = apply(network(), INPUTS, given).module.state_dict() if stored else None
    method = registry()["spatial_svd"]
    build = method.build

    def careless(site: Site, rank: Rank, factors: Any, bias: Tensor | None) -> nn.Sequential:
        return build(site, rank, [1.01 * factor for factor in factors], bias)

    monkeypatch.setattr(type(method), "build", lambda self, *args: careless(*args))
    monkeypatch.setattr(stage, "_load", lambda module, factors: None)
    with pytest.raises(VerificationError, match="its chain differs from the layer"):
        apply(network(), INPUTS, given, factors=factors)


def test_a_network_that_is_not_its_chains_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless(Factorize):
        def rewrite(self, graph_module: Any) -> None:
            super().rewrite(graph_module)
            node = next(node for node in graph_module.graph.nodes if node.target == "2")
            node.replace_all_uses_with(node.args[0])

    monkeypatch.setattr(stage, "Factorize", Careless)
    with pytest.raises(
        VerificationError, match="the rewritten network differs from the one with reconstructed weights"
    ):
        apply(network(), INPUTS, planned())


def test_costs_that_are_not_as_planned_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "rest_cost", lambda *args: applied().before)
    with pytest.raises(VerificationError, match=r"the result has \d+ params, the plan says \d+; report the model"):
        apply(network(), INPUTS, planned())


def test_the_report_says_it_all() -> None:
    report = applied().report
    values = json.loads(report.to_json())
    assert list(values) == [
        "plan", "before", "after", "skipped", "inputs", "tier", "timings_s", "verification", "notes", "versions",
        "measured", "peak_activation_bytes", "coverage",
    ]  # fmt: skip
    assert list(report.timings_s) == ["capture", "factorize", "verify"] and min(report.timings_s.values()) > 0
    assert report.versions["torch"] == torch.__version__
    text = str(report)
    assert str(report.plan) in text
    percent = 100 * report.after.flops / report.before.flops
    assert f"({percent:.1f}%)" in text
    assert [line.split()[0] for line in text.split("\n")[-6:]] == [
        "FLOPs", "parameters", "weight", "activation", "latency", "captured",
    ]  # fmt: skip
    assert math.isfinite(percent)


def test_the_model_stays_as_it_is() -> None:
    model = network().train()
    model[0].eval()
    model[3].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    inputs = INPUTS.clone()
    result = apply(model, inputs, planned())
    with torch.no_grad():
        for value in result.module.state_dict().values():
            value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()].count(False) == 1
    assert torch.equal(inputs, INPUTS)
