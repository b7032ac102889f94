"""ONNX models of one layer, or of the chain that takes its place, with the operators that the runtime fuses with it.

Weights are made by ``ConstantOfShape``, which ONNX Runtime folds when it loads a model: files of a few hundred bytes
that run as any other. The value is no zero and no denormal number, so that times are those of real weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tdfx.records.layer import Call, Fused, LayerSpec, Shape

OPSET, IR_VERSION = 18, 8  # runtimes of some years ago take them
WEIGHT = 0.01
TYPES = {"float32": TensorProto.FLOAT}


@dataclass(frozen=True)
class Piece:
    """Layers called one after the other, once.

    Attributes:
        layers: first to last; names do not matter.
        call: index of the call whose shapes are meant.
        fused: what follows the last.
    """

    layers: tuple[LayerSpec, ...]
    call: int
    fused: Fused

    @property
    def key(self) -> str:
        """The same for all pieces whose models are the same."""
        calls = [(layer.calls[self.call],) for layer in self.layers]
        alike = [
            asdict(replace(layer, name="", calls=call, tied=False))
            for layer, call in zip(self.layers, calls, strict=True)
        ]
        return hashlib.sha256(json.dumps([alike, self.fused, OPSET]).encode()).hexdigest()[:24]

    @property
    def weight_bytes(self) -> int:
        """Memory that its weights take once they are made."""
        return sum(replace(layer, tied=False).weight_bytes for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulates over all calls of its layers."""
        return sum(layer.macs for layer in self.layers)

    def model(self) -> bytes:
        """The ONNX model, serialized. An image without a batch dimension gets one of 1."""
        return _Builder(TYPES[self.layers[0].dtype]).build(self)


class _Builder:
    """Nodes and shapes of one graph, as they are added."""

    def __init__(self, dtype: int) -> None:
        self.dtype = dtype
        self.nodes: list[onnx.NodeProto] = []
        self.shapes: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []

    def build(self, piece: Piece) -> bytes:
        first, last = piece.layers[0], piece.layers[-1]
        kind = self.dtype if first.lookup is None else TensorProto.INT64
        value = self.input("x", _batched(first, first.calls[piece.call].input_shape), kind)
        for layer in piece.layers:
            value = self.layer(layer, value, layer.calls[piece.call])
        output_shape = _batched(last, last.calls[piece.call].output_shape)
        if piece.fused.startswith("add"):
            value = self.node("Add", [value, self.addend(output_shape, is_image=bool(last.kernel_size))])
        if piece.fused.endswith("relu"):
            value = self.node("Relu", [value])
        output = helper.make_tensor_value_info(value, self.dtype, output_shape)
        graph = helper.make_graph(self.nodes, "piece", self.inputs, [output], self.shapes)
        imports = [helper.make_opsetid("", OPSET)]
        serialized: bytes = helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION).SerializeToString()
        return serialized

    def input(self, name: str, shape: Shape, dtype: int) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def layer(self, layer: LayerSpec, value: str, call: Call) -> str:
        if layer.lookup is not None:
            return self.lookup(layer, value, call)
        if layer.kind == "linear":
            return self.linear(layer, value, len(call.input_shape))
        return self.convolution(layer, value)

    def lookup(self, layer: LayerSpec, value: str, call: Call) -> str:
        """Rows of a table; of bags the sum or mean, bags of offsets as if all were equally long."""
        rows = self.node("Gather", [self.constant(layer.weight_shape[::-1]), value])
        if layer.lookup is None or not layer.lookup.mode:
            return rows
        if len(call.input_shape) == 1:
            bags = math.prod(call.output_shape[:-1])
            longest = -(-call.input_shape[0] // bags)
            padding = self.integers([0, 0, bags * longest - call.input_shape[0], 0])
            rows = self.node(
                "Reshape", [self.node("Pad", [rows, padding]), self.integers([bags, longest, layer.out_channels])]
            )
        kind = "ReduceMean" if layer.lookup.mode == "mean" else "ReduceSum"
        return self.node(kind, [rows, self.integers([1])], keepdims=0)

    def node(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        output = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def integers(self, values: Sequence[int]) -> str:
        name = f"s{len(self.shapes)}"
        self.shapes.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def constant(self, shape: Shape) -> str:
        value = helper.make_tensor("value", self.dtype, [1], [WEIGHT])
        return self.node("ConstantOfShape", [self.integers(shape)], value=value)

    def addend(self, shape: Shape, *, is_image: bool) -> str:
        """A second input; of an image, through an operator that leaves it in the layout in which convolutions add."""
        second = self.input("y", shape, self.dtype)
        return self.node("MaxPool", [second], kernel_shape=[1, 1]) if is_image and len(shape) == 4 else second

    def linear(self, layer: LayerSpec, value: str, dims: int) -> str:
        if dims == 2:
            return self.node("Gemm", [value, self.constant(layer.weight_shape), *self.bias(layer)], transB=1)
        product = self.node("MatMul", [value, self.constant((layer.in_channels, layer.out_channels))])
        return self.node("Add", [product, *self.bias(layer)]) if layer.bias else product

    def bias(self, layer: LayerSpec) -> list[str]:
        return [self.constant((layer.out_channels,))] if layer.bias else []

    def convolution(self, layer: LayerSpec, value: str) -> str:
        pads = _pads(layer)
        if layer.padding_mode != "zeros" and any(pads):
            lead = [0, 0]
            half = len(pads) // 2
            amounts = self.integers([*lead, *pads[:half], *lead, *pads[half:]])
            mode = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}[layer.padding_mode]
            value, pads = self.node("Pad", [value, amounts], mode=mode), [0] * len(pads)
        more = {"output_padding": layer.output_padding} if layer.is_transposed else {}
        return self.node(
            "ConvTranspose" if layer.is_transposed else "Conv",
            [value, self.constant(layer.parameter_shape), *self.bias(layer)],
            kernel_shape=layer.kernel_size,
            strides=layer.stride,
            dilations=layer.dilation,
            pads=pads,
            group=layer.groups,
            **more,
        )


def _batched(layer: LayerSpec, shape: Shape) -> Shape:
    """The shape with the batch dimension that torch lets convolutions go without."""
    return (1, *shape) if layer.kernel_size and len(shape) == len(layer.kernel_size) + 1 else shape


def _pads(layer: LayerSpec) -> list[int]:
    """Zeros before every dimension, then after every one; "same" puts an odd one after."""
    if layer.padding == "valid":
        return [0] * 2 * len(layer.kernel_size)
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [t // 2 for t in total] + [math.ceil(t / 2) for t in total]
    assert not isinstance(layer.padding, str)
    return [*layer.padding, *layer.padding]
