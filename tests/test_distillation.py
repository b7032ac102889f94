from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from tdfx import distillation
from tdfx.distillation import Guide, in_fastest_layout
from tdfx.features import observed

X = torch.randn(12, 6, 5, generator=torch.Generator().manual_seed(0))
ROWS = torch.tensor([7, 2, 11])


class Net(nn.Module):
    """Two linear layers, samples first or, between them, second."""

    def __init__(self, order: tuple[int, ...] = (0, 1, 2)) -> None:
        super().__init__()
        self.order = order
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.first(x.permute(self.order)).relu()).permute(self.order)
        return found


class Fixed(Net):
    """Takes six samples at once."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.first(x.reshape(6, -1, 5)).relu())
        return found


def guide(model: nn.Module, count: int = len(X)) -> Guide:
    """From six samples on; all are shown to it."""
    graph_module = observed(fx.symbolic_trace(model.eval()), ["first", "relu"])
    found = Guide(graph_module, ["a", "b"], [X[:6]], count)
    with torch.no_grad():
        for start in (0, 6):
            found.keep(start, graph_module(X[start : start + 6])[1])
    return found


def net(kind: type[Net] = Net, *order: int) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(order or (0, 1, 2))


@pytest.mark.parametrize("most", [0, 2 * 12 * 6 * 8, 2 * 12 * 6 * 8 - 1])
def test_values_that_fit_are_kept_and_others_computed_anew(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "MOST_KEPT", most)
    model = net()
    found = guide(model)
    assert (found.kept is not None) == (most == 2 * 12 * 6 * 8)
    with torch.no_grad():
        first = model.first(X[ROWS])
    got = [first + 0.5, first.relu()]
    wanted = 0.25 / found.variances[0] / 2 / 2
    torch.testing.assert_close(found.mismatch(got, [X], ROWS), wanted, rtol=5e-3, atol=0)


@pytest.mark.parametrize("model", [net(Net, 1, 0, 2), net(Fixed)])
def test_values_without_a_row_a_sample_are_not_kept(model: Net) -> None:
    """Their first dimension has as many entries as there are samples, by chance."""
    assert guide(model).kept is None


@pytest.mark.parametrize("most", [0, 10**6])
def test_large_values_in_half_precision_count_as_in_float32(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their squares are beyond float16."""
    monkeypatch.setattr(distillation, "MOST_KEPT", most)
    model = net()
    with torch.no_grad():
        model.first.weight.mul_(2000)
        first = model.first(X[ROWS])
    got, data = [first * 1.1, first.relu()], X.half()
    wide = guide(model).mismatch(got, [X], ROWS)
    half = Guide(observed(fx.symbolic_trace(model.eval().half()), ["first", "relu"]), ["a", "b"], [data[:6]], len(X))
    with torch.no_grad():
        half.keep(0, half.original(data)[1])
    torch.testing.assert_close(half.mismatch(got, [data], ROWS), wide, rtol=0.05, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_of_any_layout_are_kept(layout: torch.memory_format) -> None:
    images = torch.randn(4, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval().to(memory_format=layout)  # type: ignore[call-overload]
    seen = observed(fx.symbolic_trace(model), ["_0"])
    found = Guide(seen, ["_0"], [images], 4)
    with torch.no_grad():
        (value,) = seen(images)[1]
    assert value.is_contiguous(memory_format=layout)
    found.keep(0, [value])
    assert found.kept is not None and found.kept[0].is_contiguous()
    rows = torch.tensor([3, 1])
    assert float(found.mismatch([value[rows]], [images], rows)) < 1e-5


def test_a_layout_that_fails_is_undone() -> None:
    model = nn.Conv2d(3, 4, 3)
    assert in_fastest_layout(model, lambda: model.weight.is_contiguous(memory_format=torch.channels_last))

    def attempt() -> Tensor:
        return model(torch.zeros(2, 3, 4, 4)).view(-1)

    torch.testing.assert_close(in_fastest_layout(model, attempt), attempt(), rtol=0, atol=0)
    assert model.weight.is_contiguous()
