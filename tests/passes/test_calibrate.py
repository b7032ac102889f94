"""Moments of one batch after another, against sums that are written out: im2col by loops, gradients by autograd."""

# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tdfx.moments import SiteMoments
from tdfx.passes import calibrate
from tdfx.passes.calibrate import AccumulateMoments, Sums
from tdfx.passes.sites import layer_spec


def draw(*shape: int, offset: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + offset


def moments(
    model: nn.Module, value: Tensor, names: list[str], loss: Callable[[Any], Tensor] | None = None, batch: int = 99
) -> dict[str, SiteMoments]:
    graph = fx.symbolic_trace(model)
    layers: dict[str, Any] = {name: graph.get_submodule(name) for name in names}
    sums = {name: Sums.of(layer_spec(name, layer, ()), loss is not None) for name, layer in layers.items()}
    for part in value.split(batch):  # type: ignore[no-untyped-call]
        AccumulateMoments((part,), sums, loss).run(graph)
    return {name: entry.moments(len(value)) for name, entry in sums.items()}


def looped_rows(value: Tensor, layer: Any) -> Tensor:
    """Inputs of every output position, (positions, in * prod(kernel)), one window after another."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    value = F.pad(value, [size for size in reversed(layer.padding) for _ in range(2)], mode)
    reach = [d * (k - 1) + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    starts = [
        range(0, size - length + 1, step)
        for size, length, step in zip(value.shape[2:], reach, layer.stride, strict=True)
    ]
    rows = []
    for sample in value:
        for corner in itertools.product(*starts):
            window = sample
            for dim, (first, length, step) in enumerate(zip(corner, reach, layer.dilation, strict=True), start=1):
                window = window.index_select(dim, torch.arange(first, first + length, step))
            rows.append(window.flatten())
    return torch.stack(rows)


def looped_transposed_rows(value: Tensor, layer: Any) -> Tensor:
    """Inputs that each output position adds up, the kernel's elements in reverse order, zero where there is none."""
    with torch.no_grad():
        sizes = layer(value).shape[2:]
    kernel = list(itertools.product(*map(range, layer.kernel_size)))[::-1]
    rows = torch.zeros(len(value), *sizes, value.shape[1], len(kernel), dtype=value.dtype)
    for source in itertools.product(*map(range, value.shape[2:])):
        for tap, element in enumerate(kernel):
            options = zip(source, element, layer.stride, layer.dilation, layer.padding, strict=True)
            place = tuple(at * s + k * d - p for at, k, s, d, p in options)
            if all(0 <= at < size for at, size in zip(place, sizes, strict=True)):
                rows[(slice(None), *place, slice(None), tap)] = value[(slice(None), slice(None), *source)]
    return rows.flatten(-2).flatten(0, -2)


def assert_moments(found: SiteMoments, rows: Tensor, rtol: float = 1e-6) -> None:
    mean = rows.mean(0)
    covariance = (rows - mean).T @ (rows - mean) / len(rows)
    torch.testing.assert_close(found.mean.double(), mean, rtol=rtol, atol=rtol)
    torch.testing.assert_close(
        found.in_cov.double(), covariance, rtol=rtol, atol=rtol * float(covariance.diagonal().max())
    )
    assert torch.equal(found.in_cov, found.in_cov.T)
    assert {value.dtype for value in (found.mean, found.in_cov)} == {torch.float32}


CONVS = {
    "1d": (nn.Conv1d(3, 4, 3, 2, 1, 2, padding_mode="reflect"), (4, 3, 13)),
    "2d": (nn.Conv2d(3, 4, 3, padding=1), (4, 3, 6, 5)),
    "2d stride": (nn.Conv2d(3, 4, (3, 2), (2, 3), (1, 2), (2, 1)), (4, 3, 9, 8)),
    "2d circular": (nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="circular"), (4, 3, 6, 5)),
    "2d replicate": (nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="replicate"), (4, 3, 6, 5)),
    "3d": (nn.Conv3d(2, 3, (2, 3, 1), (1, 2, 1), (1, 1, 0), (1, 1, 2)), (3, 2, 4, 5, 4)),
}


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("batch", [1, 3, 99])
def test_moments_of_convolutions(name: str, batch: int) -> None:
    layer, shape = CONVS[name]
    value = draw(*shape)
    found = moments(nn.Sequential(layer.double()), value, ["0"], batch=batch)["0"]
    assert_moments(found, looped_rows(value, layer))
    assert found.out_cov is None


TRANSPOSED = {
    "1d": (nn.ConvTranspose1d(3, 4, 3, 3, 1, 2, dilation=2), (4, 3, 5)),
    "2d": (nn.ConvTranspose2d(3, 4, 4, 2, 1), (4, 3, 3, 2)),
    "2d gaps": (nn.ConvTranspose2d(3, 4, (1, 2), 3, output_padding=(2, 1)), (4, 3, 3, 2)),
    "2d cropped": (nn.ConvTranspose2d(3, 4, (3, 2), (1, 3), (3, 2), (0, 1)), (4, 3, 6, 4)),
    "3d": (nn.ConvTranspose3d(2, 3, (2, 3, 1), (1, 2, 1), (1, 1, 0)), (3, 2, 3, 2, 3)),
}


@pytest.mark.parametrize("name", TRANSPOSED)
@pytest.mark.parametrize("batch", [3, 99])
def test_moments_of_transposed_convolutions(name: str, batch: int) -> None:
    layer, shape = TRANSPOSED[name]
    value = draw(*shape)
    found = moments(nn.Sequential(layer.double()), value, ["0"], lambda output: output.square().sum(), batch)["0"]
    assert_moments(found, looped_transposed_rows(value, layer))
    gradients = 2 * layer(value).detach().movedim(1, -1).flatten(0, -2)
    assert found.out_cov is not None
    torch.testing.assert_close(found.out_cov.double(), gradients.T @ gradients / len(value), rtol=1e-6, atol=1e-6)


GROUPED = {
    "1d": (nn.Conv1d(4, 6, 3, 2, 1, 2, groups=2, padding_mode="reflect"), (4, 4, 13)),
    "2d": (nn.Conv2d(6, 3, (3, 2), (2, 1), (1, 2), groups=3), (4, 6, 7, 6)),
    "depthwise": (nn.Conv2d(3, 6, 3, padding=1, groups=3), (4, 3, 6, 5)),
}


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("gradients", [True, False])
def test_moments_of_convolutions_in_groups(name: str, gradients: bool) -> None:
    layer, shape = GROUPED[name]
    value, groups = draw(*shape), layer.groups
    loss = (lambda output: output.square().sum()) if gradients else None
    found = moments(nn.Sequential(layer.double()), value, ["0"], loss, batch=3)["0"]
    rows = looped_rows(value, layer)
    torch.testing.assert_close(found.mean.double(), rows.mean(0), rtol=1e-6, atol=1e-6)
    covariance = torch.cov(rows.T, correction=0)
    if gradients and name != "depthwise":
        torch.testing.assert_close(found.in_cov.double(), covariance, rtol=1e-6, atol=1e-6)
        return
    size = rows.shape[1] // groups
    assert found.in_cov.shape == (groups, size, size)
    assert torch.equal(found.in_cov, found.in_cov.mT)
    for group, block in enumerate(found.in_cov):
        own = slice(group * size, (group + 1) * size)
        torch.testing.assert_close(block.double(), covariance[own, own], rtol=1e-6, atol=1e-6)


def test_moments_of_linear_layers_with_dimensions_before_the_last() -> None:
    value = draw(5, 2, 3, 4)
    assert_moments(moments(nn.Sequential(nn.Linear(4, 6).double()), value, ["0"])["0"], value.reshape(30, 4))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.relu(self.shared(x)))


def test_all_calls_of_a_layer_count() -> None:
    model, value = Twice(), draw(5, 4)
    inner = torch.relu(model.shared(value)).detach()
    assert_moments(moments(model, value, ["shared"], batch=2)["shared"], torch.cat([value, inner]))


def test_a_large_mean_costs_no_precision() -> None:
    value = draw(64, 4, offset=1000.0)
    layer = nn.Sequential(nn.Linear(4, 2))
    rounded = value.float()
    found = moments(layer, rounded, ["0"], batch=5)["0"]
    assert_moments(found, rounded.double(), rtol=2e-6)


def test_large_matrices_are_computed_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "BLOCK", 5)
    value = draw(9, 3, 6, 5)
    layer = nn.Conv2d(3, 7, 3).double()

    def square(output: Tensor) -> Tensor:
        return output.square().sum() / 2

    found = moments(nn.Sequential(layer), value, ["0"], square)["0"]
    assert_moments(found, looped_rows(value, layer))
    rows = layer(value).detach().movedim(1, -1).reshape(-1, 7)
    assert found.out_cov is not None
    torch.testing.assert_close(found.out_cov.double(), rows.T @ rows / 9, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_lower_precision(dtype: torch.dtype) -> None:
    value = draw(8, 4).to(dtype)
    found = moments(nn.Sequential(nn.Linear(4, 3).to(dtype)), value, ["0"], lambda output: output.float().sum())["0"]
    assert_moments(found, value.double())
    assert found.out_cov is not None
    torch.testing.assert_close(found.out_cov, torch.ones(3, 3), rtol=1e-6, atol=0)


class Branches(nn.Module):
    """In-place activations, a shortcut, and a convolution that one output has no use for."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)
        self.other = nn.Linear(4, 5)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.first(x), inplace=True)
        x = x + F.relu_(self.second(x))
        x = x.mean((2, 3))
        return self.head(x), self.other(x)


def first_output(output: tuple[Tensor, Tensor]) -> Tensor:
    return output[0].exp().sum()


def gradients_by_loop(model: Branches, value: Tensor, name: str) -> Tensor:
    """Sum over samples and positions of the products of gradients at a layer's output."""
    total = torch.zeros(())
    for sample in value:
        kept: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(output)
            output.retain_grad()
            return output.clone()

        handle = model.get_submodule(name).register_forward_hook(keep)
        model.zero_grad()
        first_output(model(sample[None])).backward()
        handle.remove()
        assert kept[0].grad is not None
        rows = kept[0].grad.movedim(1, -1).reshape(-1, kept[0].shape[1])
        total = total + rows.T @ rows
    return total


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", ["first", "second", "head"])
def test_gradients_at_outputs(name: str, frozen: bool) -> None:
    model, value = Branches(), draw(6, 3, 5, 5)
    expected = gradients_by_loop(model, value, name) / 6
    model.zero_grad()
    model.requires_grad_(not frozen)
    found = moments(model, value, ["first", "second", "head", "other"], first_output, batch=4)
    actual = found[name].out_cov
    assert actual is not None
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6 * float(expected.diagonal().max()))
    assert torch.equal(actual, actual.T)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_whether_a_gradient_comes_to_a_layer() -> None:
    graph = fx.symbolic_trace(Branches())
    layers: dict[str, Any] = {name: graph.get_submodule(name) for name in ("head", "other")}
    sums = {name: Sums.of(layer_spec(name, layer, ()), True) for name, layer in layers.items()}
    AccumulateMoments((draw(2, 3, 5, 5),), sums, first_output).run(graph)
    assert (sums["head"].reached, sums["other"].reached) == (True, False)
    assert sums["other"].positions == 2


def test_the_model_its_inputs_and_the_random_state_stay() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(F.dropout(F.relu_(x), training=True))

    model, value = InPlace(), draw(6, 4).float()
    weight, given, state = model.layer.weight.detach().clone(), value.clone(), torch.get_rng_state()
    first = moments(model, value, ["layer"], lambda output: output.sum())["layer"]
    assert torch.equal(torch.get_rng_state(), state)
    again = moments(model, value, ["layer"], lambda output: output.sum())["layer"]
    assert torch.equal(first.in_cov, again.in_cov)  # what the network draws is seeded
    assert torch.equal(value, given)
    assert torch.equal(model.layer.weight, weight)
    assert model.layer.weight.grad is None
    assert model.training


@pytest.mark.parametrize(
    ("layer", "shape", "observations"),
    [
        (nn.Conv2d(2, 3, 3, padding=1), (4, 2, 6, 6), 4 * 36 // 9),
        (nn.Conv2d(2, 3, 3, stride=2, padding=1), (4, 2, 6, 6), 4 * 9 // 4),  # each value in 2 x 2 windows at most
        (nn.Conv2d(2, 3, 1), (4, 2, 6, 6), 4 * 36),
        (nn.Conv2d(2, 3, 5), (4, 2, 6, 6), 4),  # one a sample at least
        (nn.Linear(2, 3), (4, 7, 2), 4 * 7),
        (nn.ConvTranspose2d(2, 3, 4, 2, 1), (4, 2, 6, 6), 4 * 144 // 4),  # 2 x 2 windows at each of 2 x 2 remainders
        (nn.ConvTranspose2d(2, 3, 2, 2), (4, 2, 6, 6), 4 * 144),
        (nn.ConvTranspose2d(2, 3, 1, 3), (4, 2, 6, 6), 4 * 256 // 9),  # nothing to see in most of 16 x 16 positions
    ],
)
def test_values_in_overlapping_windows_are_observed_once(
    layer: nn.Module, shape: tuple[int, ...], observations: int
) -> None:
    found = moments(nn.Sequential(layer.double()), draw(*shape), ["0"])
    assert found["0"].observations == observations
