from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import build
from torch import Tensor, fx, nn

from tdfx import distillation
from tdfx.divergence import divergence, variance
from tdfx.errors import InputError, OptionError
from tdfx.features import mismatch, observed, paired_nodes
from tdfx.precision import HALVES, in_float32
from tdfx.records.result import Result
from tdfx.saving import load, save
from tdfx.stages import tune as stage
from tdfx.stages.compress import compress
from tdfx.stages.tune import tune

State = Mapping[str, Tensor]


def compressed(model: nn.Module, inputs: Any, kwargs: Any = None, **options: Any) -> Result:
    options = {"budget": "flops=30%", "methods": ["svd", "spatial_svd"], "target": None, "rank_multiple": 1, **options}
    return compress(model, inputs, kwargs, **options)


@cache
def of_zoo(name: str, trainable: bool = False, budget: str = "flops=30%") -> Result:
    """Not to be changed. BatchNorm has the statistics of what ``samples`` gives, as that of a trained network would."""
    model, inputs = build(name)
    norms = [part for part in model.train().modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(*samples(name))
    for norm in norms:
        norm.momentum = 0.1
    return compressed(model.eval(), inputs, trainable=trainable, budget=budget)


def samples(name: str, count: int = 24) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn((count, *value.shape[1:]), generator=generator)
        if value.is_floating_point()
        else torch.randint(40, (count, *value.shape[1:]), generator=generator)
        for value in build(name)[1]
    )


def quick(result: Result, data: Any, **options: Any) -> Result:
    given = {"epochs": 4, "batch_size": 6, "held_out": 0.25, "learning_rate": 1e-3, "features": False}
    return tune(result, data, **{**given, **options})


def states(result: Result) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in result.module.state_dict().items()}


def agree(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def before_and_after(result: Result) -> tuple[float, float]:
    """On the held-out samples, as the note says."""
    found = re.search(r"held-out samples (\S+) -> (\S+) in", result.report.notes[-1])
    assert found is not None
    return float(found[1]), float(found[2])


def measured(result: Result, data: tuple[Tensor, ...], output: str, held: int, seed: int = 0) -> float:
    """Divergence on the samples that a run with this seed holds out."""
    rows = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))[:held]
    assert result.original is not None
    with torch.no_grad():
        wanted, found = (net(*(value[rows] for value in data)) for net in (result.original, result.module))
        spread = [variance(result.original(*data))]
    return float(divergence([wanted], [found], output, spread))


@pytest.mark.parametrize("name", ["vgg", "resnet", "mixer", "siamese", "transformer"])
def test_it_comes_closer_to_the_original_on_samples_held_out(name: str) -> None:
    result, data = of_zoo(name), samples(name)
    tuned = quick(result, data, progress=False)
    before, after = before_and_after(tuned)
    assert after < 0.9 * before
    assert tuned.plan == result.plan and tuned.original is result.original


@pytest.mark.parametrize(
    ("name", "output", "budget"),
    [("vgg", "logits", "flops=30%"), ("language_model", "logits", "flops=60%"), ("unet", "values", "flops=30%")],
)
def test_what_it_notes_is_what_the_networks_do(name: str, output: str, budget: str) -> None:
    result, data = of_zoo(name, budget=budget), samples(name)
    tuned = quick(result, data)
    found = [measured(entry, data, output, held=6) for entry in (result, tuned)]
    torch.testing.assert_close(list(before_and_after(tuned)), found, rtol=2e-3, atol=0)
    assert f"tuned on 18 samples without labels ({output}): divergence on 6 held-out" in tuned.report.notes[-1]
    assert tuned.report.timings_s["tune"] > 0
    assert tuned.report.notes[:-1] == result.report.notes


def test_the_output_can_be_chosen() -> None:
    assert "(values)" in quick(of_zoo("vgg"), samples("vgg"), output="values", epochs=1).report.notes[-1]


@pytest.mark.parametrize("trainable", [False, True])
def test_what_is_put_in_stays_as_it_is(trainable: bool) -> None:
    result = of_zoo("resnet", trainable)
    assert result.original is not None
    before, original, flags = states(result), copy.deepcopy(result.original.state_dict()), modes(result.module)
    random = torch.random.get_rng_state()
    tuned = quick(result, samples("resnet"))
    assert agree(states(result), before) and agree(result.original.state_dict(), original)
    assert modes(result.module) == modes(tuned.module) == flags
    assert not agree(states(tuned), before)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not any(weight.grad is not None for weight in result.module.parameters())


def modes(module: nn.Module) -> list[tuple[str, bool]]:
    return [(name, part.training) for name, part in module.named_modules()]


@pytest.mark.parametrize("name", ["vgg", "resnet"])
@pytest.mark.parametrize("trainable", [False, True])
def test_a_senseless_learning_rate_does_no_harm(name: str, trainable: bool) -> None:
    result, data = of_zoo(name, trainable), samples(name)
    tuned = quick(result, data, learning_rate=10.0)
    before, after = before_and_after(tuned)
    assert after < before or (after == before and agree(states(tuned), states(result)))
    found = [measured(entry, data, "logits", held=6) for entry in (result, tuned)]
    assert found[1] <= found[0]


def test_a_loss_that_is_no_number_ends_it_at_the_best_state() -> None:
    result = of_zoo("vgg")
    tuned = quick(result, samples("vgg"), learning_rate=1e30)
    assert agree(states(tuned), states(result))
    assert re.search(r"the loss of step \d+ of 12 was no number: lower learning_rate", tuned.report.notes[-1])


def test_a_network_at_its_best_comes_back_bit_for_bit() -> None:
    result = of_zoo("vgg", budget="flops=100%")
    tuned = quick(result, samples("vgg"), learning_rate=10.0)
    assert before_and_after(tuned)[0] < 1e-6
    assert agree(states(tuned), states(result))


def test_same_seed_same_bits_other_seed_other_bits() -> None:
    result, data = of_zoo("mobilenet", True), samples("mobilenet")  # with Dropout
    first, second, other = (states(quick(result, data, seed=seed, epochs=8)) for seed in (3, 3, 4))
    assert agree(first, second) and not agree(first, other)


def test_batch_norm_trains_as_such() -> None:
    result = of_zoo("resnet", True)
    tuned = quick(result, samples("resnet"))
    before, after = before_and_after(tuned)
    assert after < 0.9 * before
    moved = [name for name, value in states(tuned).items() if not torch.equal(value, states(result)[name])]
    assert any(name.endswith("running_mean") for name in moved)


def test_weights_of_dense_layers_are_trained_whatever_their_flags() -> None:
    model, inputs = build("vgg")
    result = compressed(model.requires_grad_(False), inputs, exclude=["classifier.4"])
    tuned = quick(result, samples("vgg"))
    assert not torch.equal(states(tuned)["classifier.4.weight"], states(result)["classifier.4.weight"])
    assert not any(weight.requires_grad for weight in tuned.module.parameters())


class Several(nn.Module):
    """Returns indices, hidden states of which dimension 0 is no sample, logits and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 24)
        self.last = nn.Linear(24, 6)

    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = torch.relu(self.first(x * scale))
        logits = self.last(hidden)
        return logits.argmax(1), {"hidden": hidden.t(), "logits": logits, "mean": hidden.mean()}


def test_outputs_in_containers_and_keyword_inputs() -> None:
    torch.manual_seed(0)
    model, data = Several().eval(), {"scale": torch.rand(200, 12), "x": torch.randn(200, 12), "label": torch.zeros(200)}
    result = compressed(model, data["x"][:2], {"scale": data["scale"][:2]}, budget="flops=60%")
    tuned = quick(result, data, learning_rate=1e-2)
    assert "(logits)" in tuned.report.notes[-1]
    before, after = before_and_after(tuned)
    assert after < 0.9 * before


class Viewing(nn.Module):
    """Its view needs contiguous channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.last = nn.Linear(16 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        found: Tensor = self.last(y.view(y.shape[0], -1))
        return found


def test_a_view_of_contiguous_channels_is_no_obstacle() -> None:
    torch.manual_seed(0)
    data = torch.randn(200, 3, 8, 8)
    tuned = quick(compressed(Viewing().eval(), data[:2]), data)
    before, after = before_and_after(tuned)
    assert after < 0.9 * before
    assert all(weight.is_contiguous() for weight in tuned.module.parameters())


def test_it_trains_under_no_grad_too() -> None:
    with torch.no_grad():
        before, after = before_and_after(quick(of_zoo("vgg"), samples("vgg")))
    assert after < before


def test_the_original_can_be_given_in_any_mode_and_stays_so() -> None:
    model = copy.deepcopy(of_zoo("vgg").original)
    assert model is not None
    loaded = replace(of_zoo("vgg"), original=None)
    found = quick(loaded, samples("vgg"), original=model.train(), epochs=1)
    assert model.training and all(part.training for part in model.modules())
    assert agree(states(found), states(quick(of_zoo("vgg"), samples("vgg"), epochs=1)))


def test_a_loaded_result_needs_the_original() -> None:
    with pytest.raises(InputError, match="pass that as original"):
        quick(replace(of_zoo("vgg"), original=None), samples("vgg"))


def test_minutes_alone_end_at_fifty_epochs() -> None:
    tuned = tune(of_zoo("vgg"), samples("vgg", 8), minutes=1.0, batch_size=4, held_out=0.5)
    assert "in 50 steps" in tuned.report.notes[-1]


def test_the_original_runs_on_as_many_samples_as_its_share_of_the_minutes_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage, "ORIGINAL_SHARE", 1e-9)
    options: dict[str, Any] = {"minutes": 0.02, "batch_size": 4, "held_out": 0.25, "seed": 1}
    tuned = tune(of_zoo("vgg"), samples("vgg", 40), **options)
    assert "tuned on 6 samples" in tuned.report.notes[-1] and "on 2 held-out" in tuned.report.notes[-1]
    whole = tune(of_zoo("vgg"), samples("vgg", 40), **{**options, "epochs": 1})
    assert "tuned on 30 samples" in whole.report.notes[-1]


def test_the_peak_learning_rate_is_lower_where_steps_are_few() -> None:
    rates = [distillation.peak_learning_rate(steps) for steps in (1, 50, 100, 400, 1000, 10**6)]
    assert rates == pytest.approx([3e-4, 3e-4, 3.1623e-4, 6.3246e-4, 1e-3, 1e-3], rel=1e-4)
    result, data = of_zoo("vgg"), samples("vgg")
    steps = 4 * (len(data) * 3 // 4 // 6)
    chosen = quick(result, data, learning_rate=None)
    assert agree(states(chosen), states(quick(result, data, learning_rate=distillation.peak_learning_rate(steps))))
    assert not agree(states(chosen), states(quick(result, data)))


@pytest.mark.parametrize(("minutes", "steps"), [(35.3 / 60, 20), (152.5 / 60, 130), (0.001, 1)])
def test_minutes_decide_the_steps(minutes: float, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock of a second each time it is looked at: a second a step or evaluation."""
    clock = iter(range(10**6))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    monkeypatch.setattr(stage, "ORIGINAL_SHARE", 1e6)
    tuned = tune(of_zoo("mixer"), samples("mixer", 140), minutes=minutes, batch_size=2, held_out=10 / 140)
    assert f"in {steps} steps" in tuned.report.notes[-1]


class Stopped(Exception):
    pass


def stop_at(step: int) -> Callable[[str, int, int], None]:
    def report(description: str, done: int, total: int) -> None:
        if done == step:
            raise Stopped

    return report


@pytest.mark.parametrize("trainable", [False, True])
def test_an_interrupted_run_goes_on(trainable: bool, tmp_path: Path) -> None:
    result, data = of_zoo("mobilenet", trainable), samples("mobilenet")
    steps: list[int] = []
    with pytest.raises(Stopped):
        quick(result, data, cache_dir=tmp_path, progress=stop_at(8))
    assert len(list(tmp_path.iterdir())) == 1
    tuned = quick(result, data, cache_dir=tmp_path, progress=lambda description, done, total: steps.append(done))
    assert steps == list(range(steps[0], 13)) and 1 < steps[0] <= 9
    assert not list(tmp_path.iterdir())
    assert agree(states(tuned), states(quick(result, data)))


def test_the_state_is_written_by_the_clock_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "SAVE_S", -1.0)
    steps: list[int] = []
    with pytest.raises(Stopped):
        quick(of_zoo("vgg"), samples("vgg"), cache_dir=tmp_path, progress=stop_at(7), epochs=20)
    quick(of_zoo("vgg"), samples("vgg"), cache_dir=tmp_path, progress=lambda *entry: steps.append(entry[1]), epochs=20)
    assert steps[0] == 8


@pytest.mark.parametrize("change", ["data", "option", "student", "teacher"])
def test_a_state_of_another_run_is_left_alone(change: str, tmp_path: Path) -> None:
    result, data, options = of_zoo("vgg"), samples("vgg"), {}
    with pytest.raises(Stopped):
        quick(result, data, cache_dir=tmp_path, progress=stop_at(8))
    if change == "data":
        data = (data[0].flip(0),)
    elif change == "option":
        options = {"learning_rate": 2e-3}
    elif change == "student":
        result = of_zoo("vgg", budget="flops=40%")
    else:
        options = {"original": build("vgg", seed=1)[0]}
    steps: list[int] = []
    quick(result, data, cache_dir=tmp_path, progress=lambda *entry: steps.append(entry[1]), **options)
    assert steps[0] == 1 and len(list(tmp_path.iterdir())) == 1


def test_a_torn_state_counts_as_missing(tmp_path: Path) -> None:
    result, data = of_zoo("vgg"), samples("vgg")
    with pytest.raises(Stopped):
        quick(result, data, cache_dir=tmp_path, progress=stop_at(8))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    assert agree(states(quick(result, data, cache_dir=tmp_path)), states(quick(result, data)))


def test_a_tuned_result_is_saved_and_loaded(tmp_path: Path) -> None:
    tuned = quick(of_zoo("resnet"), samples("resnet"))
    save(tuned, tmp_path / "tuned")
    found = load(tmp_path / "tuned")
    assert agree(states(found), states(tuned)) and found.report.notes == tuned.report.notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "labels"}, "output is 'labels'"),
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": 1.5}, "epochs is 1.5"),
        ({"epochs": True}, "epochs is True"),
        ({"epochs": None, "minutes": None}, "epochs and minutes are both None"),
        ({"minutes": 0}, "minutes is 0"),
        ({"minutes": float("nan")}, "minutes is nan"),
        ({"minutes": float("inf")}, "minutes is inf"),
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": None}, "batch_size is None"),
        ({"held_out": 0}, "held_out is 0"),
        ({"held_out": 1.0}, r"held_out is 1\.0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, f"seed is {2**63}"),
        ({"cache_dir": 3}, "cache_dir is a int"),
        ({"progress": "yes"}, "progress is 'yes'"),
    ],
)
def test_options_not_understood_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        quick(of_zoo("vgg"), samples("vgg"), **options)


def test_one_sample_is_too_few_and_two_are_enough() -> None:
    with pytest.raises(InputError, match="1 sample; expected at least 2"):
        quick(of_zoo("vgg"), samples("vgg", 1))
    assert "on 1 samples" in quick(of_zoo("resnet", True), samples("resnet", 2)).report.notes[-1]


def test_batches_of_other_shapes_are_named() -> None:
    data = [torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 18)]
    with pytest.raises(InputError, match=r"batch 1 of the data: input x has shape \(4, 3, 16, 18\), in batch 0 it is"):
        quick(of_zoo("vgg"), data)


def test_inputs_of_other_lengths_are_named() -> None:
    left, right = samples("siamese", 4)
    with pytest.raises(InputError, match=r"batch 0 of the data: input right has shape \(3, .*as many in each input"):
        quick(of_zoo("siamese"), [(left, right[:3])])


def test_data_the_original_does_not_take_is_refused() -> None:
    with pytest.raises(InputError, match="the original does not run on the data: RuntimeError"):
        quick(of_zoo("vgg"), torch.randn(8, 4, 16, 16))


class Fixed(nn.Module):
    """Holds the batch size in its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 24)
        self.last = nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(torch.relu(self.first(x)).reshape(2, 24))
        return found


def test_a_batch_size_the_network_does_not_take_is_refused() -> None:
    torch.manual_seed(0)
    result = compressed(Fixed().eval(), torch.randn(2, 12), budget="flops=60%")
    with pytest.raises(InputError, match="does not run on"):
        quick(result, torch.randn(16, 12))
    tuned = quick(result, torch.randn(16, 12), batch_size=2)
    assert "held-out" in tuned.report.notes[-1]


def mismatches(result: Result, module: nn.Module, data: tuple[Tensor, ...]) -> float:
    """Of the values inside a network from those inside the original."""
    assert isinstance(result.original, fx.GraphModule) and isinstance(module, fx.GraphModule)
    names = paired_nodes(result.original, module, result.plan, data)
    with torch.no_grad():
        nets = zip((result.original, module), names, strict=True)
        wanted, found = (observed(net, entry)(*data)[1] for net, entry in nets)
    return float(mismatch(wanted, found, list(map(variance, wanted))))


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_features_bring_the_inside_nearer(name: str) -> None:
    result, data = of_zoo(name), samples(name, 96)
    tuned, guided = (quick(result, data, epochs=8, learning_rate=1e-2, features=f).module for f in (False, True))
    before = mismatches(result, result.module, data)
    assert mismatches(result, guided, data) < 0.9 * before
    assert mismatches(result, guided, data) < mismatches(result, tuned, data)


def test_features_are_repeatable_and_leave_the_original_alone() -> None:
    result, data = of_zoo("resnet", trainable=True), samples("resnet")
    assert result.original is not None
    before = copy.deepcopy(result.original.state_dict())
    first, second = (states(quick(result, data, features=True)) for _ in range(2))
    assert agree(first, second)
    assert agree(result.original.state_dict(), before)


def test_an_original_that_is_given_has_no_known_layers() -> None:
    result, data = of_zoo("vgg"), samples("vgg")
    plain, guided = (states(quick(result, data, original=result.original, features=f)) for f in (False, True))
    assert agree(plain, guided)


def test_features_is_a_flag() -> None:
    with pytest.raises(OptionError, match="features is 'all'; expected True or False"):
        quick(of_zoo("vgg"), samples("vgg"), features="all")


@cache
def half_of_zoo(name: str, dtype: torch.dtype, trainable: bool = False, budget: str = "flops=30%") -> Result:
    """Not to be changed."""
    model, inputs = build(name)
    return compressed(model.to(dtype), tuple(value.to(dtype) for value in inputs), trainable=trainable, budget=budget)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_trains_in_float32_and_is_judged_in_its_own(
    dtype: torch.dtype, features: bool, trainable: bool
) -> None:
    result, data = half_of_zoo("vgg", dtype, trainable), samples("vgg")
    before = states(result)
    tuned = quick(result, data, features=features)
    first, last = before_and_after(tuned)
    assert last < 0.7 * first and "no number" not in tuned.report.notes[-1]
    assert {value.dtype for value in states(tuned).values() if value.is_floating_point()} == {dtype}
    assert agree(states(result), before)
    found = [measured(entry, (data[0].to(dtype),), "logits", held=6) for entry in (result, tuned)]
    torch.testing.assert_close([first, last], found, rtol=0.02, atol=0)


class Coarse(nn.Module):
    """In float16 it rounds to multiples of 2 what it hands on; in float32 hardly."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 24)
        self.last = nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last((4 * self.first(x) + 2048) - 2048)
        return found


@pytest.mark.parametrize("learning_rate", [1e-6, 1e-2])
def test_what_half_precision_makes_of_the_weights_counts(learning_rate: float) -> None:
    torch.manual_seed(0)
    data = torch.randn(64, 12).half()
    result = compressed(Coarse().half().eval(), data[:2], budget="flops=60%")
    tuned = quick(result, data, output="values", learning_rate=learning_rate)
    assert isinstance(result.original, fx.GraphModule) and isinstance(result.module, fx.GraphModule)
    wide = replace(result, original=in_float32(result.original), module=in_float32(result.module))
    held = [measured(entry, (data,), "values", held=16) for entry in (result, tuned, wide)]
    torch.testing.assert_close(list(before_and_after(tuned)), held[:2], rtol=0.02, atol=0)
    assert held[1] <= held[0] and abs(held[2] / held[0] - 1) > 0.05


@pytest.mark.parametrize("dtype", HALVES)
def test_a_senseless_learning_rate_does_no_harm_in_half_precision(dtype: torch.dtype) -> None:
    result = half_of_zoo("vgg", dtype)
    assert agree(states(quick(result, samples("vgg"), learning_rate=1e30)), states(result))


@pytest.mark.parametrize("kept", [False, True])
def test_large_values_in_half_precision(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their squares are beyond float16."""
    if not kept:
        monkeypatch.setattr(distillation, "MOST_KEPT", 0)
    torch.manual_seed(0)
    first = nn.Linear(12, 24)
    with torch.no_grad():
        first.weight.mul_(1000)
        first.bias.mul_(1000)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 6))
    data = torch.randn(200, 12).half()
    result = compressed(model.half().eval(), data[:2], budget="flops=60%")
    tuned = quick(result, data, output="values", features=True, learning_rate=1e-2)
    before, after = before_and_after(tuned)
    assert 0.05 < before < 1 and after < 0.9 * before and "no number" not in tuned.report.notes[-1]


def test_an_interrupted_run_in_half_precision_goes_on(tmp_path: Path) -> None:
    result, data = half_of_zoo("vgg", torch.bfloat16), samples("vgg")
    steps: list[int] = []
    with pytest.raises(Stopped):
        quick(result, data, cache_dir=tmp_path, progress=stop_at(8))
    tuned = quick(result, data, cache_dir=tmp_path, progress=lambda *entry: steps.append(entry[1]))
    assert 1 < steps[0] <= 9
    assert agree(states(tuned), states(quick(result, data)))


def test_states_of_killed_runs_go_when_nobody_comes_back(tmp_path: Path) -> None:
    result, data = of_zoo("vgg"), samples("vgg")
    with pytest.raises(Stopped):
        quick(result, data, cache_dir=tmp_path, progress=stop_at(8))
    (path,) = tmp_path.iterdir()
    os.utime(path, (0, 0))
    quick(result, (data[0].flip(0),), cache_dir=tmp_path, epochs=1)  # shuffled
    assert not list(tmp_path.iterdir())


def test_an_old_state_of_the_same_run_is_gone_on_from(tmp_path: Path) -> None:
    result, data, steps = of_zoo("vgg"), samples("vgg"), list[int]()
    with pytest.raises(Stopped):
        quick(result, data, cache_dir=tmp_path, progress=stop_at(8))
    (path,) = tmp_path.iterdir()
    os.utime(path, (0, 0))
    quick(result, data, cache_dir=tmp_path, progress=lambda *entry: steps.append(entry[1]))
    assert steps[0] > 1
