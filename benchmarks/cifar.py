"""CIFAR-10 images kept as JPEG files, and the CIFAR ResNets trained on them."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

MEAN = torch.tensor([0.485, 0.456, 0.406])
STD = torch.tensor([0.229, 0.224, 0.225])


class Block(nn.Module):
    """Basic residual block with an option-A shortcut (He et al. 2016, section 4.2)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.padding = (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x)


class ResNet(nn.Module):
    """CIFAR ResNet of depth 6 n + 2 with widths 16, 32, 64. Input (batch, 3, 32, 32), output (batch, 10)."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, (depth - 2) // 6)
        self.layer2 = self._stage(16, 32, 2, (depth - 2) // 6)
        self.layer3 = self._stage(32, 64, 2, (depth - 2) // 6)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, stride: int, blocks: int) -> nn.Sequential:
        first = Block(in_channels, out_channels, stride)
        return nn.Sequential(first, *(Block(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def trained_resnet(folder: Path, depth: int) -> ResNet:
    """ResNet-20 or ResNet-56 with the trained weights in the folder, in eval mode."""
    model = ResNet(depth)
    model.load_state_dict(torch.load(folder / f"resnet{depth}_cifar10jpeg.pt", weights_only=True))
    return model.eval()


def images(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Normalised images (n, 3, 32, 32) and labels (n,) of the split "train" or "test"."""
    with np.load(folder / f"cifar10_jpeg_{split}.npz") as archive:
        data, offsets, labels = archive["jpeg"].tobytes(), archive["offsets"], archive["labels"]
    files = (data[start:end] for start, end in pairwise(offsets))
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    normalised = (torch.from_numpy(pixels).float() / 255 - MEAN) / STD
    return normalised.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels.astype(np.int64))


@torch.no_grad()
def top1(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Percentage of images whose largest logit is the label's."""
    batches = zip(inputs.split(100), labels.split(100), strict=True)
    return 100 * sum(int((model(batch).argmax(1) == wanted).sum()) for batch, wanted in batches) / len(labels)
