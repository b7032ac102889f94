"""Small networks from descriptions that hypothesis draws: branches, residuals, modules called twice, tied weights."""

# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}

Kind = Literal["plain", "residual", "concatenated", "twice", "tied"]


@dataclass(frozen=True)
class Stage:
    """One stage of a network; ``channels`` are its outputs, all kernels odd and padded to keep the size."""

    kind: Kind
    channels: int
    kernel: int
    stride: int
    norm: bool
    bias: bool
    pool: bool


@dataclass(frozen=True)
class Description:
    """Stages on (batch, 3, *size), then the mean over positions and linear layers to 5 outputs.

    With ``tied`` two hidden linear layers share their weight; ``training`` leaves the first stage in train mode.
    """

    stages: tuple[Stage, ...]
    size: tuple[int, ...]
    hidden: int
    tied: bool
    training: bool
    dtype: torch.dtype


class Block(nn.Sequential):
    """Convolution, perhaps BatchNorm, and ReLU."""

    def __init__(self, dims: int, inputs: int, outputs: int, kernel: int, stride: int, norm: bool, bias: bool) -> None:
        super().__init__()
        self.conv = CONVS[dims](inputs, outputs, kernel, stride, padding=kernel // 2, bias=bias)
        if norm:
            self.norm = NORMS[dims](outputs)
        self.act = nn.ReLU(inplace=bias)


class DrawnStage(nn.Module):
    def __init__(self, stage: Stage, dims: int, inputs: int) -> None:
        super().__init__()
        options = (stage.norm, stage.bias)
        self.kind = stage.kind
        self.first = Block(dims, inputs, stage.channels, stage.kernel, stage.stride, *options)
        if stage.kind == "residual":
            self.second = Block(dims, stage.channels, stage.channels, stage.kernel, 1, *options)
            self.shortcut = CONVS[dims](inputs, stage.channels, 1, stage.stride, bias=False)
        elif stage.kind == "concatenated":
            self.second = Block(dims, inputs, stage.channels, 1, stage.stride, *options)
            self.merge = Block(dims, 2 * stage.channels, stage.channels, 1, 1, *options)
        elif stage.kind in ("twice", "tied"):
            self.second = Block(dims, stage.channels, stage.channels, stage.kernel, 1, *options)
        if stage.kind == "tied":
            self.third = Block(dims, stage.channels, stage.channels, stage.kernel, 1, *options)
            self.third.conv.weight = self.second.conv.weight
        self.pool = POOLS[dims](2, ceil_mode=True) if stage.pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.kind == "residual":
            y = self.second(y) + self.shortcut(x)
        elif self.kind == "concatenated":
            y = self.merge(torch.cat([y, self.second(x)], dim=1))
        elif self.kind == "twice":
            y = self.second(self.second(y))
        elif self.kind == "tied":
            y = self.third(self.second(y))
        return self.pool(y)


class DrawnNetwork(nn.Module):
    def __init__(self, description: Description) -> None:
        super().__init__()
        dims, hidden = len(description.size), description.hidden
        channels = [3, *(stage.channels for stage in description.stages)]
        self.stages = nn.Sequential(
            *(DrawnStage(stage, dims, c) for stage, c in zip(description.stages, channels, strict=False))
        )
        self.embed = nn.Linear(channels[-1], hidden)
        self.hidden = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden, bias=False))
        if description.tied:
            self.hidden[2].weight = self.hidden[0].weight
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(hidden, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.embed(self.stages(x).flatten(2).mean(2))))


def drawn_network(description: Description) -> tuple[DrawnNetwork, Tensor]:
    """The network with seeded weights and BatchNorm statistics that have seen data, and an input of batch 2."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = DrawnNetwork(description)
        for name, parameter in network.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
        x = torch.randn(2, 3, *description.size)
        network.train()(x)
    network.eval()
    network.stages[0].train(description.training)
    return network.to(description.dtype), x.to(description.dtype)
