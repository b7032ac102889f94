"""Small networks with the traits that symbolic tracing does not take, or not whole, for tests of torch.export.

Every class documents the shape of its input and what is special about it. ``EXPORTED`` describes each; ``build`` makes
one with seeded weights and BatchNorm statistics that have seen data.
"""

# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils import _pytree as pytree


class LastOutput(OrderedDict[str, Any]):
    """A dictionary whose entries are attributes too, as transformers returns."""


pytree.register_pytree_node(
    LastOutput,
    lambda output: (list(output.values()), list(output)),
    lambda values, keys: LastOutput(zip(keys, values, strict=True)),
    serialized_type_name="exported_networks.LastOutput",
)


@dataclass
class Prediction:
    """Output of a network as a record."""

    logits: Tensor
    features: Tensor


pytree.register_dataclass(Prediction, serialized_type_name="exported_networks.Prediction")


def keyword_call(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Hides the signature of a forward behind **kwargs, as decorators of transformers do."""

    @functools.wraps(forward)
    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return_dict = kwargs.pop("return_dict", True)
        output = forward(self, *args, **kwargs)
        return output if return_dict else tuple(output.values())

    del wrapped.__wrapped__  # type: ignore[attr-defined]
    return wrapped


class SelfAttention(nn.Module):
    """Attention written out on (batch, length, 16), with a mask to add; the dropout of its weights is functional."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(16, 16) for _ in range(4))
        self.dropout = dropout

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, 8)
        q, k, v = (part(x).view(shape).transpose(1, 2) for part in (self.query, self.key, self.value))
        weights = torch.softmax(q @ k.transpose(2, 3) * 8**-0.5 + mask, -1)
        weights = F.dropout(weights, self.dropout, self.training)
        return self.output((weights @ v).transpose(1, 2).reshape(x.shape))


class Bert(nn.Module):
    """An encoder called by keywords: input_ids (batch, 8) below 40, attention_mask (batch, 8); logits (batch, 3)."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16, padding_idx=0)
        self.position = nn.Embedding(8, 16)
        self.register_buffer("position_ids", torch.arange(8)[None], persistent=False)
        self.attention = SelfAttention(dropout)
        self.norm = nn.LayerNorm(16)
        self.intermediate = nn.Linear(16, 32)
        self.output = nn.Linear(32, 16)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(16, 3)

    @keyword_call
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> LastOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = self.embedding(input_ids) + self.position(self.position_ids[:, : input_ids.size(1)])
        added = (1.0 - mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        x = self.norm(x + self.dropout(self.attention(x, added)))
        x = self.norm(x + self.output(F.gelu(self.intermediate(x))))
        return LastOutput(logits=self.classifier(self.dropout(x[:, 0])), hidden_states=(x, added))


class Conv1D(nn.Module):
    """GPT-2's linear layer, with weight (in, out)."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features) * 0.2)
        self.bias = nn.Parameter(torch.randn(out_features) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view((*x.size()[:-1], len(self.bias)))


class GPT(nn.Module):
    """A causal decoder of Conv1D layers, its head tied to its embedding. Input (batch, 8) of tokens below 40."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(40, 16)
        self.norm = nn.LayerNorm(16)
        self.c_attn, self.c_proj = Conv1D(48, 16), Conv1D(16, 16)
        self.lm_head = nn.Linear(16, 40, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor, **unused: Any) -> Tensor:
        x = self.wte(tokens)
        q, k, v = self.c_attn(self.norm(x)).split(16, dim=2)
        x = x + self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.lm_head(x)


class Seq2Seq(nn.Module):
    """torch's encoder and decoder with masks. Inputs (batch, 6, 16), (batch, 5, 16) and (batch, 6) of padding."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        options: dict[str, Any] = {"dim_feedforward": 32, "dropout": dropout, "batch_first": True}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, **options), 1)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, norm_first=True, **options), 1)
        self.register_buffer("causal", torch.ones(5, 5).triu(1).bool())

    def forward(self, source: Tensor, target: Tensor, padding: Tensor) -> Tensor:
        memory = self.encoder(source, src_key_padding_mask=padding)
        return self.decoder(target, memory, tgt_mask=self.causal, memory_key_padding_mask=padding)


@fx.wrap
def windowed(x: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor) -> Tensor:
    """What tracing does not look into: a projection by the weights of others, as in torchvision's swin."""
    if x.shape[1] % 2:
        x = F.pad(x, (0, 0, 0, 1))
    q, k = F.linear(x, weight, bias).chunk(2, -1)
    return F.linear(torch.softmax(q @ k.transpose(1, 2), -1) @ x, out_weight)


class Swin(nn.Module):
    """Layers whose weights alone are read, in a function that tracing takes whole. Input (batch, 5, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.proj = nn.Linear(16, 32), nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(windowed(x, self.qk.weight, self.qk.bias, self.proj.weight))


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Reparametrized(nn.Module):
    """weight_norm, spectral_norm and a parametrization of one's own. Input (batch, 3, 9, 9)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
        self.second = parametrizations.spectral_norm(nn.Conv2d(4, 4, 3))
        self.last = nn.Conv2d(4, 4, 3)
        parametrize.register_parametrization(self.last, "weight", Doubled())

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[1] - 2):
            x = F.relu(self.second(self.first(x)))
        return self.last(x)


class ShapeDependent(nn.Module):
    """Control flow on shapes. Input (batch, 3, 7, 9), output (batch, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 5), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 2:
            x = F.pad(x, (0, 0, 0, 1))
        assert x.shape[2] == 8
        y = [self.conv(x[..., start : start + 4]) for start in range(0, x.shape[3] - 4, 2)]
        return self.head(torch.cat(y, 3).mean((2, 3)))


class BatchNormAct(nn.BatchNorm2d):
    """BatchNorm and an activation, as timm's BatchNormAct2d: a forward of its own that computes with its statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3, momentum=0.3)
        self.drop, self.act = nn.Dropout2d(0.2), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "expected 4D input")
        use_batch = self.training or self.running_mean is None
        if self.training:
            self.num_batches_tracked += 1  # type: ignore[operator]
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, use_batch, self.momentum or 0.0, self.eps
        )
        return self.act(self.drop(x))


class DropPath(nn.Module):
    """Stochastic depth."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(0.5) / 0.5


class Regularized(nn.Module):
    """Every kind of BatchNorm and Dropout. Input (batch, 3, 8, 8), output (batch, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm1 = BatchNormAct(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(6, affine=False)
        self.drop = nn.Dropout2d(0.3)
        self.norm3 = nn.BatchNorm1d(6, momentum=None)
        self.drop_features = nn.Dropout(0.4)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x))
        for _ in range(x.shape[2] // 8):
            x = x + self.drop(self.norm2(self.conv2(x)))
        x = F.dropout(x.mean((2, 3)), 0.1, self.training)
        return self.head(self.drop_features(self.norm3(x)))


class DropResidual(nn.Module):
    """Dropped-out values beside the values themselves. Input and output (batch, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(6, 6), nn.Linear(6, 6)
        self.drop, self.in_place = nn.Dropout(0.5), nn.Dropout(0.5, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) if x.shape[1] > 3 else x
        dropped = self.drop(y)
        z = self.head(y - 2 * dropped)
        self.in_place(z)
        return z + F.dropout(y, 0.3, self.training) + y


class StochasticDepth(nn.Module):
    """A DropPath in a network that is exported. Input (batch, 6), output (batch, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.path = nn.Linear(6, 6), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.path(self.linear(x)) if x.shape[1] > 3 else x


class Recurrent(nn.Module):
    """LSTM and GRU whose states are read and given. Input (batch, 5, 6), output (batch, 8) and both states."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, num_layers=2, batch_first=True, dropout=dropout)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, (h, c) = self.lstm(x)
        y, h = self.gru(y, h[-1:] + c[:1])
        for _ in range(x.shape[1] // 5):
            y = self.head(y)
        return y[:, -1], (h, c)


class Guarded(nn.Module):
    """A block without gradients and one with autocast turned off. Input (batch, 6), output (batch, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.middle, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            kept = x * 2
        x = self.features(x)
        with torch.autocast("cpu", enabled=False):
            x = self.middle(x.float()) + kept
        return self.head(x)


class BothWays(nn.Module):
    """A parameter read as it is and transposed. Input and output (batch, 5, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 12) * 0.3)
        self.head = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(F.linear(x, self.weight)) @ self.weight)


class TwoStrides(nn.Module):
    """One weight with two strides. Input (batch, 3, 9, 9), output (batch, 4, 4, 4) and (batch, 4, 7, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.conv(x), F.conv2d(x, self.conv.weight, self.conv.bias)]


class ComputedBias(nn.Module):
    """Functional layers whose bias is computed. Input (batch, 3, 6, 6), output (batch, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3) * 0.2)
        self.matrix = nn.Parameter(torch.randn(5, 4) * 0.2)
        self.bias, self.bias2 = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, self.bias * 2)
        return F.linear(x.mean((2, 3)), self.matrix, self.bias2.exp())


class Unused(nn.Module):
    """Layers that no one calls, or calls for nothing. Input (batch, 6), output (batch, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.never, self.thrown_away = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 5:
            x = self.never(x)
        self.thrown_away(x)
        return self.used(x)


class Counting(nn.Module):
    """A buffer that forward writes. Input (batch, 6), output (batch, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.linear(x) if x.shape[1] % 2 == 0 else x
        self.last.copy_(y.detach().mean(0))
        return y


class Nested(nn.Module):
    """Outputs in containers in containers. Input (batch, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = [self.linear(part) for part in (x, 2 * x) if part.shape[1] > 3]
        record = Prediction(logits=y[0], features=x + 1)
        return {"pair": (y[0], [y[1], {"x": x * 3}]), "none": None, "record": record, "number": 3}


class FixedBatch(nn.Module):
    """Written for a batch of 2. Input (2, 6), output (2, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.linear(row) for row in x.unbind(0)]) + torch.ones(2, 4)


Kwargs = dict[str, Tensor]


@dataclass(frozen=True)
class Exported:
    """A network and what is known of it.

    Attributes:
        factory: makes it.
        inputs: shapes of its inputs, by position; a dtype of long means numbers from 1 to 39.
        layers: every convolution and linear layer that a capture must see, under these names.
        keywords: names of inputs that are given by keyword.
    """

    factory: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[tuple[Tensor, ...], Kwargs]]
    layers: frozenset[str]


def _normal(*shape: int) -> Callable[[int], tuple[tuple[Tensor, ...], Kwargs]]:
    return lambda batch: ((torch.randn(batch, *shape, generator=_generator()),), {})


def _tokens(batch: int) -> tuple[tuple[Tensor, ...], Kwargs]:
    return (torch.randint(1, 40, (batch, 8), generator=_generator()),), {}


def _bert(batch: int) -> tuple[tuple[Tensor, ...], Kwargs]:
    (tokens,), _ = _tokens(batch)
    mask = torch.ones(batch, 8, dtype=torch.long)
    mask[-1, 5:] = 0
    return (), {"attention_mask": mask, "input_ids": tokens}


def _seq2seq(batch: int) -> tuple[tuple[Tensor, ...], Kwargs]:
    generator = _generator()
    padding = torch.zeros(batch, 6, dtype=torch.bool)
    padding[-1, 4:] = True
    source, target = (torch.randn(batch, length, 16, generator=generator) for length in (6, 5))
    return (source, target), {"padding": padding}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


_ATTENTION = tuple(f"{part}_proj" for part in ("q", "k", "v", "out"))
_SEQ2SEQ = (
    *(f"encoder.layers.0.{part}" for part in ("linear1", "linear2", *(f"self_attn.{p}" for p in _ATTENTION))),
    *(f"decoder.layers.0.{part}" for part in ("linear1", "linear2", *(f"self_attn.{p}" for p in _ATTENTION))),
    *(f"decoder.layers.0.multihead_attn.{part}" for part in _ATTENTION),
)
_BERT = (
    *("embedding", "position", "intermediate", "output", "classifier"),
    *(f"attention.{part}" for part in ("query", "key", "value", "output")),
)


def _exported(factory: Callable[[], nn.Module], inputs: Any, *layers: str) -> Exported:
    return Exported(factory, inputs, frozenset(layers))


EXPORTED: dict[str, Exported] = {
    "bert": _exported(Bert, _bert, *_BERT),
    "gpt": _exported(GPT, _tokens, "wte", "c_attn", "c_proj", "lm_head"),
    "seq2seq": _exported(Seq2Seq, _seq2seq, *_SEQ2SEQ),
    "swin": _exported(Swin, _normal(5, 16), "qk", "proj", "head"),
    "reparametrized": _exported(Reparametrized, _normal(3, 9, 9), "first", "second", "last"),
    "shape_dependent": _exported(ShapeDependent, _normal(3, 7, 9), "conv", "head"),
    "regularized": _exported(Regularized, _normal(3, 8, 8), "conv1", "conv2", "head"),
    "drop_residual": _exported(DropResidual, _normal(6), "linear", "head"),
    "stochastic_depth": _exported(StochasticDepth, _normal(6), "linear"),
    "recurrent": _exported(Recurrent, _normal(5, 6), "head"),
    "guarded": _exported(Guarded, _normal(6), "features", "middle", "head"),
    "both_ways": _exported(BothWays, _normal(5, 12), "weight", "head"),
    "two_strides": _exported(TwoStrides, _normal(3, 9, 9), "conv", "conv_1"),
    "computed_bias": _exported(ComputedBias, _normal(3, 6, 6), "matrix"),
    "unused": _exported(Unused, _normal(6), "used", "thrown_away"),
    "counting": _exported(Counting, _normal(6), "linear"),
    "nested": _exported(Nested, _normal(6), "linear"),
    "fixed_batch": _exported(FixedBatch, _normal(6), "linear"),
}
"""Networks by name; all but ``two_strides`` and ``computed_bias`` are exported."""


def build(name: str, batch: int = 2, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...], Kwargs]:
    """The network in eval mode and example inputs; the same for the same seed, whatever was drawn before.

    Two runs in train mode move BatchNorm's statistics off 0 and 1, where a forgotten statistic would not show.
    """
    entry = EXPORTED[name]
    args, kwargs = entry.inputs(2)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        network = entry.factory().train()
        for _ in range(2):
            network(*args, **kwargs)
    return network.eval(), *entry.inputs(batch)
