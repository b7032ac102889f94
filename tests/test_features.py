from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import tdfx
from tdfx.features import mismatch, observed, paired_nodes
from tdfx.records.result import Result


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


class Residual(nn.Module):
    """A stem without activation, one residual block, Dropout, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.stem = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.conv1, self.conv2 = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.fc, self.head = nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(self.first(x)).relu()
        y = (self.conv2(self.conv1(y).relu()) + y).relu()
        z: Tensor = self.head(self.dropout(self.fc(y.mean((2, 3)))).relu())
        return z


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def compressed(kind: type[nn.Module], compressing: str, trainable: bool = False) -> Result:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind().eval()
    result = tdfx.compress(
        model,
        X,
        budget="flops=100%",
        methods=["spatial_svd", "svd"],
        target=None,
        overrides={compressing: {"rank": 2}},
        trainable=trainable,
    )
    assert {c.site: c.is_dense for c in result.plan.candidates}[compressing] is False
    return result


def pairs(result: Result) -> tuple[list[str], list[str]]:
    assert isinstance(result.original, fx.GraphModule) and isinstance(result.module, fx.GraphModule)
    return paired_nodes(result.original, result.module, result.plan, [X])


def test_layers_called_twice_and_what_only_the_output_reads_are_left_out() -> None:
    assert pairs(compressed(Net, "conv")) == (["relu"], ["relu"])


def test_pairs_are_what_blocks_hand_on() -> None:
    """What the stem, the block and the linear layer put out; neither the inside of the block nor what is pooled."""
    result = compressed(Residual, "conv1")
    assert pairs(result) == (["first", "relu", "relu_2", "relu_3"],) * 2


def test_what_dropout_reads_is_matched_and_a_chain_by_its_last_node() -> None:
    result = compressed(Residual, "fc", trainable=True)
    wanted, found = pairs(result)
    assert wanted == ["first", "relu", "relu_2", "fc"] and found == ["first", "relu", "relu_2", "fc_svd_expand"]
    assert isinstance(result.module, fx.GraphModule)
    output, values = observed(result.module, found)(X)
    torch.testing.assert_close(output, result.module(X), rtol=0, atol=0)
    with torch.no_grad():
        got = result.module.get_submodule("fc")(values[2].mean((2, 3)))
    torch.testing.assert_close(values[3], got, rtol=0, atol=1e-6)


def test_mismatch_is_half_the_squared_error_over_the_variance() -> None:
    wanted = [torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [4.0]])]
    got, variances = [torch.tensor([[2.0], [3.0]]), wanted[1]], [torch.tensor(2.0), torch.tensor(1.0)]
    assert float(mismatch(wanted, got, variances)) == pytest.approx((0.5 / 2 + 0) / 2 / 2, rel=1e-6)
