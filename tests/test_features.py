from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tdfx
from tdfx.features import mismatch, observed, paired_nodes


class Net(nn.Module):
    """A convolution, a layer called twice, a small head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.twice = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(self.twice(self.conv(x).relu()).relu()).relu()
        z: Tensor = self.head(y.mean((2, 3)))
        return z


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_pairs_are_what_the_layers_put_out() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net().eval()
    captured = tdfx.capture(model, X)
    result = tdfx.compress(
        model, X, budget="flops=100%", methods=["spatial_svd", "svd"], target=None, overrides={"conv": {"rank": 2}}
    )
    assert isinstance(result.module, torch.fx.GraphModule)
    assert {c.site: c.is_dense for c in result.plan.candidates}["conv"] is False
    wanted, found = paired_nodes(captured.module, result.module, result.plan)
    assert wanted == ["conv", "head"] and len(found) == 2
    output, (value, _) = observed(result.module, found)(X)
    torch.testing.assert_close(output, result.module(X), rtol=0, atol=0)
    chain = result.module.get_submodule("conv")
    with torch.no_grad():
        torch.testing.assert_close(value, chain(X), rtol=0, atol=1e-6)


def test_mismatch_is_half_the_relative_squared_error() -> None:
    wanted = [torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [4.0]])]
    got = [torch.tensor([[2.0], [3.0]]), wanted[1]]
    assert float(mismatch(wanted, got)) == pytest.approx((0.5 + 0) / 2 / 2, rel=1e-6)  # 0.5 over a variance of 1
