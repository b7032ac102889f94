"""Networks of kinds that the libraries do not cover, written out; small enough for tests."""

# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from zoo_models.case import BATCH, Case, Factory, clips, images, tokens


class VAE(nn.Module):
    """A convolutional variational autoencoder (Kingma and Welling 2014); the mean of the latent in eval mode."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1), nn.BatchNorm2d(width), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2), nn.Flatten(),
        )  # fmt: skip
        self.mean, self.log_var = (nn.Linear(2 * width * 16, 24) for _ in range(2))
        self.expand = nn.Linear(24, 2 * width * 16)
        self.decode = nn.Sequential(
            nn.Unflatten(1, (2 * width, 4, 4)), nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.BatchNorm2d(width),
            nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, 3, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.encode(x)
        mean, log_var = self.mean(x), self.log_var(x)
        latent = mean + torch.randn_like(mean) * torch.exp(log_var / 2) if self.training else mean
        return torch.sigmoid(self.decode(self.expand(latent))), mean, log_var


class DoubleConv(nn.Sequential):
    """Twice convolution, GroupNorm, SiLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.GroupNorm(4, out_channels), nn.SiLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1), nn.GroupNorm(4, out_channels), nn.SiLU(),
        )  # fmt: skip


class DiffusionUNet(nn.Module):
    """A U-Net that is told the time (Ho et al. 2020), with attention in the middle and two ways up."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 2 * width))
        self.down1, self.down2 = DoubleConv(3, width), DoubleConv(width, 2 * width)
        self.attention = nn.MultiheadAttention(2 * width, 4, batch_first=True)
        self.up2 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge2, self.merge1 = DoubleConv(3 * width, 2 * width), DoubleConv(3 * width, width)
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        angles = time[:, None] * torch.exp(torch.arange(8, device=x.device) * -0.5)
        first = self.down1(x)
        second = (
            self.down2(F.max_pool2d(first, 2)) + self.time(torch.cat([angles.sin(), angles.cos()], 1))[..., None, None]
        )
        middle = F.avg_pool2d(second, 2)
        sequence = middle.flatten(2).transpose(1, 2)
        attended, _ = self.attention(sequence, sequence, sequence, need_weights=False)
        middle = middle + attended.transpose(1, 2).reshape(middle.shape)
        x = self.merge2(torch.cat([self.up2(middle), second], 1))
        return self.head(self.merge1(torch.cat([F.interpolate(x, scale_factor=2), first], 1)))


class WaveNet(nn.Module):
    """Gated dilated convolutions in one dimension with skips (van den Oord et al. 2016)."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, width, 1)
        dilations = (1, 2, 4, 8)
        self.gates = nn.ModuleList(nn.Conv1d(width, 2 * width, 3, padding=d, dilation=d) for d in dilations)
        self.outs = nn.ModuleList(nn.Conv1d(width, 2 * width, 1) for _ in dilations)
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(width, 32, 1), nn.ReLU(), nn.Conv1d(32, 32, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skips = torch.zeros_like(x)
        for gate, out in zip(self.gates, self.outs, strict=True):
            a, b = gate(x).chunk(2, 1)
            residual, skip = out(torch.tanh(a) * torch.sigmoid(b)).chunk(2, 1)
            x, skips = x + residual, skips + skip
        return self.head(skips)


class KeywordSpotter(nn.Module):
    """One-dimensional residual network on waves (Dai et al. 2017)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv1d(1, width, 21, 4, 10, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.MaxPool1d(4)
        )
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv1d(width, width, 5, padding=2, bias=False), nn.BatchNorm1d(width), nn.ReLU())
            for _ in range(3)
        )
        self.head = nn.Linear(width, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.body:
            x = x + layer(x)
        return self.head(x.mean(2))


class SlowFast(nn.Module):
    """Two 3-d trunks at two frame rates, the fast one feeding the slow one (Feichtenhofer et al. 2019)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        fast = width // 2
        self.slow1 = nn.Sequential(
            nn.Conv3d(3, width, (1, 5, 5), (1, 2, 2), (0, 2, 2)), nn.BatchNorm3d(width), nn.ReLU()
        )
        self.fast1 = nn.Sequential(nn.Conv3d(3, fast, (5, 5, 5), (1, 2, 2), 2), nn.BatchNorm3d(fast), nn.ReLU())
        self.lateral = nn.Conv3d(fast, fast, (5, 1, 1), (2, 1, 1), (2, 0, 0))
        self.slow2 = nn.Sequential(nn.Conv3d(width + fast, 32, 3, (1, 2, 2), 1), nn.BatchNorm3d(32), nn.ReLU())
        self.fast2 = nn.Sequential(nn.Conv3d(fast, 16, 3, (1, 2, 2), 1), nn.BatchNorm3d(16), nn.ReLU())
        self.head = nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        slow, fast = self.slow1(x[:, :, ::2]), self.fast1(x)
        slow = self.slow2(torch.cat([slow, self.lateral(fast)], 1))
        return self.head(torch.cat([slow.mean((2, 3, 4)), self.fast2(fast).mean((2, 3, 4))], 1))


class Recommender(nn.Module):
    """Embeddings of categories beside numbers, their products, and a perceptron on top (Naumov et al. 2019)."""

    def __init__(self, categories: tuple[int, ...] = (200, 50, 300), width: int = 16) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(count, width) for count in categories)
        self.bottom = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, width), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(width + 6, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
        self.register_buffer("pairs", torch.triu_indices(4, 4, 1))

    def forward(self, numbers: Tensor, ids: Tensor) -> Tensor:
        dense = self.bottom(numbers)
        vectors = torch.stack([dense, *(table(ids[:, i]) for i, table in enumerate(self.embeddings))], 1)
        products = vectors @ vectors.transpose(1, 2)
        return torch.sigmoid(self.top(torch.cat([dense, products[:, self.pairs[0], self.pairs[1]]], 1)))


class Seq2Seq(nn.Module):
    """LSTM encoder and decoder with attention between them (Luong et al. 2015)."""

    def __init__(self, vocabulary: int = 100, width: int = 32) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(vocabulary, width), nn.Embedding(vocabulary, width)
        self.encoder = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        self.decoder = nn.LSTM(width, width, batch_first=True)
        self.bridge, self.key = nn.Linear(2 * width, width), nn.Linear(2 * width, width)
        self.mix, self.head = nn.Linear(3 * width, width), nn.Linear(width, vocabulary)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, (h, c) = self.encoder(self.source(source))
        h, c = (self.bridge(torch.cat([state[0], state[1]], 1))[None] for state in (h, c))
        x, _ = self.decoder(self.target(target), (h, c))
        weights = torch.softmax(x @ self.key(memory).transpose(1, 2), 2)
        return self.head(torch.tanh(self.mix(torch.cat([weights @ memory, x], 2))))


class Generator(nn.Module):
    """DCGAN's generator (Radford et al. 2016): transposed convolutions from noise to an image."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.project = nn.Linear(32, 4 * width * 16)
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(True),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True),
            nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, noise: Tensor) -> Tensor:
        x = self.project(noise)
        return self.layers(x.view(x.size(0), -1, 4, 4))


class PatchDiscriminator(nn.Module):
    """A discriminator with spectral norm (Miyato et al. 2018)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.layers = nn.Sequential(
            norm(nn.Conv2d(3, width, 4, 2, 1)), nn.LeakyReLU(0.2),
            norm(nn.Conv2d(width, 2 * width, 4, 2, 1)), nn.LeakyReLU(0.2),
            norm(nn.Conv2d(2 * width, 4 * width, 3, 1, 1)), nn.LeakyReLU(0.2), nn.Conv2d(4 * width, 1, 3, 1, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Siamese(nn.Module):
    """One trunk called on three images (Schroff et al. 2015)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 32, 3, 2, 1), nn.ReLU()
        )
        self.embed = nn.Linear(32, 16)

    def forward(self, anchor: Tensor, same: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        a, s, o = (F.normalize(self.embed(self.trunk(x).mean((2, 3)))) for x in (anchor, same, other))
        return (a - s).square().sum(1), (a - o).square().sum(1)


class EarlyExit(nn.Module):
    """Leaves early where it is sure: which layers run depends on values (Teerapittayanon et al. 2016)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.exit = nn.Linear(width, 6)
        self.second = nn.Sequential(nn.Conv2d(width, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.head = nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        early = self.exit(x.mean((2, 3)))
        if early.softmax(1).amax(1).min() > 0.99:
            return early
        return early + self.head(self.second(x).mean((2, 3)))


class Vocoder(nn.Module):
    """HiFi-GAN's generator (Kong et al. 2020): weight norm, transposed convolutions, dilated residual blocks."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = weight_norm(nn.Conv1d(20, width, 7, padding=3))
        self.up = weight_norm(nn.ConvTranspose1d(width, width // 2, 8, 4, padding=2))
        self.blocks = nn.ModuleList(
            weight_norm(nn.Conv1d(width // 2, width // 2, 3, padding=d, dilation=d)) for d in (1, 3, 5)
        )
        self.head = weight_norm(nn.Conv1d(width // 2, 1, 7, padding=3))

    def forward(self, mel: Tensor) -> Tensor:
        x = self.up(F.leaky_relu(self.stem(mel), 0.1))
        for block in self.blocks:
            x = x + block(F.leaky_relu(x, 0.1))
        return torch.tanh(self.head(F.leaky_relu(x)))


class GraphConvolution(nn.Module):
    """Two graph convolutions on dense adjacency matrices (Kipf and Welling 2017)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(24, width), nn.Linear(width, width), nn.Linear(width, 4)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        weights = torch.softmax(adjacency, 2)
        x = F.relu(weights @ self.first(x))
        return self.head(F.relu(weights @ self.second(x)).mean(1))


class PointNet(nn.Module):
    """Shared 1-d convolutions on point clouds and a transform that is computed from them (Qi et al. 2017)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.spatial = nn.Sequential(nn.Conv1d(3, width, 1), nn.BatchNorm1d(width), nn.ReLU())
        self.transform = nn.Linear(width, 9)
        self.features = nn.Sequential(
            nn.Conv1d(3, width, 1), nn.BatchNorm1d(width), nn.ReLU(), nn.Conv1d(width, 2 * width, 1)
        )
        self.head = nn.Linear(2 * width, 5)

    def forward(self, points: Tensor) -> Tensor:
        matrix = self.transform(self.spatial(points).amax(2)).view(-1, 3, 3)
        return self.head(self.features(matrix @ points).amax(2))


class Conformer(nn.Module):
    """A block of attention and depthwise convolution on speech (Gulati et al. 2020)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Linear(20, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.expand, self.project = nn.Conv1d(width, 2 * width, 1), nn.Conv1d(width, width, 1)
        self.depthwise, self.batch_norm = nn.Conv1d(width, width, 7, padding=3, groups=width), nn.BatchNorm1d(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Dropout(0.1), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm1(x)
        x = x + self.attention(y, y, y)[0]
        y = F.glu(self.expand(self.norm2(x).transpose(1, 2)), 1)
        x = x + self.project(F.silu(self.batch_norm(self.depthwise(y)))).transpose(1, 2)
        return self.head(x + self.feed(self.norm3(x)))


class SuperResolution(nn.Module):
    """Residual blocks without normalization and a pixel shuffle (Lim et al. 2017)."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(2)
        )
        self.up = nn.Sequential(nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2))
        self.head = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + 0.1 * block(x)
        return self.head(self.up(x))


class Detector(nn.Module):
    """A pyramid of features and heads shared by its levels (Lin et al. 2017)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.c1 = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.c2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.lateral1, self.lateral2 = nn.Conv2d(width, 24, 1), nn.Conv2d(2 * width, 24, 1)
        self.smooth = nn.Conv2d(24, 24, 3, padding=1)
        self.classes, self.boxes = nn.Conv2d(24, 9, 3, padding=1), nn.Conv2d(24, 12, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        c1 = self.c1(x)
        p2 = self.lateral2(self.c2(c1))
        p1 = self.smooth(self.lateral1(c1) + F.interpolate(p2, size=c1.shape[2:]))
        return {"classes": [self.classes(p) for p in (p1, p2)], "boxes": [self.boxes(p) for p in (p1, p2)]}


class Encoder(nn.Module):
    """torch's own encoder under a padding mask, on tokens."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, width)
        layer = nn.TransformerEncoderLayer(width, 4, 64, batch_first=True, norm_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 8)

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(ids), src_key_padding_mask=padding)[:, 0])


class WeightStandardized(nn.Module):
    """Convolutions whose weight is standardized in forward (Qiao et al. 2019)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.first, self.second):
            weight = conv.weight - conv.weight.mean((1, 2, 3), keepdim=True)
            x = F.relu(
                F.conv2d(x, weight / (weight.flatten(1).std(1)[:, None, None, None] + 1e-5), conv.bias, padding=1)
            )
        return self.head(x.mean((2, 3)))


def on(make: Callable[[], nn.Module], *inputs: Callable[[], Tensor]) -> Factory:
    """A factory for a network with these inputs."""
    return lambda: Case(make(), tuple(draw() for draw in inputs))


def normal(*shape: int) -> Callable[[], Tensor]:
    """Normal numbers, batch first."""
    return lambda: torch.randn(BATCH, *shape)


def small_images() -> Tensor:
    """16 x 16."""
    return images(16)


def short_clips() -> Tensor:
    """Four frames of 16 x 16."""
    return clips(4, 16)


def padding() -> Tensor:
    """True at the last four tokens of the second row."""
    mask = torch.zeros(BATCH, 16, dtype=torch.bool)
    mask[1, -4:] = True
    return mask


MODELS: dict[str, Factory] = {
    "vae": on(VAE, small_images),
    "unet": on(DiffusionUNet, small_images, lambda: torch.rand(BATCH) * 10),
    "wavenet": on(WaveNet, normal(1, 128)),
    "keyword_spotter": on(KeywordSpotter, normal(1, 512)),
    "slowfast": on(SlowFast, short_clips),
    "recommender": on(Recommender, normal(12), lambda: torch.randint(50, (BATCH, 3))),
    "seq2seq": on(Seq2Seq, tokens, lambda: tokens(8)),
    "generator": on(Generator, normal(32)),
    "discriminator": on(PatchDiscriminator, small_images),
    "siamese": on(Siamese, small_images, small_images, small_images),
    "early_exit": on(EarlyExit, small_images),
    "vocoder": on(Vocoder, normal(20, 16)),
    "graph": on(GraphConvolution, normal(6, 24), normal(6, 6)),
    "pointnet": on(PointNet, normal(3, 40)),
    "conformer": on(Conformer, normal(12, 20)),
    "super_resolution": on(SuperResolution, small_images),
    "detector": on(Detector, small_images),
    "encoder": on(Encoder, tokens, padding),
    "weight_standardized": on(WeightStandardized, small_images),
}
