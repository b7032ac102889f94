"""Shapes and options of layers, and the sites where a network can be compressed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from tdfx.records.cost import Workload

Shape = tuple[int, ...]
Rank = tuple[int, ...]
Kind = Literal[
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "embedding", "embeddingbag",
]  # fmt: skip
Fused = Literal["", "relu", "add", "add_relu"]
"""What a runtime computes in one operator with the layer before it: adding a tensor of its output's shape, a ReLU."""

ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Call:
    """Shapes of one call of a layer: input (batch, channels, ...) or (..., features), and output."""

    input_shape: Shape
    output_shape: Shape


@dataclass(frozen=True)
class Lookup:
    """Options of an Embedding or EmbeddingBag, as in torch.

    Attributes:
        padding_idx: row that is not trained, and that bags leave out; None for no such row.
        scale_grad_by_freq: whether gradients are divided by how often a row occurs in a batch.
        sparse: whether gradients are sparse.
        mode: "sum" or "mean" of a bag's rows; "" for an Embedding.
        include_last_offset: whether the offsets of bags end with that of the end.
    """

    padding_idx: int | None = None
    scale_grad_by_freq: bool = False
    sparse: bool = False
    mode: str = ""
    include_last_offset: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """Shapes and options of one Linear, convolution or embedding layer, without its weights.

    An embedding counts as a linear layer of one-hot inputs: rows of its table are input channels, and its weight is the
    table transposed.

    Attributes:
        name: qualified name in the model, e.g. ``layer1.0.conv1``.
        kind: "linear", "conv1d" to "conv3d", "conv_transpose1d" to "conv_transpose3d", "embedding" or "embeddingbag".
        in_channels: input channels or features.
        out_channels: output channels or features.
        kernel_size: one entry per spatial dimension; empty for linear, as are stride, dilation.
        stride: as in torch.
        padding: numbers per spatial dimension, or "same" / "valid".
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        dilation: as in torch.
        groups: as in torch.
        bias: whether the layer adds a bias.
        dtype: name of the weight's dtype, e.g. "float32".
        calls: shapes of every call in one run on the example inputs; of an embedding that of the indices, and output.
        output_padding: of a transposed convolution, as in torch; empty for others.
        lookup: options of an embedding; None for other kinds.
        tied: whether its weight is that of an earlier layer of its site, and counts there.
    """

    name: str
    kind: Kind
    in_channels: int
    out_channels: int
    kernel_size: Shape = ()
    stride: Shape = ()
    padding: Shape | str = ()
    padding_mode: str = "zeros"
    dilation: Shape = ()
    groups: int = 1
    bias: bool = False
    dtype: str = "float32"
    calls: tuple[Call, ...] = ()
    output_padding: Shape = ()
    lookup: Lookup | None = None
    tied: bool = False

    @property
    def is_transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return self.kind.startswith("conv_transpose")

    @property
    def weight_shape(self) -> Shape:
        """(out, in / groups, *kernel); of an embedding (out, rows); for torch's own layout see ``parameter_shape``."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def parameter_shape(self) -> Shape:
        """As torch and ONNX hold it: (rows, out) of an embedding, (in, out / groups, *kernel) of a transposed one."""
        if not self.is_transposed and self.lookup is None:
            return self.weight_shape
        return (self.in_channels, self.out_channels // self.groups, *self.kernel_size)

    @property
    def params(self) -> int:
        """Elements of weight and bias."""
        return (0 if self.tied else math.prod(self.weight_shape)) + (self.out_channels if self.bias else 0)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weight and bias."""
        return self.params * ITEMSIZE[self.dtype]

    @property
    def workloads(self) -> tuple[Workload, ...]:
        """One per call; a lookup multiplies nothing, and reads no more than it writes."""
        return tuple(
            Workload(
                positions=self._positions(call),
                in_channels=self.in_channels if self.lookup is None else 0,
                out_channels=self.out_channels,
                kernel=math.prod(self.kernel_size),
                groups=self.groups,
                inputs=math.prod(call.input_shape),
                itemsize=ITEMSIZE[self.dtype],
                conv=self.kind in ("conv2d", "conv_transpose2d"),
                scattered=math.prod(call.output_shape) if self.is_transposed else 0,
            )
            for call in self.calls
        )

    def _positions(self, call: Call) -> int:
        """How often the kernel is placed: at every output position, or at every input position where transposed."""
        if self.is_transposed:
            return math.prod(call.input_shape) // self.in_channels
        return math.prod(call.output_shape) // self.out_channels

    @property
    def macs(self) -> int:
        """Multiply-accumulates over all calls."""
        return sum(workload.macs for workload in self.workloads)

    def called_on(self, shapes: tuple[Shape, ...]) -> LayerSpec:
        """The same layer with the calls that inputs of these shapes make."""
        return replace(self, calls=tuple(Call(shape, self.output_shape(shape)) for shape in shapes))

    def output_shape(self, input_shape: Shape) -> Shape:
        """Output shape for an input shape (formulas of torch.nn.Conv2d, ConvTranspose2d; batched or unbatched).

        Bags are taken for such without offsets.
        """
        if self.lookup is not None:
            return (*(input_shape[:1] if self.lookup.mode else input_shape), self.out_channels)
        if self.kind == "linear":
            return (*input_shape[:-1], self.out_channels)
        dims = len(self.kernel_size)
        lead, spatial = input_shape[: -dims - 1], input_shape[-dims:]
        if self.padding == "same":
            return (*lead, self.out_channels, *spatial)
        padding = (0,) * dims if isinstance(self.padding, str) else self.padding
        options = zip(spatial, padding, self.dilation, self.kernel_size, self.stride, strict=True)
        if self.is_transposed:
            sizes = ((size - 1) * s - 2 * p + d * (k - 1) + 1 for size, p, d, k, s in options)
            return (*lead, self.out_channels, *map(sum, zip(sizes, self.output_padding, strict=True)))
        sizes = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, p, d, k, s in options)
        return (*lead, self.out_channels, *sizes)


@dataclass(frozen=True)
class Site:
    """One place to compress: usually one layer, or several that share one weight.

    The weight of a Linear layer that shares it with an embedding is the embedding's transposed.

    Attributes:
        name: the (first) layer's qualified name; unique in a plan.
        layers: the layers that are replaced together.
        kind: the first layer's kind.
    """

    name: str
    layers: tuple[LayerSpec, ...]
    kind: Kind

    @classmethod
    def of(cls, layer: LayerSpec) -> Site:
        """The site of a single layer."""
        return cls(layer.name, (layer,), layer.kind)

    @property
    def layer(self) -> LayerSpec:
        """The only layer, or the first of those that share its weight."""
        return self.layers[0]

    @property
    def can_gain_bias(self) -> bool:
        """Whether a bias may be corrected: not of an embedding, and not where layers share more than that."""
        return len(self.layers) == 1 and self.layer.lookup is None

    def is_turned(self, layer: LayerSpec) -> bool:
        """Whether a layer's weight is the first one's transposed."""
        return (layer.lookup is None) != (self.layer.lookup is None)


@dataclass(frozen=True)
class Skipped:
    """A layer that is left as it is, and why (a sentence for the user)."""

    layer: str
    reason: str
