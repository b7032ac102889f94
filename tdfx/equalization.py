"""Channels between linear operators brought to alike ranges, in an ONNX model, without changing what it computes.

Where nothing but a tensor T lies between two linear operators, T's channels may be divided by any s > 0 in the first
and multiplied by it in the second (Nagel et al. 2019, "Data-free quantization through weight equalization and bias
correction", section 4.1). One scale for all of T then serves every channel. The first operator's weight has a scale
for each of its output channels, so its range does not count, and s weighs the range of T's channel against that of the
second weight's columns (Xiao et al. 2023, "SmoothQuant", equation 4); where those have scales of their own too, as in
a depthwise convolution, T alone counts. Chains of factors are made of such pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from tdfx.timing import open_session

SMOOTHNESS = 0.75  # 1 looks at the tensor's range alone, 0 at the weight's; measured on factorized ResNets

Feed = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Pair:
    """Two linear operators with only a tensor between them.

    Attributes:
        tensor: its name.
        rank: its number of dimensions if its channels are dimension 1, None if they are the last.
        divided: initializers of the first operator with the axis of its output channels.
        multiplied: the second operator's weight with the axis of its input channels.
        depthwise: whether that axis is the one of its output channels too.
    """

    tensor: str
    rank: int | None
    divided: tuple[tuple[str, int], ...]
    multiplied: tuple[str, int]
    depthwise: bool


def pairs(model: ModelProto) -> list[Pair]:
    """All pairs in a model, in the order of its nodes."""
    shapes = {value.name: tuple(value.dims) for value in model.graph.initializer}
    readers: dict[str, list[NodeProto]] = {value.name: [NodeProto()] for value in model.graph.output}
    for node in _nodes(model.graph):
        for name in node.input:
            readers.setdefault(name, []).append(node)
    # A weight that is read elsewhere too must stay as it is.
    own = {name: shape for name, shape in shapes.items() if len(readers.get(name, ())) == 1}
    found = []
    for first in model.graph.node:
        users = readers.get(first.output[0], []) if first.output else []
        if len(users) == 1 and users[0].input and users[0].input[0] == first.output[0]:
            pair = _pair(first, users[0], own)
            found += [pair] if pair is not None else []
    return found


def channel_ranges(
    model: ModelProto, tensors: Sequence[Pair], feeds: Iterable[Feed], scratch: Path, *, external: bool = False
) -> list[NDArray[np.float64]]:
    """Largest magnitudes of each pair's tensor, by channel, over all feeds.

    Args:
        model: the model.
        tensors: the pairs.
        feeds: inputs by name, read to their end.
        scratch: a file to write to.
        external: whether the model is too large for one file.
    """
    watched = ModelProto()
    watched.CopyFrom(model)
    for index, pair in enumerate(tensors):
        _watch(watched, pair, f"tdfx_range_{index}")
    onnx.save_model(watched, scratch, save_as_external_data=external, location=f"{scratch.name}.data")
    session = open_session(scratch)
    names = [f"tdfx_range_{index}" for index in range(len(tensors))]
    largest = [np.zeros(1) for _ in names]
    for feed in feeds:
        found = session.run(names, feed) if names else []
        largest = [np.maximum(old, new) for old, new in zip(largest, found, strict=True)]
    return largest


def equalize(model: ModelProto, tensors: Sequence[Pair], ranges: Sequence[NDArray[np.float64]]) -> None:
    """Rescales the model's weights in place, so that the channels of every pair's tensor have alike ranges."""
    held = {value.name: value for value in model.graph.initializer}

    def scale(name: str, axis: int, factors: NDArray[np.float64]) -> None:
        values = numpy_helper.to_array(held[name])
        shape = [-1 if dim == axis else 1 for dim in range(values.ndim)]
        held[name].CopyFrom(numpy_helper.from_array((values * factors.reshape(shape)).astype(values.dtype), name))

    for pair, channels in zip(tensors, ranges, strict=True):
        name, axis = pair.multiplied
        weight = np.abs(np.moveaxis(numpy_helper.to_array(held[name]), axis, 0)).reshape(len(channels), -1).max(1)
        factors = _factors(channels, weight, 1.0 if pair.depthwise else SMOOTHNESS)
        for part, out_axis in pair.divided:
            scale(part, out_axis, 1 / factors)
        scale(name, axis, factors)


def _factors(channels: NDArray[np.float64], weight: NDArray[Any], smoothness: float) -> NDArray[np.float64]:
    """What each channel is divided by; 1 where it is always zero or not read."""
    factors = np.ones(len(channels))
    used = (channels > 0) & (weight > 0)
    exponents = smoothness * np.log2(channels[used]) - (1 - smoothness) * np.log2(weight[used])
    if used.any():
        factors[used] = np.exp2(exponents - exponents.mean())
    return factors


def _nodes(graph: onnx.GraphProto) -> Iterator[NodeProto]:
    """Nodes, those of branches and loop bodies too, which read what is around them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _nodes(inner)
                yield NodeProto(input=[value.name for value in inner.output])


def _pair(first: NodeProto, second: NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> Pair | None:
    if (first.op_type == "Conv") != (second.op_type == "Conv"):
        return None
    producer, consumer = _axes(first, shapes), _axes(second, shapes)
    if producer is None or consumer is None:
        return None
    out_axis, in_axis = consumer
    if in_axis is None:
        return None
    divided = [(first.input[1], producer[0])]
    if len(first.input) > 2 and first.input[2]:
        if len(shapes.get(first.input[2], ())) != 1:
            return None
        divided.append((first.input[2], 0))
    rank = len(shapes[first.input[1]]) if first.op_type == "Conv" else None
    return Pair(first.output[0], rank, tuple(divided), (second.input[1], in_axis), depthwise=out_axis == in_axis)


def _axes(node: NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int | None] | None:
    """Axes of output and input channels in a linear operator's weight; None where it has no such axis."""
    shape = shapes.get(node.input[1]) if len(node.input) > 1 else None
    if shape is None or node.domain not in ("", "ai.onnx"):
        return None
    options = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "Conv":
        groups = options.get("group", 1)
        return 0, 1 if groups == 1 else 0 if shape[:2] == (groups, 1) else None
    if node.op_type == "MatMul" and len(shape) == 2:
        return 1, 0
    if node.op_type == "Gemm" and not options.get("transA", 0):
        return (0, 1) if options.get("transB", 0) else (1, 0)
    return None


def _watch(model: ModelProto, pair: Pair, name: str) -> None:
    """Makes the largest magnitudes by channel an output of the model."""
    graph = model.graph
    flat, axes = (pair.tensor, [0, *range(2, pair.rank)]) if pair.rank else (f"{name}_rows", [0])
    if not pair.rank:
        shape, axis = pair.divided[0]
        channels = next(value.dims[axis] for value in graph.initializer if value.name == shape)
        graph.initializer.append(numpy_helper.from_array(np.array([-1, channels]), f"{name}_shape"))
        graph.node.append(helper.make_node("Reshape", [pair.tensor, f"{name}_shape"], [flat]))
    graph.initializer.append(numpy_helper.from_array(np.array(axes), f"{name}_axes"))
    graph.node.append(helper.make_node("Abs", [flat], [f"{name}_abs"]))
    graph.node.append(helper.make_node("ReduceMax", [f"{name}_abs", f"{name}_axes"], [name], keepdims=0))
    graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
