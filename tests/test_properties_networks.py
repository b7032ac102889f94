"""Drawn networks end to end: budget kept, costs as counted, outputs those of the reconstructed weights."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_networks import Description, DrawnNetwork, Stage, drawn_network
from hypothesis import event, given, note
from hypothesis import strategies as st
from strategies import NETWORK_COUNT, draw_budget, draw_network, draw_options, reproducible, short_als
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tdfx.budget import LATENCY, RESOURCES, Budget
from tdfx.decompositions import registry
from tdfx.errors import BudgetError
from tdfx.onnx_export import export_onnx
from tdfx.records.cost import Cost
from tdfx.records.plan import Plan
from tdfx.records.result import Result
from tdfx.stages.apply import apply
from tdfx.stages.capture import capture
from tdfx.stages.compress import compress
from tdfx.stages.plan import plan
from tdfx.stages.profile import profile

pytestmark = pytest.mark.filterwarnings("ignore:.* is reachable only with choices:UserWarning")


@pytest.fixture(scope="module", autouse=True)
def few_sweeps() -> Iterator[None]:
    with short_als():
        yield


@given(st.integers(0, 2**32))
@reproducible(NETWORK_COUNT)
def test_compressing_drawn_networks(seed: int) -> None:
    choice = random.Random(seed)
    description, budget, options = draw_network(choice), draw_budget(choice), draw_options(choice)
    note(f"{description}, {budget}, {options}")
    model, x = drawn_network(description)
    with unchanged(model, x):
        try:
            result = compress(model, x, budget=budget, **options)
        except BudgetError as error:
            event("unreachable")
            check_unreachable(model, x, budget, options, error)
            return
    event("reached")
    check_cost(model, x, budget, result)
    check_cover(model, result)
    check_output(model, x, result)
    check_reload(model, x, result)


def test_a_drawn_network_is_exported_and_runs_in_onnx_runtime(tmp_path: Path) -> None:
    kinds = ("plain", "residual", "concatenated", "twice", "tied")
    stages = tuple(Stage(kind, 16, 3, 1, kind != "twice", True, kind == "plain") for kind in kinds)  # type: ignore[arg-type]
    model, x = drawn_network(Description(stages, (8, 8), 32, True, False, torch.float32))
    result = compress(model, x, budget="flops=60%", methods=["svd", "channel_svd", "cp"], rank_multiple=4, target=None)
    assert any(not candidate.is_dense for candidate in result.plan.candidates)
    report = export_onnx(result.module, tmp_path / "network.onnx", x)
    assert report.max_rel_diff <= 1e-4


@contextmanager
def unchanged(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Checks that values, identities, modes and gradients of the caller's model are as they were."""

    def look() -> list[Any]:
        modules = [(name, type(module), module.training) for name, module in model.named_modules()]
        return modules + [
            (n, id(p), p.requires_grad, p.grad) for n, p in model.named_parameters(remove_duplicate=False)
        ]

    before, bits = look(), copy.deepcopy({**model.state_dict(), "the input": x})
    yield
    after = {**model.state_dict(), "the input": x}
    assert look() == before
    assert list(after) == list(bits)
    assert all(torch.equal(value, bits[name]) for name, value in after.items())


def counted(module: nn.Module, x: Tensor) -> Cost:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(module).eval()(x)
    parameters = list(module.parameters())
    flops = counter.get_total_flops()
    return Cost(sum(p.numel() for p in parameters), flops // 2, sum(p.nbytes for p in parameters))


def amounts(cost: Cost) -> dict[str, int]:
    return {name: amount(cost) for name, amount in RESOURCES.items() if name != LATENCY}


def check_cost(model: nn.Module, x: Tensor, budget: str, result: Result) -> None:
    before, after = counted(model, x), counted(result.module, x)
    assert amounts(result.before) == amounts(before)
    assert amounts(result.after) == amounts(result.plan.after) == amounts(after)
    for limit in Budget.parse(budget).limits:
        assert amounts(after)[limit.resource] <= Fraction(limit.amount) * amounts(before)[limit.resource]


def check_cover(model: nn.Module, result: Result) -> None:
    """Every layer with a weight matrix is planned or skipped with a reason, and not both."""
    kinds = nn.Linear | nn.modules.conv._ConvNd
    layers = {name: module.weight for name, module in model.named_modules() if isinstance(module, kinds)}
    planned = [candidate.site for candidate in result.plan.candidates]
    skipped = {entry.layer: entry.reason for entry in result.skipped}
    assert len(planned) == len(set(planned))
    covered = {name for name, weight in layers.items() if any(weight is layers[site] for site in planned)}
    assert covered | set(skipped) >= layers.keys() >= set(planned)
    assert not set(planned) & set(skipped)
    assert all(len(reason.split()) > 3 for reason in skipped.values())


def check_output(model: DrawnNetwork, x: Tensor, result: Result) -> None:
    """Against the caller's own network in float64, each compressed layer with its chain's weight and bias.

    Where BatchNorm was folded, the factors are those of the folded weight, which dividing by its scale undoes.
    What remains is the rounding of folded weights and biases: less than 1000 units for these depths.
    """
    reference = copy.deepcopy(model).double().eval()
    kept = dict(result.module.named_modules())
    for candidate in result.plan.candidates:
        if candidate.is_dense:
            continue
        chain = result.module.get_submodule(f"{candidate.site}.{candidate.method}")
        factors = [part.weight.detach().double() for part in chain.children()]  # type: ignore[union-attr,operator]
        weight = registry()[candidate.method].reconstruct(factors)
        block = candidate.site.rpartition(".")[0]
        norm = getattr(reference.get_submodule(block), "norm", None)
        last = list(chain.children())[-1].bias
        bias = None if last is None else last.detach().double()  # type: ignore[union-attr,operator]
        if norm is not None and f"{block}.norm" not in kept:
            scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
            weight = weight / scale.reshape(-1, *[1] * (weight.dim() - 1))
            assert bias is not None
            bias = (bias - norm.bias.detach()) / scale + norm.running_mean
        layer = reference.get_submodule(candidate.site)
        shared, made = layer.weight, nn.Parameter(weight)
        for other in reference.modules():
            if getattr(other, "weight", None) is shared:
                other.weight = made
        layer.bias = None if bias is None else nn.Parameter(bias)
    with torch.no_grad():
        expected, found = reference(x.double()), copy.deepcopy(result.module).double()(x.double())
    allowed = 1000 * torch.finfo(x.dtype).eps
    assert float((found - expected).abs().max()) <= allowed * float(expected.abs().max())


def check_reload(model: nn.Module, x: Tensor, result: Result) -> None:
    """The plan, written and read, gives the same bits again."""
    again = apply(model, x, Plan.from_json(result.plan.to_json()))
    assert again.plan == result.plan
    left, right = result.module.state_dict(), again.module.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert not result.module.training


def check_unreachable(model: nn.Module, x: Tensor, budget: str, options: dict[str, Any], error: BudgetError) -> None:
    """``least`` is the least reachable: it can be reached, and one less cannot; ``scale`` times the limits can."""
    captured = capture(model, x, trainable=options["trainable"])
    profiled = profile(captured, **{k: v for k, v in options.items() if k not in ("trainable", "verify")})
    asked = Budget.parse(budget)
    assert set(error.least) == {limit.resource for limit in asked.limits}
    for resource, least in error.least.items():
        assert amounts(plan(profiled, f"{resource}={least}").after)[resource] <= least
        with pytest.raises(BudgetError):
            plan(profiled, f"{resource}={least - 1}")
    limits = asked.resolve(profiled.before)
    assert error.scale is not None and error.scale > 1
    scaled = ",".join(f"{resource}={math.ceil(error.scale * amount)}" for resource, amount in limits.items())
    plan(profiled, scaled)
