"""Networks whose control flow depends on values, or whose forward asks more of its layers than to be called.

``PYTHON_NETWORKS`` pairs each with two example inputs, which go different ways through it where there are several.
"""

# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Branch(nn.Module):
    """One of two layers, by the sign of what comes to it. Input (batch, 24), output a dictionary of (batch, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(24, 24)
        self.positive = nn.Linear(24, 16)
        self.negative = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.relu(self.stem(x))
        return {"scores": self.positive(y) if x.sum() > 0 else self.negative(y)}


class Loop(nn.Module):
    """As many steps as the values say, and a layer called twice. Input (batch, 8, 6, 6), output (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.mix = nn.Conv2d(8, 8, 1)
        self.drop = nn.Dropout()
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().sum()) % 3 + 1):
            x = torch.relu(self.norm(self.conv(x)))
        x = self.mix(self.mix(x))
        return self.fc(self.drop(x.mean((2, 3)).reshape(-1, self.fc.in_features)).to(self.fc.weight.dtype))


class EarlyExit(nn.Module):
    """The first head where it is sure. Input (batch, 24) of one sign, output (batch, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(24, 24) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(24, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        least = x.abs().max()
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = x + torch.relu(block(x))
            y = head(x)
            if least < 1:
                return y
        return y


class Readers(nn.Module):
    """Layers that are more than called. Input (batch, 12), output (batch, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(12, 12)
        self.read = nn.Linear(12, 12)
        self.hidden = nn.Linear(12, 12)
        self.asked = nn.Linear(12, 12)
        self.tied = nn.Linear(12, 12, bias=False)
        self.matrix = self.tied.weight
        self.references = (self.hidden,)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() == 0:
            return x
        x = self.called(x) if self.called.weight.device == x.device else x
        x = F.linear(x, self.read.weight, self.read.bias)
        x = self.hidden(self.references[0](x))
        return self.tied(self.asked(x)) if isinstance(self.asked, nn.Linear) else x


class Encoder(nn.Module):
    """torch's encoder layer on its own attention and on one that stays packed. Input (batch, 5, 16), output same."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.other = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.other.self_attn = OwnAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.layer(x)) if x.sum() > 0 else self.layer(x)


class OwnAttention(nn.MultiheadAttention):
    """Attention of a user's own class."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        return super().forward(*args, **kwargs)  # type: ignore[arg-type]


def _drawn(*shape: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).abs() * scale
    return value, -value


def _steps(*shape: int) -> tuple[Tensor, Tensor]:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    value = value * (30.5 / value.abs().sum())
    return value * (32.5 / 30.5), value


PYTHON_NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "branch": (Branch, lambda: _drawn(3, 24)),
    "loop": (Loop, lambda: _steps(2, 8, 6, 6)),
    "early_exit": (EarlyExit, lambda: (_drawn(3, 24, scale=9)[0], _drawn(3, 24, scale=0.01)[0])),
    "readers": (Readers, lambda: (_drawn(3, 12)[0], torch.zeros(3, 12))),
    "encoder": (Encoder, lambda: _drawn(2, 5, 16)),
}


def build_python(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The network in eval mode, with BatchNorm statistics that have seen data, and two example inputs."""
    factory, inputs = PYTHON_NETWORKS[name]
    first, second = inputs()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = factory().train()
        network(first.clone())
    return network.eval(), first, second
