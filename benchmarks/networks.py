"""Architectures with random weights, for timing: VGG-16, MobileNetV2, a small vision transformer and text encoder.

Sources: Simonyan and Zisserman 2015, configuration D; Sandler et al. 2018, table 2; Dosovitskiy et al. 2021, and
Touvron et al. 2021 for the size "small"; Turc et al. 2019 for that of BERT-small.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VGG = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
MOBILE = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def vgg16() -> nn.Module:
    """Input (batch, 3, 224, 224), output (batch, 1000)."""
    layers: list[nn.Module] = []
    inputs = 3
    for width, number in VGG:
        for _ in range(number):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    head = (nn.Linear(512 * 49, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000))
    return nn.Sequential(*layers, nn.Flatten(), *head)


class InvertedResidual(nn.Module):
    """Pointwise to more channels, depthwise, pointwise to few."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        width = inputs * expansion
        layers: list[nn.Module] = [_conv(inputs, width, 1), nn.ReLU6()] if expansion > 1 else []
        layers += [_conv(width, width, 3, stride, groups=width), nn.ReLU6(), _conv(width, outputs, 1)]
        self.layers, self.adds = nn.Sequential(*layers), stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.adds else self.layers(x)


def mobilenet_v2() -> nn.Module:
    """Input (batch, 3, 224, 224), output (batch, 1000)."""
    layers: list[nn.Module] = [_conv(3, 32, 3, 2), nn.ReLU6()]
    inputs = 32
    for expansion, width, number, stride in MOBILE:
        for index in range(number):
            layers.append(InvertedResidual(inputs, width, expansion, 1 if index else stride))
            inputs = width
    layers += [_conv(320, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """Transformer encoder layers, normalised before attention and before the two linear layers."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        for index in range(len(self.qkv)):
            parts = self.qkv[index](self.norms[2 * index](x)).reshape(batch, length, 3, self.heads, width // self.heads)
            attended = F.scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4).unbind(0))
            x = x + self.out[index](attended.transpose(1, 2).reshape(batch, length, width))
            x = x + self.down[index](F.gelu(self.up[index](self.norms[2 * index + 1](x))))
        return x


class VisionTransformer(nn.Module):
    """ViT-small: 12 layers of width 384, patches of 16. Input (batch, 3, 224, 224), output (batch, 1000)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 384, 16, 16)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 196, 384))
        self.encoder, self.norm, self.head = Encoder(384, 12, 6), nn.LayerNorm(384), nn.Linear(384, 1000)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.encoder(tokens)).mean(1))


class TextEncoder(nn.Module):
    """BERT-small: 4 layers of width 512, without its vocabulary's table. Input (batch, 128, 512), output the same."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(512, 4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))
