"""Small networks of the families that are compressed in practice, for tests.

Every class documents the shape of its input. ``NETWORKS`` pairs each with example inputs of batch 2; ``build`` makes
one with seeded weights and BatchNorm statistics that have seen data.
"""

# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """CIFAR ResNet-8 (He et al. 2016). Input (batch, 3, 32, 32), output (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.layer1 = ResidualBlock(16, 16, 1)
        self.layer2 = ResidualBlock(16, 32, 2)
        self.layer3 = ResidualBlock(32, 64, 2)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.fc(x.mean((2, 3)))


class InvertedResidual(nn.Module):
    """1 x 1 expansion, depthwise 3 x 3, 1 x 1 projection."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileNet(nn.Module):
    """MobileNetV2 in small (Sandler et al. 2018). Input (batch, 3, 32, 32), output (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU6(),
            InvertedResidual(16, 16, 1),
            InvertedResidual(16, 24, 2),
            InvertedResidual(24, 24, 1),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(24, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class VGG(nn.Module):
    """Convolutions with bias, max-pooling, flatten, two linear layers. Input (batch, 3, 16, 16), output (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(512, 64), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(64, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class UNet(nn.Module):
    """One level down, one transposed convolution up, a skip by concatenation. Input and output (batch, 3, 16, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(32, 32, 3, padding=2, dilation=2)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.decode = nn.Conv2d(32, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.encode(x))
        x = F.relu(self.middle(F.relu(self.down(skip))))
        x = torch.cat([self.up(x), skip], dim=1)
        return self.head(F.relu(self.decode(x)))


class AudioNet(nn.Module):
    """Strided, dilated and grouped 1-d convolutions. Input (batch, 1, 256), output (batch, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(1, 16, 9, stride=4, padding=4),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Conv1d(16, 32, 3, padding=2, dilation=2, groups=4, padding_mode="circular"),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Conv1d(32, 32, 5, padding="same"),
            nn.ReLU(),
        )
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(2))


class VideoNet(nn.Module):
    """3-d convolutions. Input (batch, 3, 4, 16, 16) with time before height, output (batch, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv3d(3, 8, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
            nn.BatchNorm3d(8),
            nn.ReLU(),
            nn.Conv3d(8, 16, 3, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3, 4)))


class Transformer(nn.Module):
    """torch's own encoder, with nn.MultiheadAttention inside. Input (batch, 10, 16), output (batch, 10, 4)."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


class Attention(nn.Module):
    """Self-attention on (batch, length, channels), from linear layers and scaled_dot_product_attention."""

    def __init__(self, channels: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=2))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block on (batch, length, channels)."""

    def __init__(self, channels: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = Attention(channels, heads, causal)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021). Input (batch, 3, 16, 16), output (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, stride=4)
        self.position = nn.Parameter(torch.randn(16, 32) * 0.02)
        self.blocks = nn.Sequential(Block(32, 4), Block(32, 4))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


class LanguageModel(nn.Module):
    """Causal decoder, its head tied to its embedding. Input (batch, 8) of tokens below 40, output (batch, 8, 40)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.block = Block(16, 2, causal=True)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(tokens)))


class Mixer(nn.Module):
    """MLP-Mixer of one block (Tolstikhin et al. 2021). Input (batch, 3, 16, 16), output (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 4, stride=4)
        self.norm1 = nn.LayerNorm(24)
        self.tokens = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.norm2 = nn.LayerNorm(24)
        self.channels = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm2(x))
        return self.head(x.mean(1))


class Siamese(nn.Module):
    """One trunk called on two inputs. Inputs (batch, 3, 16, 16) and (batch, 3, 8, 8), output (batch,)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
        self.embed = nn.Linear(16, 8)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        left, right = (self.embed(self.trunk(x).mean((2, 3))) for x in (left, right))
        return F.cosine_similarity(left, right)


class DenseNet(nn.Module):
    """Each layer reads all before it (Huang et al. 2017). Input (batch, 3, 16, 16), output (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 8, 3, padding=1, bias=False)) for c in (16, 24, 32)
        )
        self.head = nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, dim=1)))
        return self.head(torch.cat(features, dim=1).mean((2, 3)))


class Functional(nn.Module):
    """Operators on raw parameters, no layers. Input (batch, 5, 12), output (batch, 5, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(20, 12) * 0.2)
        self.kernel = nn.Parameter(torch.randn(20, 1, 3) * 0.2)
        self.last = nn.Parameter(torch.randn(20, 7) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.linear(x, self.first))
        x = F.conv1d(x.transpose(1, 2), self.kernel, padding=1, groups=20)
        return x.transpose(1, 2) @ self.last


class Recurrent(nn.Module):
    """A bidirectional LSTM under a GRU. Input (batch, 6, 10), output (batch, 6, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(10, 12, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(24, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.lstm(x)
        x, _ = self.gru(x)
        return self.head(x)


Inputs = tuple[Tensor, ...]


def _normal(*shapes: tuple[int, ...]) -> Callable[[], Inputs]:
    def draw() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn(shape, generator=generator) for shape in shapes)

    return draw


def _tokens() -> Inputs:
    return (torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(0)),)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "resnet": (ResNet, _normal((2, 3, 32, 32))),
    "mobilenet": (MobileNet, _normal((2, 3, 32, 32))),
    "vgg": (VGG, _normal((2, 3, 16, 16))),
    "unet": (UNet, _normal((2, 3, 16, 16))),
    "audio": (AudioNet, _normal((2, 1, 256))),
    "video": (VideoNet, _normal((2, 3, 4, 16, 16))),
    "transformer": (Transformer, _normal((2, 10, 16))),
    "vit": (ViT, _normal((2, 3, 16, 16))),
    "language_model": (LanguageModel, _tokens),
    "mixer": (Mixer, _normal((2, 3, 16, 16))),
    "siamese": (Siamese, _normal((2, 3, 16, 16), (2, 3, 8, 8))),
    "densenet": (DenseNet, _normal((2, 3, 16, 16))),
    "functional": (Functional, _normal((2, 5, 12))),
    "recurrent": (Recurrent, _normal((2, 6, 10))),
}
"""Name of a network to its factory and the factory of its example inputs."""


def build(name: str, seed: int = 0) -> tuple[nn.Module, Inputs]:
    """The network in eval mode and its example inputs; the same for the same seed, whatever was drawn before.

    Two runs in train mode move BatchNorm's statistics off 0 and 1, where a forgotten fold would not show.
    """
    factory, inputs = NETWORKS[name]
    example = inputs()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        network = factory().train()
        for _ in range(2):
            network(*(x.clone() for x in example))
    return network.eval(), example
