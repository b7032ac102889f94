"""Channels get alike ranges where only a tensor lies between linear operators, and outputs stay what they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from tdfx.equalization import channel_ranges, equalize, pairs

FLOAT = TensorProto.FLOAT


def array(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def spread(count: int) -> NDArray[np.float32]:
    """Factors over six orders of magnitude."""
    return np.logspace(-3, 3, count, dtype=np.float32)


def model(
    nodes: Sequence[NodeProto], weights: dict[str, NDArray[Any]], rank: int, outputs: Sequence[str] = ("y",)
) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", FLOAT, [None] * rank)],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def conv_chain() -> ModelProto:
    """1x1, depthwise 3x3, 1x1, as CP makes them; the inner channels differ much in range."""
    scale = spread(8)[:, None, None, None]
    return model(
        [
            helper.make_node("Conv", ["x", "a", "bias"], ["t"]),
            helper.make_node("Conv", ["t", "b"], ["u"], group=8),
            helper.make_node("Conv", ["u", "c"], ["y"]),
        ],
        {
            "a": array(8, 3, 1, 1) * scale,
            "bias": array(8) * spread(8),
            "b": array(8, 1, 3, 3, seed=1),
            "c": array(5, 8, 1, 1, seed=2) / scale.swapaxes(0, 1),
        },
        4,
    )


def gemm_chain() -> ModelProto:
    return model(
        [
            helper.make_node("Gemm", ["x", "a", "bias"], ["t"], transB=1),
            helper.make_node("Gemm", ["t", "b"], ["u"]),
            helper.make_node("Gemm", ["u", "c"], ["y"], transB=1),
        ],
        {
            "a": array(6, 3) * spread(6)[:, None],
            "bias": array(6) * spread(6),
            "b": array(6, 4) / spread(6)[:, None] * spread(4),
            "c": array(5, 4) / spread(4),
        },
        2,
    )


def matmul_chain() -> ModelProto:
    return model(
        [helper.make_node("MatMul", ["x", "a"], ["t"]), helper.make_node("MatMul", ["t", "b"], ["y"])],
        {"a": array(3, 6) * spread(6), "b": array(6, 5) / spread(6)[:, None]},
        3,
    )


def run(proto: ModelProto, x: NDArray[Any], *names: str) -> list[Any]:
    copy = ModelProto()
    copy.CopyFrom(proto)
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name != "y")
    session = ort.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(list(names), {"x": x}))


CHAINS = [
    (conv_chain, (4, 3, 7, 7), {"t": 1, "u": 1}),
    (gemm_chain, (9, 3), {"t": -1, "u": -1}),
    (matmul_chain, (2, 9, 3), {"t": -1}),
]


@pytest.mark.parametrize(("make", "shape", "tensors"), CHAINS)
def test_ranges_become_alike_and_outputs_stay(
    make: Callable[[], ModelProto], shape: tuple[int, ...], tensors: dict[str, int], tmp_path: Path
) -> None:
    proto, x = make(), array(*shape, seed=5)
    found = pairs(proto)
    assert [pair.tensor for pair in found] == list(tensors)
    (before,) = run(proto, x, "y")
    ranges = channel_ranges(proto, found, [{"x": x[:1]}, {"x": x}], tmp_path / "scratch.onnx")
    for largest, (name, axis) in zip(ranges, tensors.items(), strict=True):
        values = np.moveaxis(np.abs(run(proto, x, name)[0]), axis, 0)
        np.testing.assert_allclose(largest, values.reshape(len(values), -1).max(1), rtol=1e-6, atol=0)
        assert largest.max() / largest.min() > 100
    equalize(proto, found, ranges)
    (after,) = run(proto, x, "y")
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-6 * float(np.abs(before).max()))
    for name, axis in tensors.items():
        values = np.moveaxis(np.abs(run(proto, x, name)[0]), axis, 0)
        largest = values.reshape(len(values), -1).max(1)
        assert largest.max() / largest.min() < 20


def test_before_a_depthwise_convolution_ranges_become_equal(tmp_path: Path) -> None:
    proto, x = conv_chain(), array(4, 3, 7, 7, seed=5)
    found = pairs(proto)
    assert [pair.depthwise for pair in found] == [True, False]
    equalize(proto, found, channel_ranges(proto, found, [{"x": x}], tmp_path / "scratch.onnx"))
    largest = np.abs(run(proto, x, "t")[0]).max((0, 2, 3))
    np.testing.assert_allclose(largest, largest[0], rtol=1e-5, atol=0)


def test_the_largest_of_all_feeds_counts(tmp_path: Path) -> None:
    proto, x = matmul_chain(), array(2, 9, 3)
    together, apart = (
        channel_ranges(proto, pairs(proto), feeds, tmp_path / "scratch.onnx")[0]
        for feeds in ([{"x": x}], [{"x": x[1:]}, {"x": x[:1]}])
    )
    np.testing.assert_allclose(apart, together, rtol=1e-6, atol=0)


@pytest.mark.parametrize("part", ["a", "b"])
def test_channels_that_are_zero_or_not_read_stay(part: str, tmp_path: Path) -> None:
    proto, x = matmul_chain(), array(2, 9, 3)
    (held,) = (value for value in proto.graph.initializer if value.name == part)
    values = numpy_helper.to_array(held).copy()
    values[(slice(None), 2) if part == "a" else 2] = 0
    held.CopyFrom(numpy_helper.from_array(values, part))
    (before,) = run(proto, x, "y")
    found = pairs(proto)
    equalize(proto, found, channel_ranges(proto, found, [{"x": x}], tmp_path / "scratch.onnx"))
    np.testing.assert_allclose(run(proto, x, "y")[0], before, rtol=0, atol=1e-6 * float(np.abs(before).max()))


def test_a_chain_of_zeros_stays(tmp_path: Path) -> None:
    proto = matmul_chain()
    found = pairs(proto)
    equalize(proto, found, channel_ranges(proto, found, [{"x": np.zeros((1, 1, 3), np.float32)}], tmp_path / "s.onnx"))
    assert proto == matmul_chain()


def conv(*inputs: str, to: str, **options: int) -> NodeProto:
    return helper.make_node("Conv", inputs, [to], **options)


A, B = array(4, 3, 1, 1), array(4, 4, 1, 1)
FIRST, LAST = conv("x", "a", to="t"), conv("t", "b", to="y")
BRANCH = helper.make_graph([], "branch", [], [helper.make_tensor_value_info("t", FLOAT, None)])
REFUSED: dict[str, tuple[list[NodeProto], dict[str, NDArray[Any]], tuple[str, ...]]] = {
    "non-linear": ([FIRST, helper.make_node("Relu", ["t"], ["u"]), conv("u", "b", to="y")], {"a": A, "b": B}, ("y",)),
    "read twice": ([FIRST, LAST, helper.make_node("Abs", ["t"], ["z"])], {"a": A, "b": B}, ("y", "z")),
    "an output": ([FIRST, LAST], {"a": A, "b": B}, ("y", "t")),
    "read in a branch": (
        [FIRST, LAST, helper.make_node("If", ["q"], ["z"], then_branch=BRANCH, else_branch=BRANCH)],
        {"a": A, "b": B, "q": np.array(True)},
        ("y", "z"),
    ),
    "first weight shared": ([FIRST, LAST, conv("x", "a", to="z")], {"a": A, "b": B}, ("y", "z")),
    "last weight shared": ([FIRST, LAST, helper.make_node("Abs", ["b"], ["z"])], {"a": A, "b": B}, ("y", "z")),
    "weight computed": ([helper.make_node("Abs", ["c"], ["a"]), FIRST, LAST], {"c": A, "b": B}, ("y",)),
    "bias computed": (
        [helper.make_node("Abs", ["c"], ["d"]), conv("x", "a", "d", to="t"), LAST],
        {"c": array(4), "a": A, "b": B},
        ("y",),
    ),
    "grouped": ([FIRST, conv("t", "b", to="y", group=2)], {"a": A, "b": B[:, :2]}, ("y",)),
    "tensor as the bias": ([FIRST, conv("x", "b", "t", to="y")], {"a": A, "b": B}, ("y",)),
    "a layer between of another kind": (
        [FIRST, helper.make_node("MatMul", ["t", "b"], ["y"])],
        {"a": A, "b": array(4, 4)},
        ("y",),
    ),
    "stacked matrices": (
        [helper.make_node("MatMul", ["x", "a"], ["t"]), helper.make_node("MatMul", ["t", "b"], ["y"])],
        {"a": array(3, 4), "b": array(2, 4, 4)},
        ("y",),
    ),
    "transposed": (
        [helper.make_node("MatMul", ["x", "a"], ["t"]), helper.make_node("Gemm", ["t", "b"], ["y"], transA=1)],
        {"a": array(3, 4), "b": array(4, 4)},
        ("y",),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_tensors_are_left_alone(name: str) -> None:
    nodes, weights, outputs = REFUSED[name]
    assert pairs(model(nodes, weights, 4, outputs)) == []


def test_the_plain_pair_that_those_differ_from_is_found() -> None:
    assert len(pairs(model([FIRST, LAST], {"a": A, "b": B}, 4))) == 1
