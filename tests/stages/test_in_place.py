"""Models that have no graph: their own forward runs as Python, around layers that are watched and replaced there."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import build
from python_networks import PYTHON_NETWORKS, Branch, Loop, build_python
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tdfx
from tdfx.contained import plain_attention
from tdfx.decompositions import method_for
from tdfx.inputs import run
from tdfx.passes.in_place import InPlace
from tdfx.records.capture import Capture
from tdfx.records.plan import Plan
from tdfx.records.result import Result
from tdfx.stages.capture import capture

METHODS = ["svd", "spatial_svd"]
SITES = {
    "branch": {"stem": 1, "positive": 1},
    "loop": {"conv": 3, "mix": 2, "fc": 1},
    "early_exit": {f"{part}.{index}": 1 for index in range(3) for part in ("blocks", "heads")},
    "readers": {"called": 1},
    "encoder": {
        **{f"layer.self_attn.{part}_proj": 1 for part in ("q", "k", "v", "out")},
        **{f"{layer}.linear{index}": 1 for layer in ("layer", "other") for index in (1, 2)},
    },
}


@pytest.fixture(autouse=True)
def fast_path() -> Iterator[None]:
    """As users have it."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(True)
    yield
    torch.backends.mha.set_fastpath_enabled(enabled)


def same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def planned(captured: Capture, budget: str = "flops=100%", **options: Any) -> Plan:
    return tdfx.plan(tdfx.profile(captured, target=None, rank_multiple=4, **options), budget)


def full_rank_plan(captured: Capture) -> Plan:
    """A plan that decomposes all sites without loss."""
    profile = tdfx.profile(captured, methods=["svd", "channel_svd"], target=None, rank_multiple=1)
    candidates = []
    for site in profile.sites:
        dense = profile.of_site(site.name)[0]
        name = "svd" if method_for(site, "svd").unsupported(site) is None else "channel_svd"
        candidates.append(replace(dense, method=name, rank=method_for(site, name).full_rank(site)))
    return replace(tdfx.plan(profile, "flops=100%"), candidates=tuple(candidates))


def compressed(name: str, budget: str = "flops=70%", **options: Any) -> tuple[nn.Module, Tensor, Tensor, Result]:
    model, first, second = build_python(name)
    options = {"target": None, "rank_multiple": 4, "methods": ["svd", "channel_svd"], **options}
    return model, first, second, tdfx.compress(model, first, budget=budget, **options)


# The networks


@pytest.mark.parametrize("name", sorted(PYTHON_NETWORKS))
def test_at_full_rank_the_result_is_the_model_whichever_way_it_goes(name: str) -> None:
    model, first, second = build_python(name)
    captured = capture(model, first)
    assert (captured.tier, captured.max_rel_diff) == ("inplace", 0.0)
    plan = full_rank_plan(captured)
    assert {site.site for site in plan.candidates} == SITES[name].keys()
    result = tdfx.apply(model, first, plan, verify="full")
    assert result.report.tier == "inplace"
    assert type(result.module) is type(model)
    same(run(result.module, (first,), {}), run(model, (first,), {}))
    same(run(result.module, (second,), {}), run(model, (second,), {}))


@pytest.mark.parametrize("name", sorted(PYTHON_NETWORKS))
def test_calls_are_counted_and_costs_are_those_of_torchs_counter(name: str) -> None:
    model, first, _ = build_python(name)
    captured = capture(model, first)
    profile = tdfx.profile(captured, target=None, methods=["svd"])
    assert {site.name: len(site.layer.calls) for site in profile.sites}.items() <= SITES[name].items()
    result = tdfx.apply(model, first, full_rank_plan(captured))
    for network, cost in ((model, result.before), (result.module, result.after)):
        counter = FlopCounterMode(display=False)
        with plain_attention(), sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
            network(first.clone())
        assert cost.flops == counter.get_total_flops()
    assert result.after.params == sum(parameter.numel() for parameter in result.module.parameters())


def test_layers_that_nothing_can_stand_in_for_are_skipped_with_reasons() -> None:
    model, first, _ = build_python("readers")
    reasons = {entry.layer: entry.reason for entry in planned(capture(model, first)).skipped}
    assert reasons["read"].startswith("forward computes with its bias and weight directly")
    assert reasons["hidden"].startswith("forward calls it by a reference that is none of the model's submodules")
    assert reasons["asked"].startswith("forward computes something else with another module in its place")
    assert reasons["tied"].startswith("it shares parameters with a function in forward")
    assert reasons["matrix"].startswith("a parameter of Readers, not of a layer")
    model, first, _ = build_python("encoder")
    reasons = {entry.layer: entry.reason for entry in planned(capture(model, first)).skipped}
    assert reasons["other.self_attn.out_proj"].startswith("forward computes with its bias and weight directly")


class Tagger(nn.Module):
    """A recurrent layer, and a decision on values. Input (batch, time, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.rnn(x)[0]
        return self.fc(y if y.sum() > -1e6 else x)


def test_recurrent_layers_have_a_reason() -> None:
    profiled = planned(capture(Tagger().eval(), torch.randn(2, 5, 8)))
    (skipped,) = profiled.skipped
    assert skipped.layer == "rnn"
    assert skipped.reason.startswith("recurrent layers are compressed in graphs; the model was captured in place")


class Anything(nn.Module):
    """Takes any number of inputs, and options. Input (batch, 16), several times."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor, *more: Tensor, **named: Tensor) -> Tensor:
        return self.fc(sum((*more, *named.values()), x))


def test_inputs_in_any_number_are_taken_by_position_and_keyword() -> None:
    model, x = Anything().eval(), torch.randn(2, 16)
    for args, kwargs in (((x, 2 * x, 3 * x), {}), ((), {"x": x, "other": 2 * x}), ((x, 2 * x), {"other": x})):
        captured = capture(model, args or None, kwargs, capture="inplace")
        same(captured.module(*args, **kwargs), model(*args, **kwargs))


class Force(nn.Module):
    """An energy and its gradient, computed in forward. Input (batch, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.energy = nn.Linear(16, 64), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.energy(torch.tanh(self.hidden(x))).sum()
            (force,) = torch.autograd.grad(energy, x)
        return energy.detach(), force


def test_gradients_that_forward_takes_are_no_layers_cost() -> None:
    result = tdfx.compress(Force(), torch.randn(4, 16), budget="flops=50%", methods="svd", target=None)
    assert result.before.macs == 4 * (16 * 64 + 64)
    assert 2 * result.after.macs <= result.before.macs
    assert not [note for note in result.report.notes if "another way" in note]


def test_parameters_in_lists_are_no_layers() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights, self.fc = nn.ParameterList([torch.randn(4, 4)]), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x @ self.weights[0])

    (skipped,) = capture(Listed(), torch.ones(2, 4), capture="inplace").skipped
    assert skipped.layer == "weights.0"
    assert skipped.reason.startswith("a parameter of ParameterList, not of a layer")


def test_the_linear_layer_of_transformers_has_a_remedy() -> None:
    class Conv1D(nn.Module):
        def __init__(self, nf: int, nx: int) -> None:
            super().__init__()
            self.nf, self.nx = nf, nx
            self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight)

    captured = capture(nn.Sequential(Conv1D(8, 6), nn.Linear(8, 3)).eval(), torch.randn(2, 6), capture="inplace")
    reasons = {entry.layer: entry.reason for entry in planned(captured).skipped}
    assert reasons["0"].endswith("the model was captured in place: use nn.Linear there")


def test_the_report_says_how_much_was_covered() -> None:
    model, first, _ = build_python("readers")
    result = tdfx.apply(model, first, full_rank_plan(capture(model, first)))
    found = result.report.coverage
    assert found is not None and (found.compressible, found.factorized) == (1, 1)
    assert found.layers == 1 + len(result.skipped)
    assert found.macs == pytest.approx(1 / 6, rel=1e-12)
    assert "captured          in place; 1 of" in str(result.report) and "with 16.7% of the FLOPs" in str(result.report)


def test_a_layer_of_the_branch_not_taken_is_skipped() -> None:
    model, first, second = build_python("branch")
    (entry,) = capture(model, first).skipped
    assert (entry.layer, entry.reason) == ("negative", "not called on the example inputs; give inputs on which it is")
    (entry,) = capture(model, second).skipped
    assert entry.layer == "positive"


def test_the_fast_path_of_transformer_layers_does_not_pass_the_chains_by() -> None:
    model, first, _, result = compressed("encoder", "flops=60%")
    names = {candidate.site for candidate in result.plan.candidates if not candidate.is_dense}
    assert "other.linear1" in names or "other.linear2" in names
    with torch.no_grad():
        found = result.module(first)
        with plain_attention():
            same([found], [result.module(first)], 1e-5)
    assert not torch.allclose(found, run(model, (first,), {})[0], rtol=1e-3, atol=1e-3)


# Every tier tells the same


def test_a_model_that_all_tiers_take_costs_the_same_in_each() -> None:
    model, args = build("resnet")
    plans = [
        planned(capture(model, args, trainable=True, capture=tier), "flops=60%", methods=METHODS, correct=False)
        for tier in ("fx", "export", "inplace")
    ]  # uncorrected: what BatchNorm says of the layers behind it takes a graph
    assert [plan.capture for plan in plans] == ["fx", "export", "inplace"]
    assert len({replace(plan, capture=None) for plan in plans}) == 1


def test_moments_are_those_of_the_graph() -> None:
    model, args = build("resnet")
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    graph, in_place = (
        tdfx.calibrate(capture(model, args, trainable=True, capture=tier), images, metric="loss", output="logits")
        for tier in ("fx", "inplace")
    )
    assert list(graph.sites) == list(in_place.sites)
    for name, site in graph.sites.items():
        other = in_place.sites[name]
        for wanted, found in ((site.mean, other.mean), (site.in_cov, other.in_cov), (site.out_cov, other.out_cov)):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    result = tdfx.compress(
        model, args, budget="flops=60%", calibration=graph, trainable=True, capture="inplace", methods=METHODS
    )
    assert result.report.verification["correction"]["after"] <= result.report.verification["correction"]["before"]


def test_moments_of_a_graph_with_folded_batch_norm_are_refused() -> None:
    model, args = build("resnet")
    folded = tdfx.calibrate(capture(model, args), args[0], metric="feature")
    in_place = capture(model, args, capture="inplace")
    with pytest.raises(tdfx.PlanError, match=r"trainable=False, the model was captured .*\(capture 'inplace'\)"):
        tdfx.profile(in_place, moments=folded)
    assert tdfx.calibrate(in_place, args[0], metric="feature").trainable


# The option


def test_a_tier_that_fails_says_why_and_what_else_there_is() -> None:
    model, first, _ = build_python("branch")
    with pytest.raises(tdfx.CaptureError, match=r"capture='fx': .*x.sum\(\) > 0.*capture='export'.*'inplace'"):
        capture(model, first, capture="fx")
    with pytest.raises(tdfx.CaptureError, match=r"capture='export': .*GuardOnDataDependent.*capture='inplace'"):
        tdfx.compress(model, first, budget="flops=60%", capture="export")
    with pytest.raises(
        tdfx.OptionError, match="capture is 'python'; expected one of 'auto', 'fx', 'export', 'inplace'"
    ):
        capture(model, first, capture="python")
    with pytest.raises(tdfx.CaptureError, match=r"model is an exported program.* found 'inplace'"):
        capture(torch.export.export(nn.Linear(4, 4), (torch.ones(2, 4),)), capture="inplace")


def test_a_plan_remembers_the_tier_it_was_made_in() -> None:
    model, args = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8)).eval(), torch.randn(2, 24)
    plan = Plan.from_json(planned(capture(model, args, capture="inplace"), "flops=60%").to_json())
    assert tdfx.apply(model, args, plan).report.tier == "inplace"
    assert tdfx.apply(model, args, plan, capture="fx").report.tier == "fx"
    assert tdfx.apply(model, args, replace(plan, capture=None)).report.tier == "fx"


# The stages after


def test_what_calibration_data_does_not_come_to_is_skipped() -> None:
    model, first, second = build_python("branch")
    captured = capture(model, first)
    moments = tdfx.calibrate(captured, second.repeat(4, 1), output="logits")
    assert list(moments.sites) == ["stem"]
    assert [(entry.layer, entry.reason) for entry in moments.skipped] == [
        ("positive", "forward does not call it on the data")
    ]


def test_correction_takes_the_outputs_nearer() -> None:
    model, first, _ = build_python("loop")
    data = first.repeat(16, 1, 1, 1) * torch.linspace(0.5, 1, 32).reshape(-1, 1, 1, 1)
    result = tdfx.compress(model, first, budget="flops=60%", calibration=data, output="logits", target=None)
    outcome = result.report.verification["correction"]
    assert outcome["after"] <= outcome["before"]
    assert "BatchNorm is not folded into the layers before: that takes a graph" in result.report.notes
    assert "norm" in dict(result.module.named_modules())


@pytest.mark.parametrize("trainable", [False, True])
def test_tuning_trains_the_model_itself(trainable: bool) -> None:
    model, first, _ = build_python("loop")
    data = torch.randn(40, *first.shape[1:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _ in range(20):  # statistics of the data
            model.train()(data)
    options: dict[str, Any] = {"target": None, "rank_multiple": 4, "methods": ["svd", "channel_svd"]}
    result = tdfx.compress(model.eval(), first, budget="flops=60%", trainable=trainable, **options)
    tuned = tdfx.tune(result, data, epochs=6, batch_size=8)
    assert type(tuned.module) is Loop
    before, after = (r.module.state_dict() for r in (result, tuned))
    assert not torch.equal(before["fc.weight"], after["fc.weight"])
    assert torch.equal(before["norm.running_mean"], after["norm.running_mean"]) is not trainable
    assert "divergence" in tuned.report.notes[-1]


def test_what_was_trained_loads_into_the_model(tmp_path: Path) -> None:
    model, first, _, result = compressed("loop", trainable=True)
    result.module.train()(3 * first + 1)  # statistics are buffers
    with torch.no_grad():
        for parameter in result.module.parameters():
            parameter.mul_(1.1)
    tdfx.save(result, tmp_path)
    loaded = tdfx.load(tmp_path, model)
    same(run(loaded.module.eval(), (first,), {}), run(result.module.eval(), (first,), {}))


def test_a_result_trains_as_the_model_does() -> None:
    _, first, _, result = compressed("loop", "flops=100%", trainable=True, include="fc")
    module = result.module.train()
    module(first).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert not torch.equal(module(first), module(first))  # Dropout is there


def test_results_are_copied_pickled_and_captured_again() -> None:
    _, first, second, result = compressed("branch")
    for other in (copy.deepcopy(result.module), pickle.loads(pickle.dumps(result.module))):
        for x in (first, second):
            same(run(other, (x,), {}), run(result.module, (x,), {}), 0.0)
    module = capture(result.module, first).module
    same(run(pickle.loads(pickle.dumps(module)), (second,), {}), run(result.module, (second,), {}), 0.0)
    again = capture(result.module, first)
    assert again.tier == "inplace"
    names = {site.name for site in tdfx.profile(again, target=None, rank_multiple=1).sites}
    assert any(".svd." in name for name in names)


def test_saved_results_are_loaded_into_the_model(tmp_path: Path) -> None:
    model, first, second, result = compressed("branch")
    tdfx.save(result, tmp_path)
    with pytest.raises(tdfx.InputError, match=r"no structure .*load it with model="):
        tdfx.load(tmp_path)
    given = Branch().eval()
    for loaded in (
        tdfx.load(tmp_path, given),
        tdfx.apply(given, first, result.plan, factors=result.module.state_dict()),
    ):
        assert type(loaded.module) is Branch
        same(run(loaded.module, (first,), {}), run(result.module, (first,), {}), 0.0)
    del model, second


def test_export_writes_what_torch_can_and_says_what_has_no_form(tmp_path: Path) -> None:
    _, first, _, result = compressed("branch")
    with pytest.raises(tdfx.ExportError, match="its control flow depends on values, which has no ONNX form here"):
        tdfx.export_onnx(result.module, tmp_path / "branch.onnx", first)
    model, x = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8)).eval(), torch.randn(2, 24)
    plain = tdfx.compress(model, x, budget="flops=70%", capture="inplace", target=None, rank_multiple=4)
    assert plain.after.macs < plain.before.macs
    assert tdfx.export_onnx(plain.module, tmp_path / "plain.onnx", x).max_rel_diff < 1e-5


# What Python code may do


def test_inputs_by_position_and_keyword() -> None:
    class Mixed(Branch):
        def forward(self, *xs: Tensor, scale: Tensor, shift: Tensor | None = None, **rest: Tensor) -> Any:
            y = super().forward(xs[0] + xs[1])["scores"]
            return y * scale + (0 if shift is None else shift) + rest["other"].sum()

    model, x = Mixed().eval(), torch.randn(3, 24)
    kwargs = {"scale": torch.tensor([[2.0], [3.0], [4.0]]), "other": torch.ones(3, 1)}
    captured = capture(model, (x, x), kwargs)
    assert captured.tier == "inplace"
    moments = tdfx.calibrate(captured, [(x, x, *kwargs.values())] * 2, metric="feature")
    options: dict[str, Any] = {"target": None, "rank_multiple": 4, "methods": ["svd"], "calibration": moments}
    result = tdfx.compress(model, (x, x), kwargs, budget="flops=99%", **options)
    tuned = tdfx.tune(result, [(x, x, *kwargs.values())] * 4, epochs=1, batch_size=4, output="values")
    assert len(run(tuned.module, (x, x), kwargs)) == 1
    again = copy.deepcopy(captured.module)
    same([again(x, x, *kwargs.values())], run(model, (x, x), kwargs), 0.0)


def test_a_network_in_half_precision_is_tuned() -> None:
    model, first, second = build_python("branch")
    model, first, second = model.bfloat16(), first.bfloat16(), second.bfloat16()
    result = tdfx.compress(model, first, budget="flops=70%", target=None, rank_multiple=4, methods=["svd"])
    tuned = tdfx.tune(result, torch.cat([first, second]).repeat(4, 1), epochs=1, batch_size=4, output="values")
    assert {parameter.dtype for parameter in tuned.module.parameters()} == {torch.bfloat16}


def test_a_layer_of_two_names_is_replaced_under_both() -> None:
    class Twice(Branch):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.stem

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.again(self.stem(x)) if x.sum() != 0 else x

    model, first = Twice().eval(), torch.randn(3, 24)
    result = tdfx.apply(model, first, full_rank_plan(capture(model, first)))
    assert [candidate.site for candidate in result.plan.candidates] == ["stem"]
    assert result.module.get_submodule("again") is result.module.get_submodule("stem")
    same(run(result.module, (first,), {}), run(model, (first,), {}))


def test_what_forward_writes_to_itself_stays_out_of_the_capture_and_the_result() -> None:
    class Counting(Branch):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("runs", torch.zeros(()))
            self.last: Tensor | None = None

        def forward(self, x: Tensor) -> Any:
            self.runs += 1
            self.last = self.stem(x)
            return super().forward(x)

    model, first = Counting().eval(), torch.randn(3, 24).abs()
    captured = capture(model, first)
    assert "runs: forward updates this buffer in eval mode; so does the result" in captured.notes
    result = tdfx.compress(model, first, budget="flops=70%", target=None, rank_multiple=4, methods=["svd"])
    assert isinstance(captured.module, InPlace)
    for module in (model, captured.module.root, result.module):
        assert float(module.get_buffer("runs")) == 0
    assert captured.module.root.get_buffer("runs") is not model.get_buffer("runs")


def test_a_model_that_gives_something_else_each_time_is_refused() -> None:
    class Drifting(Branch):
        steps = 0

        def forward(self, x: Tensor) -> Any:
            self.steps += 1
            return self.stem(x) * self.steps

    with pytest.raises(tdfx.VerificationError, match="differs from the model's"):
        capture(Drifting(), torch.randn(2, 24), capture="inplace")


def test_another_way_with_compressed_layers_is_noted() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            norm = float(y.square().sum())
            return self.inner(y) if norm > self.least else y

    model = Steps().eval()
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.least = 0.999 * float(model.inner(x).square().sum())
    result = tdfx.compress(model, x, budget="params=60%", target=None, rank_multiple=4, methods=["svd"])
    (note,) = [note for note in result.report.notes if note.startswith("forward takes another way")]
    assert note.endswith(f"{result.after.macs} MACs, the plan says {result.plan.after.macs}")
