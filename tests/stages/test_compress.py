from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import build
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from tdfx.budget import RESOURCES, Budget
from tdfx.errors import BudgetError, InputError, OptionError, WeightError
from tdfx.planner import Infeasible, knapsack
from tdfx.records.plan import Plan
from tdfx.records.result import Result
from tdfx.stages.apply import apply
from tdfx.stages.capture import capture
from tdfx.stages.compress import compress
from tdfx.stages.plan import plan
from tdfx.stages.profile import profile

METHODS = ["svd", "spatial_svd", "tucker2"]
X = torch.linspace(-2, 2, 2 * 16 * 6 * 6).reshape(2, 16, 6, 6).cos()


def network(dtype: torch.dtype = torch.float32, inplace: bool = False) -> nn.Sequential:
    """With BatchNorm and Dropout; 32 channels so that ranks of 16 save something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=inplace),
            nn.Dropout(0.25),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 48),
        )
        with torch.no_grad():
            model(torch.randn(8, 16, 6, 6))
    return model.eval().to(dtype)


def small(budget: Any = "flops=70%", model: nn.Module | None = None, inputs: Any = X, **options: Any) -> Result:
    """Compressed on a grid of 4, which makes these budgets reachable without caveats."""
    options = {"methods": METHODS, "rank_multiple": 4, "target": None, **options}
    return compress(network() if model is None else model, inputs, budget=budget, **options)


@cache
def result() -> Result:
    """Not to be changed."""
    return small()


@cache
def of_zoo(name: str, budget: str) -> Result:
    model, inputs = build(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flops=.* is reachable only with")
        return compress(model, inputs, budget=budget, methods=METHODS)


def output(module: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = module(*(inputs or (X,)))
    return found


def largest_ratio(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / a.double().abs().max())


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(
        left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left
    )


def ranks(found: Result) -> list[int]:
    return [rank for candidate in found.plan.candidates for rank in candidate.rank]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Checks that weights, buffers, modes, gradients and hooks are as they were."""

    def look() -> list[Any]:
        found: list[Any] = [(name, type(m), m.training, len(m._forward_hooks)) for name, m in model.named_modules()]
        found += [(name, value.data_ptr(), value._version) for name, value in model.state_dict(keep_vars=True).items()]
        return found + [(p.requires_grad, p.grad is None) for p in model.parameters()]

    before, bits = look(), copy.deepcopy(model.state_dict())
    yield
    assert look() == before
    assert all(torch.equal(value, bits[name]) for name, value in model.state_dict().items())


def test_the_signature_is_the_public_one() -> None:
    parameters = inspect.signature(compress).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["model", "example_inputs", "example_kwargs"]
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == [
        "budget", "methods", "ranks", "include", "exclude", "overrides", "metric", "calibration",
        "output", "correct", "planner", "target", "guard", "runtime", "latency",
        "rank_multiple", "trainable", "dynamic", "capture", "verify", "seed", "minimize",
        "evaluate", "cache_dir", "progress",
    ]  # fmt: skip


@pytest.mark.parametrize("trainable", [False, True])
def test_it_is_its_stages(trainable: bool) -> None:
    model = network()
    captured = capture(model, X, trainable=trainable)
    profiled = profile(
        captured,
        methods=METHODS,
        exclude="0",
        overrides={"4": {"methods": ["tucker2"]}},
        metric="weight:scaled",
        target=None,
        rank_multiple=4,
        seed=5,
    )
    staged = apply(model, X, plan(profiled, "params=60%"))
    found = small(
        "params=60%",
        exclude="0",
        overrides={"4": {"methods": ["tucker2"]}},
        metric="weight:scaled",
        seed=5,
        trainable=trainable,
    )
    assert found.plan == staged.plan
    assert same_bits(found.module, staged.module)
    assert (found.before, found.after, found.skipped) == (staged.before, staged.after, staged.skipped)
    assert list(found.report.timings_s) == ["capture", "profile", "plan", "factorize", "verify"]
    assert found.report.plan is found.plan


@pytest.mark.parametrize(
    "budget", ["flops=50%", "macs=60%", "params=45%", "bytes=50%", "flops=80%,params=50%", "macs=300K,bytes=60%"]
)
def test_no_more_than_was_asked_for(budget: str) -> None:
    found = small(budget)
    limits = Budget.parse(budget).resolve(found.before)
    with FlopCounterMode(display=False) as counter:
        output(found.module)
    parameters = list(found.module.parameters())
    counted = {
        "macs": counter.get_total_flops() // 2,
        "params": sum(p.numel() for p in parameters),
        "bytes": sum(p.nbytes for p in parameters),
    }
    assert {name: RESOURCES[name](found.after) for name in counted} == counted
    assert all(counted[name] <= most for name, most in limits.items())
    assert found.plan.budget == budget == str(Budget.parse(budget))


@pytest.mark.parametrize(
    ("name", "budget"),
    [("vgg", "flops=60%"), ("unet", "flops=70%"), ("siamese", "flops=75%"), ("resnet", "flops=70%,params=60%")],
)
def test_networks_are_counted_alike(name: str, budget: str) -> None:
    model, inputs = build(name)
    found = of_zoo(name, budget)
    for module, cost in ((model, found.before), (found.module, found.after)):
        with FlopCounterMode(display=False) as counter:
            output(module, *inputs)
        assert cost.flops == counter.get_total_flops()
        assert cost.params == sum(parameter.numel() for parameter in module.parameters())
        assert cost.weight_bytes == sum(parameter.nbytes for parameter in module.parameters())
    assert found.plan.after.latency_s == pytest.approx(found.after.latency_s, rel=1e-9)
    assert found.after.flops < found.before.flops


@pytest.mark.parametrize("budget", [None, "", "fifty", "50%", "flops=0%", "flops=150%", "speed=50%", "flops=x", 0.5])
def test_a_budget_that_is_not_understood_says_what_is(budget: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdfx.stages.compress.capture_model", None)  # refused before any work
    with pytest.raises(BudgetError, match=r"budget.*flops=50%"):
        small(budget)


def test_no_budget_is_said_to_be_none() -> None:
    with pytest.raises(BudgetError, match=r'no budget given; expected one such as budget="flops=50%"'):
        compress(network(), X)


def test_a_rank_rule_takes_the_place_of_a_budget() -> None:
    found = compress(network(), X, methods="tucker2", ranks="compression=50%", target=None)
    assert {c.site: c.rank for c in found.plan.candidates} == {"0": (18, 9), "4": (19, 19)}
    assert found.plan.budget == "ranks=compression=50%"
    assert [entry.layer for entry in found.skipped] == ["8"]
    assert Plan.from_json(found.plan.to_json()) == found.plan
    again = apply(network(), X, Plan.from_json(found.plan.to_json()))
    assert same_bits(again.module, found.module)


def test_a_rank_rule_with_chains_slower_than_dense_warns() -> None:
    with pytest.warns(UserWarning, match="ranks=ratio=0.33 gives choices .*; estimated slower than dense: 0"):
        compress(network(), X, methods="tucker2", ranks="ratio=0.33")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": "flops=50%", "ranks": "vbmf"}, OptionError, "found budget 'flops=50%' and ranks=vbmf"),
        ({"ranks": "energy"}, OptionError, "ranks is 'energy': expected a share such as energy=0.95"),
        ({"ranks": "vbmf", "planner": "best"}, OptionError, "planner='best' is not known"),
        ({"budget": "flops=50%,params=50%", "planner": "greedy"}, OptionError, "greedy' takes one budget, found 2"),
    ],
)
def test_budget_ranks_and_planner_are_checked_before_the_slow_stages(
    options: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("tdfx.stages.compress.capture_model")
    with pytest.raises(error, match=message):
        compress(network(), X, **options)


def test_a_budget_record_does_as_well() -> None:
    assert small(Budget.parse("flops=70%")).plan == result().plan


def test_an_unreachable_budget_has_attributes() -> None:
    with pytest.raises(
        BudgetError, match=r"budget flops=0.5% is not reachable \(flops: asked .*%\); all together"
    ) as caught:
        small("flops=0.5%", rank_multiple=1)
    least = caught.value.least["flops"]
    assert list(caught.value.least) == ["flops"] and caught.value.scale is not None and caught.value.scale > 1
    assert small(f"flops={least}", rank_multiple=1).after.flops == least


def test_ranks_are_on_the_grid_of_the_target() -> None:
    found = compress(network(), X, budget="flops=75%", methods=METHODS)
    assert found.plan.rank_multiple == 16
    assert ranks(found) and all(rank % 16 == 0 for rank in ranks(found))
    assert found.plan.notes == () and {candidate.caveat for candidate in found.plan.candidates} == {""}
    assert found.plan.latency_source == "estimated"
    assert found.after.latency_s is not None and found.before.latency_s is not None


def test_choices_otherwise_not_offered_are_announced() -> None:
    with pytest.warns(
        UserWarning, match="flops=8% is reachable only with choices that are otherwise not offered"
    ) as caught:
        found = compress(network(), X, budget="flops=8%", methods=METHODS)
    notes = tuple(str(warning.message) for warning in caught)
    assert notes == found.plan.notes
    assert {warning.filename for warning in caught} == {__file__}
    assert set(notes) <= set(found.report.notes)
    assert all(
        f"note: {note}" in str(found.report) and note in json.loads(found.report.to_json())["notes"] for note in notes
    )
    assert any(candidate.caveat for candidate in found.plan.candidates)
    assert any(rank % 16 for rank in ranks(found))
    assert small("flops=8%", rank_multiple=1).plan.notes == ()


def test_without_a_target_nothing_is_estimated() -> None:
    found = small(rank_multiple=None)
    assert (found.plan.target, found.plan.latency_source, found.plan.rank_multiple) == (None, None, 1)
    costs = [found.before, found.after, found.plan.before, found.plan.after, *(c.cost for c in found.plan.candidates)]
    assert {cost.latency_s for cost in costs} == {None}
    assert "latency is not estimated" in str(found.report)


def test_one_stands_for_free_ranks() -> None:
    assert any(rank % 4 for rank in ranks(small(rank_multiple=1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"planner": "greddy"}, r"planner.*'greddy'"),
        ({"verify": "most"}, "verify is 'most'; expected one of 'plan', 'full'"),
    ],
)
def test_options_of_late_stages_are_refused_early(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdfx.stages.compress.capture_model", None)
    with pytest.raises(OptionError, match=message):
        small(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["svd2"]}, "unknown method 'svd2'"),
        ({"include": ["conv*"]}, r"include: 'conv\*' matches no layer; the model has 0, 4, 8"),
        ({"overrides": {"4": {"rank": [0]}}}, r"overrides\['4'\]\['rank'\] is \[0\]"),
        ({"overrides": {"4": {"rang": 3}}}, r"overrides\['4'\] has 'rang'"),
        ({"rank_multiple": -1}, "rank_multiple is -1"),
        ({"target": "tpu"}, "target is 'tpu'"),
        ({"metric": "weights"}, "unknown metric 'weights'; did you mean"),
        ({"seed": 0.5}, "seed is 0.5"),
    ],
)
def test_options_reach_their_stage(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        small(**options)


def test_which_layers() -> None:
    found = small("flops=95%", include="[04]", exclude="0")
    assert [candidate.site for candidate in found.plan.candidates] == ["4"]
    assert {entry.layer: entry.reason for entry in found.skipped} == {
        "0": "excluded (0)",
        "8": "not among include ([04])",
    }
    assert all(f"skipped {entry.layer}: {entry.reason}" in str(found.report) for entry in found.skipped)


def test_a_pinned_rank_is_obeyed() -> None:
    found = small("flops=100%", overrides={"0": {"rank": 5}, "4": {"rank": [3, 9]}, "8": {"skip": True}})
    assert [(c.site, c.rank) for c in found.plan.candidates] == [("0", (5,)), ("4", (3, 9))]


def test_every_step_is_reported() -> None:
    steps: list[str] = []
    small(progress=lambda description, done, total: steps.append(f"{description} {done}/{total}"))
    assert steps[0] == "decomposing 0/3"
    assert {step.split()[1] for step in steps[1:]} == {"0", "4", "8"}
    assert [step.split()[-1] for step in steps] == ["0/3", "1/3", "2/3", "3/3"]


def test_a_cache_changes_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        assert small(cache_dir=tmp_path).plan == result().plan
    assert list(tmp_path.iterdir())


def test_full_verification() -> None:
    full = small("flops=99%", verify="full", methods=["svd"]).report.verification["full_rank"]
    assert {name.split(".")[0] for name in full} == {"8"}


def test_the_module_is_plain_and_in_eval_mode() -> None:
    module = result().module
    assert isinstance(module, fx.GraphModule)
    kinds = {type(part) for part in module.modules() if not any(True for _ in part.children())} - {type(module)}
    assert kinds <= {nn.Conv2d, nn.Linear, nn.ReLU, nn.Flatten, nn.AdaptiveAvgPool2d}
    assert not any(part.training for part in module.modules())
    assert all(part.training for part in copy.deepcopy(module).train().modules())


@pytest.mark.parametrize("trainable", [False, True])
def test_the_module_can_be_copied_pickled_and_loaded(trainable: bool) -> None:
    module = small(trainable=trainable).module
    stored = io.BytesIO()
    torch.save(module, stored)
    stored.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(stored, weights_only=False)]
    for other in copies:
        assert same_bits(other, module)
        assert torch.equal(output(other), output(module))
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert not torch.equal(output(other), output(module))
        other.load_state_dict(module.state_dict())
        assert torch.equal(output(other), output(module))


def test_a_result_can_be_pickled_whole() -> None:
    other = pickle.loads(pickle.dumps(result()))
    assert other.plan == result().plan and same_bits(other.module, result().module)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-5), (torch.bfloat16, 0.1)])
def test_the_module_can_change_its_dtype(dtype: torch.dtype, rtol: float) -> None:
    module = copy.deepcopy(result().module).to(dtype)
    found = output(module, X.to(dtype))
    assert found.dtype == dtype
    assert largest_ratio(output(result().module), found) < rtol


def test_the_module_takes_any_batch() -> None:
    assert output(result().module, X[:1].repeat(5, 1, 1, 1)).shape == (5, 48)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_dtypes(dtype: torch.dtype) -> None:
    model = network(dtype)
    found = small("params=50%", model=model, inputs=X.to(dtype))
    assert {parameter.dtype for parameter in found.module.parameters()} == {dtype}
    assert output(found.module, X.to(dtype)).dtype == dtype
    assert found.before.weight_bytes == dtype.itemsize * found.before.params
    assert found.after.weight_bytes == dtype.itemsize * found.after.params <= found.before.weight_bytes // 2


class Pair(nn.Module):
    """One layer called on two inputs of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(16, 24, 3, padding=1)
        self.head = nn.Linear(24, 12)

    def forward(self, left: Tensor, right: Tensor, scale: float = 2.0) -> Tensor:
        found: Tensor = self.head(self.shared(left).mean((2, 3)) - scale * self.shared(right).mean((2, 3)))
        return found


def test_keyword_inputs_and_a_layer_called_twice() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Pair()
    left, right = X, X[:, :, :4, :3].contiguous()
    by_keyword = compress(
        model, left, {"right": right}, budget="flops=60%", methods=METHODS, rank_multiple=1, target=None
    )
    by_position = compress(model, (left, right), budget="flops=60%", methods=METHODS, rank_multiple=1, target=None)
    assert by_keyword.plan == by_position.plan
    assert torch.equal(by_keyword.module(left, right=right), by_position.module(left, right))
    shared = next(candidate for candidate in by_keyword.plan.candidates if candidate.site == "shared")
    positions = 2 * (6 * 6 + 4 * 3)
    assert by_keyword.before.macs == positions * 16 * 24 * 9 + 2 * 24 * 12
    assert not shared.is_dense
    (rank, *_), per_position = shared.rank, shared.cost.macs // positions
    if shared.method == "spatial_svd":
        assert per_position == rank * 3 * (16 + 24)
    head = next(candidate for candidate in by_keyword.plan.candidates if candidate.site == "head")
    assert by_keyword.after.macs == shared.cost.macs + head.cost.macs


def test_trainable_keeps_batch_norm_and_dropout() -> None:
    model, found = network(), small(trainable=True)
    kinds = [type(part) for part in found.module.modules()]
    assert kinds.count(nn.BatchNorm2d) == 2 and kinds.count(nn.Dropout) == 1
    state = found.module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if name[0] in "15")
    assert not any(type(part) in (nn.BatchNorm2d, nn.Dropout) for part in result().module.modules())
    assert found.plan.trainable and not result().plan.trainable


def test_trainable_errors_are_of_the_weights_as_given() -> None:
    found = small("flops=50%", trainable=True)
    model: Any = network()
    compressed = [candidate for candidate in found.plan.candidates if not candidate.is_dense]
    assert compressed
    for candidate in compressed:
        weight = model.get_submodule(candidate.site).weight.detach()
        alone = nn.Sequential(copy.deepcopy(model.get_submodule(candidate.site)))
        inputs = torch.zeros(2, *weight.shape[1:2], *((6, 6) if weight.dim() == 4 else ()))
        pinned = {"0": {"methods": [candidate.method], "rank": list(candidate.rank)}}
        same = small("flops=100%", model=alone, inputs=inputs, overrides=pinned)
        assert candidate.error == pytest.approx(same.plan.candidates[0].error, rel=1e-9)


def test_trainable_trains() -> None:
    module = small("flops=50%", trainable=True).module.train()
    first, second = output(module), output(module)
    assert not torch.equal(first, second)  # Dropout
    before = copy.deepcopy(module.state_dict())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(X).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in module.parameters())
    optimizer.step()
    after = module.state_dict()
    assert all(bool((before[name] != after[name]).any()) for name in before)  # running statistics included
    assert {"1.running_mean", "1.running_var", "1.num_batches_tracked"} <= set(before)


def test_frozen_layers_that_stay_dense_stay_frozen() -> None:
    model = network()
    model[8].weight.requires_grad_(False)
    found = small(model=model, include=["0", "4"])
    assert not found.module.get_submodule("8").get_parameter("weight").requires_grad


def test_the_same_seed_gives_the_same_bits_whatever_was_drawn_before() -> None:
    overrides = {"0": {"methods": ["cp"], "rank": 16}}
    torch.manual_seed(1)
    first = small(overrides=overrides, seed=7)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second = small(overrides=overrides, seed=7)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.plan == second.plan and first.plan.to_json() == second.plan.to_json()
    assert same_bits(first.module, second.module)


def test_the_seed_reaches_the_decompositions() -> None:
    pinned = {"0": {"methods": ["cp"], "rank": 16}}  # 16 components exceed the kernel's 9 entries: some start at random
    one, other = (small("flops=100%", include="0", overrides=pinned, seed=seed) for seed in (0, 1))
    assert (one.plan.seed, other.plan.seed) == (0, 1)
    assert not same_bits(one.module, other.module)


def test_a_plan_read_back_gives_the_same_network() -> None:
    again = apply(network(), X, Plan.from_json(result().plan.to_json()))
    assert again.plan == result().plan and same_bits(again.module, result().module)


@pytest.mark.parametrize("trainable", [False, True])
def test_the_model_stays_as_it_is(trainable: bool) -> None:
    model = network().train()
    model[1].eval()
    model[4].weight.requires_grad_(False)
    model[8].register_forward_hook(lambda *_: None)
    inputs = X.clone()
    with unchanged(model):
        found = small(model=model, inputs=inputs, trainable=trainable)
        with torch.no_grad():
            for value in found.module.state_dict().values():
                value.zero_()
    assert torch.equal(inputs, X)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(InputError, match=r"model is a function; expected a torch.nn.Module"):
        compress(lambda x: x, X, budget="flops=50%")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("inputs", "kwargs", "message"),
    [
        ([[1.0]], None, r"does not run on the example inputs.*TypeError"),
        (X, {"scale": 2}, r"does not run on the example inputs.*TypeError"),
        (
            X[:, :3],
            None,
            r"Sequential.* does not run on the example inputs \(\(2, 3, 6, 6\) torch.float32\): RuntimeError",
        ),
        (X.double(), None, r"\(\(2, 16, 6, 6\) torch.float64\)"),
        ((X, X), None, r"does not run on the example inputs.*TypeError"),
        (X, {"y": X}, r"does not run on the example inputs.*TypeError"),
        ((), None, r"does not run on the example inputs.*TypeError"),
    ],
)
def test_inputs_that_do_not_fit_are_named(inputs: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        compress(network(), inputs, kwargs, budget="flops=50%")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["4.weight", "8.bias", "1.weight"])
def test_a_parameter_that_is_not_finite_is_named(value: float, name: str) -> None:
    model = network()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    with pytest.raises(WeightError, match=rf"layer {name[0]}: 1 of \d+ values of {name} are NaN or Inf"):
        small(model=model)


def test_a_network_without_layers_to_compress() -> None:
    found = compress(nn.Sequential(nn.MaxPool2d(2)), X, budget="flops=100%")
    assert found.plan.candidates == () and torch.equal(output(found.module), nn.MaxPool2d(2)(X))
    assert Plan.from_json(found.plan.to_json()).to_json() == found.plan.to_json()


def test_a_planner_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def decline(*args: Any) -> list[int]:
        raise Infeasible([0], 1.0)

    monkeypatch.setattr(knapsack, "solve", decline)
    with pytest.raises(BudgetError):
        small(planner="knapsack")
