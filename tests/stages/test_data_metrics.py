"""Compression with calibration inputs, end to end: what is declared against what is measured on the network itself."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tdfx
from tdfx.chains import solve
from tdfx.correction import correct_spread, spliced
from tdfx.decompositions import method_for, registry
from tdfx.errors import OptionError, PlanError
from tdfx.moments import Moments
from tdfx.passes.base import layer_at
from tdfx.passes.candidates import site_weight
from tdfx.scoring import Scoring, taken_means

METHODS = ("svd", "channel_svd", "spatial_svd", "cp")


class Net(nn.Module):
    """Convolutions with BatchNorm, without bias or BatchNorm, in groups and depthwise, a linear layer without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.plain = nn.Conv2d(12, 16, 3, padding=1, bias=False)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect", groups=2, bias=False)
        self.depthwise = nn.Conv2d(16, 16, 5, padding=2, groups=16)
        self.point = nn.Conv2d(16, 20, 1)
        self.head = nn.Linear(20, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.stem(x)))
        y = self.depthwise(F.relu(self.grouped(F.relu(self.plain(y)))))
        y = F.relu(self.point(F.relu(y)))
        z: Tensor = self.head(y.mean((2, 3)))
        return z


def images(count: int, seed: int) -> Tensor:
    """Smooth images with a mean: inputs whose covariance is far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 3, 3, generator=generator)
    return F.interpolate(coarse, 9, mode="bilinear") + 0.1 * torch.randn(count, 3, 9, 9, generator=generator) + 0.5


DATA, HELD_OUT = images(96, 0), images(200, 1)


@cache
def network() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net()
        for parameter in net.parameters():
            parameter.data.mul_(1.5)
        net.norm(net.stem(DATA))
        net.train()
        for _ in range(20):
            net(DATA)
        return net.eval()


@cache
def captured(*, trainable: bool = False) -> tdfx.Capture:
    return tdfx.capture(network(), DATA[:2], trainable=trainable)


@cache
def moments(metric: str = "loss", *, trainable: bool = False) -> Moments:
    return tdfx.calibrate(captured(trainable=trainable), DATA, metric=metric)


@cache
def profiled(metric: str, *, correct: bool = True) -> tdfx.Profile:
    return tdfx.profile(
        captured(), methods=METHODS, metric=metric, moments=moments(), correct=correct, target=None, rank_multiple=1
    )


def inputs_of(layer: str, data: Tensor) -> Tensor:
    """What the layer sees in the original."""
    seen: list[Tensor] = []
    module = captured().module
    handle = module.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        module(data)
    handle.remove()
    return seen[0].double()


def first_of(profile: tdfx.Profile, site: str, method: str) -> tdfx.Candidate:
    return next(c for c in profile.of_site(site) if c.method == method)


CASES = [
    ("plain", "cp"),
    ("plain", "spatial_svd"),
    ("plain", "channel_svd"),
    ("grouped", "cp"),
    ("grouped", "spatial_svd"),
    ("grouped", "channel_svd"),
    ("depthwise", "spatial_svd"),
    ("point", "svd"),
    ("head", "svd"),
]


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize(("site", "method"), CASES)
@pytest.mark.parametrize("form", ["absolute", "relative", "scaled"])
def test_feature_errors_are_output_errors_measured_on_the_layer(
    site: str, method: str, form: str, correct: bool
) -> None:
    metric = f"feature:{form}"
    profile = profiled(metric, correct=correct)
    candidate = first_of(profile, site, method)
    scoring = Scoring(metric, moments(), taken_means(moments()) if correct else {})
    (place,) = (s for s in profile.sites if s.name == site)
    solved = solve(captured().module, place, candidate, scoring, 0)
    x, dense = inputs_of(site, DATA), layer_at(captured().module, site)
    with torch.no_grad():
        wanted = dense.double()(x)
        chain = solved.replacements()[site].chain.double()
        rows = (wanted - chain(x)).movedim(1, -1).flatten(0, -2) if site != "head" else wanted - chain(x)
        whole = (wanted - (0 if dense.bias is None else dense.bias.reshape(1, -1, *[1] * (wanted.dim() - 2)))).movedim(
            1, -1
        )
        dense.float()
    measured = float(rows.square().sum(1).mean().sqrt())
    if form == "relative":
        centred = whole - (whole.flatten(0, -2).mean(0) if correct else 0)
        measured /= float(centred.flatten(0, -2).square().sum(1).mean().sqrt())
    if form == "scaled":
        measured /= wanted.shape[1]
    assert solved.error(site_weight(captured().module, place), scoring) == pytest.approx(measured, rel=1e-2)


def loss_error(site: str, weight: Tensor) -> float:
    """tr(G D S D^T) / 2 of a weight in the layer's place, written out; D in groups has blocks on its diagonal."""
    layer, found = layer_at(captured().module, site), moments().sites[site]
    difference = (layer.weight.detach().double() - weight).flatten(1)
    difference = torch.block_diag(*difference.chunk(getattr(layer, "groups", 1)))
    in_cov = found.in_cov.double() if found.in_cov.dim() == 2 else torch.block_diag(*found.in_cov.double())
    assert found.out_cov is not None
    return float((found.out_cov.double() @ difference @ in_cov @ difference.T).trace()) / 2


def test_loss_errors_are_recomputed_from_the_spliced_factors() -> None:
    result = compressed("loss", "flops=50%")
    state = {name: value.double() for name, value in result.module.state_dict().items()}
    sites = {site.name: site for site in profiled("loss").sites}
    checked = 0
    for candidate in result.plan.candidates:
        if candidate.is_dense:
            continue
        prefix = f"{candidate.site}.{candidate.method}."
        factors = [v for n, v in state.items() if n.startswith(prefix) and n.endswith("weight")]
        weight = method_for(sites[candidate.site], candidate.method).reconstruct(factors)
        assert candidate.error == pytest.approx(loss_error(candidate.site, weight), rel=1e-3)
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize(("site", "method"), CASES)
def test_declared_loss_errors_are_those_of_the_whole_layer(site: str, method: str) -> None:
    candidate = first_of(profiled("loss"), site, method)
    scoring = Scoring("loss", moments(), taken_means(moments()))
    (place,) = (s for s in profiled("loss").sites if s.name == site)
    weight, solved = site_weight(captured().module, place), solve(captured().module, place, candidate, scoring, 0)
    exact = loss_error(site, solved.method.reconstruct(solved.factors))
    assert solved.error(weight, scoring) == pytest.approx(exact, rel=1e-6)
    assert candidate.error == pytest.approx(exact, rel=0.25)  # of a draft, the covariances shrunk


def test_what_groups_share_counts_in_the_loss() -> None:
    found, scoring = moments().sites["grouped"], Scoring("loss", moments(), taken_means(moments()))
    (place,) = (s for s in profiled("loss").sites if s.name == "grouped")
    assert found.in_cov.shape == (144, 144) and moments("feature").sites["grouped"].in_cov.shape == (2, 72, 72)
    assert found.out_cov is not None
    weight, form = site_weight(captured().module, place), scoring.form(place, shrink=False)
    assert form is not None
    zero = torch.zeros_like(weight)
    whole, apart = form.norm(weight) ** 2, sum(p.norm(w) ** 2 for p, w in zip(form.parts, weight.chunk(2), strict=True))
    assert whole / 2 == pytest.approx(loss_error("grouped", zero), rel=1e-9)
    assert abs(whole / apart - 1) > 1e-3


def test_feature_errors_are_the_same_from_moments_of_the_loss() -> None:
    errors = []
    for kind in ("feature", "loss"):
        found = tdfx.profile(
            captured(), methods=["channel_svd"], metric="feature", moments=moments(kind), target=None,
            rank_multiple=1, include="grouped",
        )  # fmt: skip
        errors.append([candidate.error for candidate in found.candidates])
    assert len(errors[0]) > 3
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


@cache
def compressed(metric: str, budget: str, *, correct: bool = True, trainable: bool = False) -> tdfx.Result:
    return tdfx.compress(
        network(), DATA[:2], budget=budget, methods=METHODS, metric=metric, correct=correct, target=None,
        calibration=moments(trainable=trainable), rank_multiple=1, trainable=trainable,
    )  # fmt: skip


def divergence(result: tdfx.Result) -> float:
    with torch.no_grad():
        wanted, found = (F.log_softmax(net(HELD_OUT), 1) for net in (network(), result.module))
        return float((wanted.exp() * (wanted - found)).sum(1).mean())


def test_data_brings_the_outputs_nearer() -> None:
    weight = tdfx.compress(
        network(), DATA[:2], budget="flops=35%", methods=METHODS, target=None, rank_multiple=1, correct=False
    )
    plain, feature = (divergence(compressed("feature", "flops=35%", correct=c)) for c in (False, True))
    assert feature < 0.8 * divergence(weight)
    assert divergence(compressed("loss", "flops=35%")) < 0.8 * divergence(weight)
    assert plain < divergence(weight)


def test_layers_without_a_bias_gain_one_that_is_counted() -> None:
    result = compressed("loss", "flops=35%")
    for candidate in result.plan.candidates:
        if not candidate.is_dense:
            last = list(result.module.get_submodule(f"{candidate.site}.{candidate.method}").children())[-1]
            assert isinstance(last.bias, nn.Parameter)
    assert result.after.params == sum(parameter.numel() for parameter in result.module.parameters())


def test_without_correction_none_is_gained() -> None:
    result = compressed("feature", "flops=35%", correct=False)
    chosen = {c.site: c for c in result.plan.candidates}["head"]
    assert chosen.is_dense or not any(p.dim() == 1 for p in result.module.get_submodule("head").parameters())
    assert "correction" not in result.report.verification


def test_the_default_metric_is_the_loss() -> None:
    found = tdfx.compress(
        network(), DATA[:2], budget="flops=60%", methods=METHODS, calibration=DATA[:16], target=None, rank_multiple=1
    )
    assert found.plan.metric == "loss"
    assert found.report.timings_s["calibrate"] > 0


def test_what_is_kept_of_a_correction_is_nearer_on_inputs_held_out() -> None:
    found = compressed("loss", "flops=35%").report.verification["correction"]
    assert found["kind"].startswith("spread") == (found["after"] < found["before"])
    assert found["after"] <= found["before"]


def test_a_correction_that_does_not_help_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    profile, scoring = profiled("loss"), Scoring("loss", moments(), taken_means(moments()))
    solved = {
        site.name: solve(captured().module, site, first_of(profile, site.name, "svd"), scoring, 0)
        for site in profile.sites
        if site.name in ("point", "head")
    }
    monkeypatch.setattr("tdfx.passes.correct.MOST_GAIN", 1e-3)  # silences every channel
    kept, outcome = correct_spread(captured(), solved, (DATA,))
    assert outcome.kind == "none" and outcome.after == outcome.before
    assert all(torch.equal(a, b) for n in solved for a, b in zip(kept[n].factors, solved[n].factors, strict=True))


def test_corrections_are_judged_by_what_the_outputs_are() -> None:
    profile, scoring = profiled("loss"), Scoring("loss", moments(), taken_means(moments()))
    solved = {
        site.name: solve(captured().module, site, first_of(profile, site.name, "svd"), scoring, 0)
        for site in profile.sites
        if site.name == "head"
    }
    auto, logits, values = (
        correct_spread(captured(), solved, (DATA,), o)[1].before for o in (None, "logits", "values")
    )
    assert auto == logits != values


def test_spliced_is_the_plain_network() -> None:
    with torch.no_grad():
        torch.testing.assert_close(spliced(captured().module, {})(DATA), captured().module(DATA), rtol=0, atol=0)


def test_batch_norm_is_estimated_anew_where_it_is_kept() -> None:
    result = compressed("loss", "flops=35%", trainable=True)
    found = result.report.verification["correction"]
    assert found["kind"] in ("BatchNorm", "none")
    assert found["after"] <= found["before"]
    before, after = captured(trainable=True).module.get_submodule("norm"), result.module.get_submodule("norm")
    assert torch.equal(before.running_mean, after.running_mean) == (found["kind"] == "none")  # type: ignore[arg-type]


def test_plans_with_data_are_carried_out_only_with_their_moments(tmp_path: Path) -> None:
    plan = tdfx.plan(profiled("loss"), "flops=40%")
    again = tdfx.Plan.from_json(plan.to_json())
    assert again == plan and again.moments == moments().fingerprint
    with pytest.raises(PlanError, match="made with calibration moments"):
        tdfx.apply(network(), DATA[:2], again)
    other = replace(moments(), samples=3, inputs=(DATA[:8],))
    with pytest.raises(PlanError, match="made with other moments"):
        tdfx.apply(network(), DATA[:2], again, moments=other)
    moments().save(tmp_path / "moments.safetensors")
    read = Moments.load(tmp_path / "moments.safetensors")
    first, second = (tdfx.apply(network(), DATA[:2], again, moments=m) for m in (moments(), read))
    same = zip(first.module.state_dict().values(), second.module.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


def test_stored_factors_take_no_moments(tmp_path: Path) -> None:
    result = compressed("loss", "flops=35%")
    stored = tdfx.apply(network(), DATA[:2], result.plan, factors=result.module.state_dict())
    tdfx.save(result, tmp_path)
    for other in (stored, tdfx.load(tmp_path)):
        with torch.no_grad():
            torch.testing.assert_close(other.module(HELD_OUT), result.module(HELD_OUT), rtol=0, atol=0)


def test_moments_of_another_model_are_refused() -> None:
    other = tdfx.capture(nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU()), DATA[:2])
    with pytest.raises(PlanError, match="the moments are of another model"):
        tdfx.profile(other, moments=moments())
    with pytest.raises(PlanError, match="trainable=True"):
        tdfx.profile(captured(), moments=moments(trainable=True))
    with pytest.raises(PlanError, match="metric loss needs moments; make them with tdfx"):
        tdfx.profile(captured(), metric="loss")
    with pytest.raises(PlanError, match='calibrate with metric="loss"'):
        tdfx.profile(captured(), metric="loss", moments=moments("feature"))
    with pytest.raises(OptionError, match="moments is a dict"):
        tdfx.profile(captured(), moments={})  # type: ignore[arg-type]


def test_a_site_without_moments_is_skipped_with_the_reason() -> None:
    known = {name: site for name, site in moments().sites.items() if name != "plain"}
    short = replace(moments(), sites=known, skipped=(tdfx.Skipped("plain", "too large for memory_limit"),))
    profile = tdfx.profile(captured(), metric="feature", moments=short, methods=METHODS, target=None)
    assert "plain" not in {site.name for site in profile.sites}
    assert [e.reason for e in profile.skipped if e.layer == "plain"] == [
        "feature:relative needs moments of its inputs: too large for memory_limit"
    ]


def test_a_weight_plan_is_corrected_from_batch_norm_alone() -> None:
    options = {"budget": "flops=65%", "methods": ("spatial_svd",), "include": "plain", "target": None}
    plain, corrected = (
        tdfx.compress(network(), DATA[:2], rank_multiple=1, correct=c, **options)  # type: ignore[arg-type]
        for c in (False, True)
    )
    assert corrected.plan.corrected and corrected.plan.moments is None
    errors = []
    for result in (plain, corrected):
        chain = result.module.get_submodule("plain")
        x = inputs_of("plain", DATA)
        with torch.no_grad():
            difference = layer_at(captured().module, "plain").double()(x) - chain.double()(x)
            layer_at(captured().module, "plain").float()
        errors.append(float(difference.mean((0, 2, 3)).norm()))
    assert errors[1] < 0.5 * errors[0]
    again = tdfx.apply(network(), DATA[:2], corrected.plan)
    assert json.loads(again.plan.to_json()) == json.loads(corrected.plan.to_json())


def test_a_single_image_does() -> None:
    result = tdfx.compress(
        network(), DATA[:2], budget="flops=50%", methods=METHODS, calibration=DATA[:1], target=None, rank_multiple=1
    )
    assert any("was not corrected: it takes at least 4 samples" in note for note in result.report.notes)
    with torch.no_grad():
        assert bool(result.module(HELD_OUT).isfinite().all())


class OfTwo(nn.Module):
    """Runs on two samples at once and on no other number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(16, 16), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layer(x).relu().reshape(1, 32))
        return y.expand(2, 4)


def test_a_network_of_one_batch_size_is_compressed_without_the_last_correction() -> None:
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    result = tdfx.compress(
        OfTwo().eval(), x[:2], budget="flops=70%", calibration=list(x.split(2)), methods=["svd"], target=None,
        rank_multiple=1, output="values",
    )  # fmt: skip
    assert any("does not run on 12 samples at once" in note for note in result.report.notes)


def test_few_samples_leave_no_direction_free() -> None:
    """Of 40 inputs, 12 samples show 11 directions; the others are not given up."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.arange(1, 41, dtype=torch.float64) ** -0.5
    few, others = (torch.randn(n, 40, generator=generator, dtype=torch.float64) * spread for n in (12, 500))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 32)).double().eval()
    captured = tdfx.capture(model, few[:2])
    moments = tdfx.calibrate(captured, few, metric="feature")
    found = tdfx.profile(captured, moments=moments, methods="svd", target=None, rank_multiple=1)
    at = next(c for c in found.candidates if c.rank >= (12,))
    weight, (site,) = site_weight(captured.module, found.sites[0]), found.sites
    scoring = Scoring(found.metric, moments, taken_means(moments))

    def error(shrink: bool) -> float:
        factors = registry()["svd"].solve(weight, at.rank, scoring.form(site, shrink=shrink))
        left = (others - few.mean(0)) @ (weight - registry()["svd"].reconstruct(factors)).T
        return float(left.norm() / ((others - few.mean(0)) @ weight.T).norm())

    assert at.error == pytest.approx(error(shrink=True), rel=0.25)
    assert error(shrink=True) < 0.9 * error(shrink=False)
    result = tdfx.apply(model, few[:2], tdfx.plan(found, "flops=80%"), moments=moments)
    (note,) = (note for note in result.report.notes if "calibration saw little" in note)
    assert "least of 0: 12 independent inputs of 40 values" in note
