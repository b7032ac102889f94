"""Moments of whole networks: against autograd sample by sample, in any number of sweeps."""

# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calibrated import LIMIT, SITES, assert_same, assert_site, captured, cross_entropies, images, network
from networks import build
from torch import Tensor, nn

from tdfx import sweep
from tdfx.data import Batch
from tdfx.errors import InputError, OptionError
from tdfx.fisher import OutputLoss
from tdfx.moments import SiteMoments
from tdfx.stages.calibrate import calibrate
from tdfx.stages.capture import capture


def output_variance(value: Tensor) -> float:
    """Mean square of the network's outputs about their mean over samples."""
    with torch.no_grad():
        outputs = network()(value)
    return float((outputs - outputs.mean(0)).square().mean())


def expected_moments(kind: str) -> dict[str, SiteMoments]:
    """From inputs and gradients that hooks see, one sample after another, with the targets that calibrate draws."""
    model: Any = network()
    model[1].inplace = False
    values: dict[str, list[Tensor]] = {name: [] for name in SITES}
    products = {name: torch.zeros((), dtype=torch.float64) for name in SITES}
    outputs: dict[str, Tensor] = {}
    for name in SITES:

        def keep(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
            values[name].append(args[0].detach().double())
            output.retain_grad()
            outputs[name] = output

        model.get_submodule(name).register_forward_hook(keep)
    loss = OutputLoss(kind, seed=7, variances=[output_variance(images(10))])
    for number, sample in enumerate(images(10).split(1)):  # type: ignore[no-untyped-call]
        loss(model(sample), Batch(0, (sample,)), number).backward()
        for name, output in outputs.items():
            assert output.grad is not None
            rows = output.grad.movedim(1, -1).flatten(0, -2).double()
            products[name] = products[name] + rows.T @ rows
    found = {}
    for name in SITES:
        layer, rows = model.get_submodule(name), torch.cat(values[name])
        if isinstance(layer, nn.Conv2d):
            unfolded = F.unfold(rows, 3, padding=layer.padding, stride=layer.stride)  # type: ignore[arg-type]
            rows = unfolded.transpose(1, 2).flatten(0, 1)
        covariance = torch.cov(rows.T, correction=0)
        found[name] = SiteMoments(rows.mean(0).float(), covariance.float(), (products[name] / 10).float())
    return found


@pytest.mark.parametrize("kind", ["logits", "values"])
def test_moments_are_those_of_samples_one_by_one(kind: str) -> None:
    found = calibrate(captured(), images(), output=kind, seed=7)
    assert (list(found.sites), found.samples, found.output, found.skipped) == (SITES, 10, kind, ())
    for name, expected in expected_moments(kind).items():
        assert_site(found.sites[name], expected)


def repeated(output: str, count: int = 4000) -> tuple[Tensor, Tensor]:
    """Gradient moments at a last layer from many draws for one input, and the logits."""
    model = nn.Sequential(nn.Linear(3, 4))
    nn.init.normal_(model[0].weight, generator=torch.Generator().manual_seed(0))
    value = torch.tensor([[0.5, -1.0, 0.3]])
    found = calibrate(capture(model, value), value.repeat(count, 1), output=output).sites["0"].out_cov
    assert found is not None
    return found, model(value)[0].detach()


def test_gradients_of_logits_have_the_covariance_of_the_classes() -> None:
    found, logits = repeated("logits")
    p = logits.softmax(0)
    torch.testing.assert_close(found, p.diag() - p[:, None] * p, rtol=0, atol=0.02)


def test_gradients_of_values_have_the_covariance_of_the_projection() -> None:
    found, _ = repeated("values")  # outputs do not vary, hence their deviation counts as 1; of 4 outputs
    torch.testing.assert_close(found, torch.eye(4) / 4, rtol=0, atol=0.02)


def test_loss_of_values_is_half_the_relative_squared_error() -> None:
    model = nn.Sequential(nn.Linear(3, 8))
    data = torch.randn(4096, 3, generator=torch.Generator().manual_seed(0))
    given = calibrate(capture(model, data[:2]), [data], output="values").sites["0"]
    difference = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    assert given.out_cov is not None
    predicted = float(torch.trace(given.out_cov @ difference @ given.in_cov @ difference.T)) / 2
    outputs, errors = model(data).detach(), (data - data.mean(0)) @ difference.T
    measured = float(errors.square().mean() / (outputs - outputs.mean(0)).square().mean()) / 2
    assert predicted == pytest.approx(measured, rel=0.1)


def test_a_loss_with_labels_sums_over_samples() -> None:
    labels = torch.arange(10) % 5
    per_sample = calibrate(captured(), (images(), labels), loss=cross_entropies)
    summed = calibrate(captured(), (images(), labels), loss=nn.CrossEntropyLoss(reduction="sum"))
    assert (per_sample.output, summed.output) == ("labels", "labels")
    logits = network()(images())
    gradients = (logits.softmax(1) - F.one_hot(labels, 5)).detach()
    for found in (per_sample, summed):
        out_cov = found.sites["6"].out_cov
        assert out_cov is not None
        torch.testing.assert_close(out_cov, gradients.T @ gradients / 10, rtol=1e-4, atol=1e-5)


def test_feature_takes_no_gradients() -> None:
    found = calibrate(captured(), images(), metric="feature:scaled")
    assert found.output is None
    assert all(site.out_cov is None for site in found.sites.values())
    whole = calibrate(captured(), images())
    for name, site in found.sites.items():
        assert torch.equal(site.in_cov, whole.sites[name].in_cov)


@pytest.mark.parametrize("kind", ["logits", "values"])
def test_batches_of_three_give_what_one_batch_gives(kind: str) -> None:
    whole = calibrate(captured(), [images()], output=kind)
    parts = calibrate(captured(), list(images().split(3)), output=kind)  # type: ignore[no-untyped-call]
    # The deviation that values are divided by is that of the first batch.
    scale = 1.0 if kind == "logits" else output_variance(images()) / output_variance(images()[:3])
    for name in SITES:
        assert_site(parts.sites[name], whole.sites[name], scale=scale)
    assert parts.samples == whole.samples == 10


@pytest.mark.parametrize("memory_limit", [LIMIT, f"{LIMIT} B", f"{LIMIT / 1000}kB"])
def test_several_sweeps_over_what_can_be_read_once(
    memory_limit: int | str, runs: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    whole = calibrate(captured(), iter(images().split(3)), output="values")  # type: ignore[no-untyped-call]
    assert len(runs) == 4
    found = calibrate(
        captured(),
        iter(images().split(3)),  # type: ignore[no-untyped-call]
        output="values",
        memory_limit=memory_limit,
    )
    assert len(runs) == 4 + 3 * 4
    assert_same(found, whole)
    assert not list(tmp_path.iterdir())


def test_sweeps_keep_the_labels_of_loaders() -> None:
    def loader() -> Iterator[Any]:
        for first in range(0, 10, 4):
            yield images()[first : first + 4], torch.arange(first, min(10, first + 4)) % 5

    whole = calibrate(captured(), loader(), loss=cross_entropies)
    found = calibrate(captured(), loader(), loss=cross_entropies, memory_limit=LIMIT)
    assert_same(found, whole)
    with pytest.raises(InputError, match="a label is a str; a loader's labels are kept in files"):
        calibrate(captured(), iter([(images(), "cat")]), loss=cross_entropies, memory_limit=LIMIT)


def test_a_site_beyond_the_memory_limit_is_skipped() -> None:
    found = calibrate(captured(), images(), memory_limit=8 * (27 * 27 + 16))
    assert list(found.sites) == ["0", "6"]
    assert [entry.layer for entry in found.skipped] == ["2"]
    assert "covariance of its 36 inputs takes 10.5 KB; memory_limit is 5.96 KB" in found.skipped[0].reason


@pytest.mark.parametrize("count", [1, 2])
def test_few_samples(count: int) -> None:
    found = calibrate(captured(), images(count))
    rows = F.unfold(images(count).double(), 3, padding=1).transpose(1, 2).flatten(0, 1)
    site = found.sites["0"]
    torch.testing.assert_close(site.in_cov.double(), torch.cov(rows.T, correction=0), rtol=1e-5, atol=1e-6)
    assert found.samples == count
    sites = [found.sites[name] for name in SITES]
    assert all(value.isfinite().all() for s in sites for value in vars(s).values() if isinstance(value, Tensor))


def test_a_dead_channel() -> None:
    data = images()
    data[:, 1] = 0
    site = calibrate(captured(), data).sites["0"]
    assert torch.equal(site.mean[9:18], torch.zeros(9))
    assert torch.equal(site.in_cov[9:18], torch.zeros(9, 27))
    assert float(site.in_cov.diagonal()[:9].min()) > 0.1


class Named(nn.Module):
    """A dictionary with a tuple in it; the second value has no use for the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor, count: Tensor) -> Any:
        return {"found": (self.a(x), self.b(x)), "count": count + 1}


def test_networks_that_return_containers() -> None:
    given = capture(Named(), (torch.ones(2, 4), torch.ones(2, dtype=torch.int64)))
    data = (torch.randn(6, 4), torch.arange(6))
    values = calibrate(given, data, output="values")
    assert list(values.sites) == ["a", "b"]
    logits = calibrate(given, data)
    assert (list(logits.sites), logits.output) == (["a"], "logits")
    assert [(entry.layer, entry.reason[:27]) for entry in logits.skipped] == [("b", "no gradient comes to it: th")]


@pytest.mark.parametrize(
    ("name", "expected"), [("vgg", "logits"), ("language_model", "logits"), ("unet", "values"), ("siamese", "values")]
)
def test_what_outputs_are_is_told_by_their_shapes(name: str, expected: str) -> None:
    model, inputs = build(name)
    found = calibrate(capture(model, inputs), inputs)
    assert found.output == expected
    assert found.sites
    assert all(site.out_cov is not None for site in found.sites.values())


def test_logits_of_positions_count_position_by_position() -> None:
    model = nn.Conv2d(2, 3, 1)
    data = torch.randn(5, 2, 4, 4)
    found = calibrate(capture(nn.Sequential(model), data), data, output="logits").sites["0"].out_cov
    assert found is not None
    torch.testing.assert_close(found.sum(0), torch.zeros(3), rtol=0, atol=1e-4)  # p - onehot adds up to 0
    assert 0.3 * 16 < float(found.trace()) < 16  # about 1 - sum p^2 at each of 16 positions


def test_the_model_and_the_random_state_stay() -> None:
    model = network().train()
    model[6].weight.requires_grad_(False)
    given = capture(model, images(2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    calibrate(given, images())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    for part in (model, given.module, given.original):
        assert all(parameter.grad is None for parameter in part.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == [True] * 4 + [False, True]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_samples_end_the_reading() -> None:
    def endless() -> Iterator[Tensor]:
        while True:
            yield images()[:3]

    found = calibrate(captured(), endless(), samples=7)
    expected = calibrate(captured(), torch.cat([images()[:3]] * 3)[:7])
    assert (found.samples, len(found.inputs[0])) == (7, 7)
    for name in SITES:
        assert_site(found.sites[name], expected.sites[name])


def test_first_inputs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = list(images().split(3))  # type: ignore[no-untyped-call]
    assert torch.equal(calibrate(captured(), parts).inputs[0], images())
    monkeypatch.setattr(sweep, "MOST_SAMPLES", 4)
    assert torch.equal(calibrate(captured(), parts).inputs[0], images()[:4])
    monkeypatch.setattr(sweep, "MOST_BYTES", 2 * images()[0].nbytes)
    assert torch.equal(calibrate(captured(), parts).inputs[0], images()[:2])


def test_inputs_of_other_sizes_are_not_kept_together() -> None:
    wide = torch.zeros(2, 3, 9, 9)
    found = calibrate(captured(), [images(3), wide, images(2)], metric="feature")
    assert torch.equal(found.inputs[0], images(3))
    assert found.samples == 7


def test_steps_are_reported() -> None:
    steps: list[tuple[str, int, int]] = []
    calibrate(captured(), images(), samples=10, progress=lambda *step: steps.append(step), memory_limit=LIMIT)
    assert steps == [("calibrating", 1, 3), ("calibrating", 2, 3), ("calibrating", 3, 3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "weight"}, 'metric is \'weight\'; calibration is for "feature" and "loss"'),
        ({"metric": "fisher"}, "unknown metric 'fisher'"),
        ({"output": "classes"}, "output is 'classes'"),
        ({"output": "labels"}, "output is 'labels'"),
        ({"loss": "mse"}, "loss is a str; expected a function"),
        ({"loss": cross_entropies, "output": "logits"}, "found output='logits'"),
        ({"loss": cross_entropies, "metric": "feature"}, "found metric='feature'"),
        ({"samples": 0}, "samples is 0; expected a whole number from 1 up"),
        ({"samples": 1.5}, "samples is 1.5"),
        ({"seed": -1}, "seed is -1; expected a whole number from 0"),
        ({"memory_limit": "2 elephants"}, "memory_limit is '2 elephants'"),
        ({"memory_limit": 0}, "memory_limit is 0"),
        ({"memory_limit": True}, "memory_limit is True"),
        ({"cache_dir": 3}, "cache_dir is a int"),
        ({"progress": 3}, "progress is 3"),
    ],
)
def test_options_that_are_not_understood(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        calibrate(captured(), images(), **options)


def test_data_that_cannot_be_used() -> None:
    bad = images()
    bad[7, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match=r"batch 2 of the data: input \w+ holds NaN"):
        calibrate(captured(), iter(bad.split(3)))  # type: ignore[no-untyped-call]
    with pytest.raises(InputError, match="no batch"):
        calibrate(captured(), iter(()))
    with pytest.raises(InputError, match="no batch"):
        calibrate(captured(), iter(()), memory_limit=LIMIT)
    with pytest.raises(InputError, match=r"batch 1 .* calibration failed on its inputs, float32 \(3, 4, 7, 7\)"):
        calibrate(captured(), [images(), torch.zeros(3, 4, 7, 7)])
    with pytest.raises(InputError, match=r"batch 0 .* the loss is a float; expected a finite tensor"):
        calibrate(captured(), [images()], loss=lambda output, labels: 0.5)  # type: ignore[arg-type,return-value]
    with pytest.raises(InputError, match=r"batch 0 .* the loss is NaN or Inf"):
        calibrate(captured(), [images()], loss=lambda output, labels: output.sum() / 0)


class Blurting(nn.Module):
    """Adds to one output of samples whose first input is above 5 what is given."""

    def __init__(self, added: float) -> None:
        super().__init__()
        self.layer, self.added = nn.Linear(4, 3), added

    def forward(self, x: Tensor) -> Tensor:
        there = (x[:, :1] > 5) & (torch.arange(3) == 1)
        return torch.where(there, self.added, self.layer(x))


@pytest.mark.parametrize("output", ["logits", "values"])
@pytest.mark.parametrize(("added", "what"), [(torch.nan, "NaN"), (torch.inf, "Inf")])
def test_an_output_that_is_no_number_is_named(output: str, added: float, what: str) -> None:
    data = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    data[7, 0] = 6.0
    message = rf"batch 2 of the data: the network's output holds {what} though its inputs are finite; .* dtype"
    with pytest.raises(InputError, match=message):
        calibrate(capture(Blurting(added), torch.zeros(2, 4)), list(data.split(3)), output=output)  # type: ignore[no-untyped-call]


def test_logits_of_minus_infinity_are_classes_that_cannot_be() -> None:
    data = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    data[7, 0] = 6.0
    assert list(calibrate(capture(Blurting(-torch.inf), torch.zeros(2, 4)), data, output="logits").sites) == ["layer"]


def test_sites_whose_values_overflow_are_skipped() -> None:
    class Overflow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(x.exp()) + self.a(x)

    data = torch.full((4, 4), 100.0)
    found = calibrate(capture(Overflow(), torch.zeros(2, 4)), data, metric="feature")
    assert list(found.sites) == ["a"]
    assert "NaN or Inf" in found.skipped[0].reason


# The cache.


@pytest.mark.parametrize("scale", [1e4, 0.0])
def test_outputs_that_nothing_moves_have_no_loss(scale: float) -> None:
    """Without any gradient, every layer would seem not to count."""

    class Certain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).sign() * scale

    with pytest.raises(InputError, match=r'no layer gets a gradient of the loss \(logits\).* use metric="feature"'):
        calibrate(capture(Certain().eval(), torch.ones(2, 6)), torch.ones(10, 6))


def test_data_of_another_precision() -> None:
    assert_same(calibrate(captured(), images().double()), calibrate(captured(), images()))


def test_a_list_of_single_samples_is_refused() -> None:
    with pytest.raises(InputError, match=r"batch 0 of the data: .* \(in a list, each entry is a batch\)"):
        calibrate(captured(), list(images()))


def test_one_number_for_all_samples_is_no_output() -> None:
    """As a regulariser that is returned beside the output."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.layer(x)
            return y.abs().mean(), y

    data = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    found = calibrate(capture(Both().eval(), data[:2]), data)
    assert found.output == "logits"
    assert list(found.sites) == ["layer"]
