"""Graphs make tensors where the network is, and of its precision where that is half."""

# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import tdfx
from tdfx.passes.capture import isolate
from tdfx.passes.export_trace import export_trace
from tdfx.passes.free_literals import FreeLiterals

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Making(nn.Module):
    """Makes tensors of several operators on the device of its input or its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x) + torch.arange(8, device=x.device) + torch.zeros(x.shape[0], 8, device=self.fc.weight.device)
        return y.to(x.device, torch.float64) * torch.full((8,), 2.0, device=x.device).to(self.fc.weight.device)


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self) -> Tensor:
        return self.fc(torch.ones(2, 8, device=self.fc.weight.device))


def test_a_moved_graph_makes_tensors_on_its_own_device() -> None:
    model = isolate(Making())[0]
    exported, _ = export_trace(model, (X,), {})
    with pytest.raises(RuntimeError, match="meta"):
        copy.deepcopy(exported).to("meta")(X.to("meta"))
    freed = FreeLiterals().run(exported)
    torch.testing.assert_close(freed(X), model(X), rtol=0, atol=0)
    assert freed.to("meta")(X.to("meta")).device.type == "meta"


def test_a_graph_without_inputs_moves_too() -> None:
    exported, _ = export_trace(isolate(Constant())[0], (), {})
    assert FreeLiterals().run(exported).to("meta")().device.type == "meta"


def test_a_graph_that_makes_nothing_stays() -> None:
    exported, _ = export_trace(isolate(nn.Linear(8, 8))[0], (X,), {})
    assert str(FreeLiterals().run(exported).graph) == str(exported.graph)


class Mixed(nn.Module):
    """Computes a softmax in float32 whatever it is given, and adds a tensor of its input's dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("kind", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x).float().softmax(-1).to(x.dtype)
        return self.out(y + torch.ones(8, dtype=x.dtype, device=x.device) * self.kind)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_left_again(half: torch.dtype) -> None:
    model = isolate(Mixed().to(half))[0]
    exported, _ = export_trace(model, (X.to(half),), {})
    freed = FreeLiterals().run(exported)
    torch.testing.assert_close(freed(X.to(half)), model(X.to(half)), rtol=0, atol=0)
    torch.testing.assert_close(freed.float()(X), model.float()(X), rtol=0, atol=0)
    literals = [value for node in freed.graph.nodes for value in (*node.args, *node.kwargs.values())]
    assert torch.float32 in literals and half not in literals


def test_float32_stays_as_it_may_be_meant() -> None:
    exported, _ = export_trace(isolate(Mixed())[0], (X,), {})
    freed = FreeLiterals().run(exported)
    assert [node for node in freed.graph.nodes if torch.float32 in (*node.args, *node.kwargs.values())]


def test_results_move_and_are_saved(tmp_path: object) -> None:
    model = Making().eval()
    result = tdfx.compress(
        model, X, budget="params=90%", methods=["svd"], rank_multiple=1, capture="export", target=None
    )
    tdfx.save(result, f"{tmp_path}/making.tdfx")
    loaded = tdfx.load(f"{tmp_path}/making.tdfx").module
    torch.testing.assert_close(loaded(X), result.module(X), rtol=0, atol=0)
    assert loaded.to("meta")(X.to("meta")).device.type == "meta"
