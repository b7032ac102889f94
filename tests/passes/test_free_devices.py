"""A graph that makes tensors makes them where its inputs are."""

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
from tdfx.passes.free_devices import FreeDevices

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
    freed = FreeDevices().run(exported)
    torch.testing.assert_close(freed(X), model(X), rtol=0, atol=0)
    assert freed.to("meta")(X.to("meta")).device.type == "meta"


def test_graphs_without_inputs_or_devices_stay() -> None:
    for model, args in ((Constant(), ()), (nn.Linear(8, 8), (X,))):
        exported, _ = export_trace(isolate(model)[0], args, {})
        assert str(FreeDevices().run(exported).graph) == str(exported.graph)


def test_results_move_and_are_saved(tmp_path: object) -> None:
    model = Making().eval()
    result = tdfx.compress(
        model, X, budget="params=90%", methods=["svd"], rank_multiple=1, capture="export", target=None
    )
    tdfx.save(result, f"{tmp_path}/making.tdfx")
    loaded = tdfx.load(f"{tmp_path}/making.tdfx").module
    torch.testing.assert_close(loaded(X), result.module(X), rtol=0, atol=0)
    assert loaded.to("meta")(X.to("meta")).device.type == "meta"
