"""Models that are timed, against the layers they stand for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from tdfx.decompositions import method_for, registry
from tdfx.decompositions.chain import build_layer
from tdfx.latency.micro_model import WEIGHT, Piece
from tdfx.records.layer import Call, Fused, LayerSpec, Site

CONV = LayerSpec("conv", "conv2d", 6, 8, (3, 3), (1, 1), (1, 1), dilation=(1, 1), bias=True).called_on(((2, 6, 9, 7),))
UP = replace(
    CONV, kind="conv_transpose2d", kernel_size=(3, 4), stride=(3, 2), padding=(2, 1), output_padding=(2, 0)
).called_on(((2, 6, 5, 4),))
LINEAR = LayerSpec("linear", "linear", 6, 8, bias=True)

LAYERS = {
    "conv": CONV,
    "stride": replace(CONV, stride=(2, 1)).called_on(((2, 6, 9, 7),)),
    "uneven": replace(CONV, kernel_size=(5, 1), padding=(2, 0), dilation=(1, 2)).called_on(((2, 6, 9, 7),)),
    "depthwise": replace(CONV, out_channels=6, groups=6).called_on(((2, 6, 9, 7),)),
    "grouped": replace(CONV, groups=2, padding_mode="reflect").called_on(((2, 6, 9, 7),)),
    "same": replace(CONV, kernel_size=(4, 3), padding="same", dilation=(1, 2)).called_on(((2, 6, 9, 7),)),
    "valid": replace(CONV, padding="valid").called_on(((2, 6, 9, 7),)),
    "reflect": replace(CONV, padding_mode="reflect").called_on(((2, 6, 9, 7),)),
    "replicate": replace(CONV, padding_mode="replicate", padding=(2, 1)).called_on(((2, 6, 9, 7),)),
    "circular": replace(CONV, padding_mode="circular").called_on(((2, 6, 9, 7),)),
    "conv1d": LayerSpec("c", "conv1d", 6, 8, (3,), (2,), (1,), dilation=(1,)).called_on(((2, 6, 9),)),
    "conv3d": LayerSpec("c", "conv3d", 6, 8, (3, 1, 2), (1, 2, 1), (1, 0, 0), dilation=(1, 1, 1)).called_on(
        ((2, 6, 5, 4, 3),)
    ),
    "transposed": UP,
    "transposed in groups": replace(UP, groups=2, dilation=(2, 1), bias=False).called_on(((2, 6, 5, 4),)),
    "transposed 1d": LayerSpec(
        "t", "conv_transpose1d", 6, 8, (4,), (2,), (1,), dilation=(1,), output_padding=(0,)
    ).called_on(((2, 6, 5),)),
    "transposed 3d": LayerSpec(
        "t", "conv_transpose3d", 6, 8, (2, 3, 1), (2, 1, 2), (0, 1, 0), dilation=(1, 1, 1), output_padding=(0, 0, 1)
    ).called_on(((2, 6, 3, 4, 2),)),
    "no bias": replace(CONV, bias=False),
    "rows without bias": replace(LINEAR, bias=False).called_on(((4, 6),)),
    "sequence without bias": replace(LINEAR, bias=False).called_on(((2, 5, 6),)),
    "rows": LINEAR.called_on(((4, 6),)),
    "sequence": LINEAR.called_on(((2, 5, 6),)),
}


def run(piece: Piece) -> tuple[list[np.ndarray], Tensor]:
    """Inputs drawn for a model, and its output."""
    model = piece.model()
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feed = {value.name: rng.standard_normal(value.shape).astype(np.float32) for value in session.get_inputs()}
    (output,) = session.run(None, feed)
    return list(feed.values()), torch.from_numpy(output)


def reference(layers: tuple[LayerSpec, ...], value: Tensor) -> Tensor:
    """The layers in torch, all weights and biases alike."""
    with torch.no_grad():
        for layer in layers:
            bias = torch.full((layer.out_channels,), WEIGHT) if layer.bias else None
            value = build_layer(layer, torch.full(layer.weight_shape, WEIGHT), bias)(value)
    return value


def kinds(piece: Piece) -> list[str]:
    """Operators of a model, those that make weights left out."""
    nodes = onnx.load_from_string(piece.model()).graph.node
    return [node.op_type for node in nodes if node.op_type != "ConstantOfShape"]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", LAYERS)
def test_it_computes_the_layer(name: str) -> None:
    layer = LAYERS[name]
    (x,), found = run(Piece((layer,), 0, ""))
    assert tuple(x.shape) == layer.calls[0].input_shape
    torch.testing.assert_close(found, reference((layer,), torch.from_numpy(x)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", registry())
def test_it_computes_every_chain(method: str) -> None:
    layer = LINEAR.called_on(((4, 6),)) if method == "svd" else CONV
    site, decomposition = Site.of(layer), registry()[method]
    chain = decomposition.chain(site, decomposition.clamp(site, (2,) * len(decomposition.full_rank(site))))
    (x,), found = run(Piece(chain, 0, ""))
    torch.testing.assert_close(found, reference(chain, torch.from_numpy(x)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["channel_svd", "spatial_svd", "tucker2", "tt", "cp", "cp4"])
def test_it_computes_every_chain_in_groups(name: str) -> None:
    site = Site.of(replace(CONV, groups=2, padding_mode="circular").called_on(((2, 6, 9, 7),)))
    method = method_for(site, name)
    chain = method.chain(site, method.clamp(site, (2,) * len(method.full_rank(site))))
    assert all(layer.groups % 2 == 0 for layer in chain)
    (x,), found = run(Piece(chain, 0, ""))
    torch.testing.assert_close(found, reference(chain, torch.from_numpy(x)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["channel_svd", "spatial_svd", "tucker2", "tt", "cp", "cp4"])
def test_it_computes_every_transposed_chain(name: str) -> None:
    site = Site.of(UP)
    chain = registry()[name].chain(site, registry()[name].clamp(site, (2,) * len(registry()[name].full_rank(site))))
    (x,), found = run(Piece(chain, 0, ""))
    torch.testing.assert_close(found, reference(chain, torch.from_numpy(x)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fused", ["relu", "add", "add_relu"])
@pytest.mark.parametrize("name", ["conv", "conv1d", "sequence"])
def test_what_follows_is_computed(name: str, fused: Fused) -> None:
    layer = LAYERS[name]
    arrays, found = run(Piece((layer,), 0, fused))
    wanted = reference((layer,), torch.from_numpy(arrays[0]))
    if "add" in fused:
        wanted = wanted + torch.from_numpy(arrays[1])
    torch.testing.assert_close(found, wanted.relu() if "relu" in fused else wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["conv", "conv1d", "conv3d", "reflect"])
@pytest.mark.parametrize("fused", ["", "add_relu"])
def test_an_image_without_a_batch_is_a_batch_of_one(name: str, fused: Fused) -> None:
    layer = LAYERS[name]
    alone = layer.called_on((layer.calls[0].input_shape[1:],))
    arrays, found = run(Piece((alone,), 0, fused))
    assert arrays[0].shape == (1, *alone.calls[0].input_shape)
    wanted = reference((layer,), torch.from_numpy(arrays[0]))
    if fused:
        wanted = (wanted + torch.from_numpy(arrays[1])).relu()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_only_the_last_of_a_chain_has_a_bias(bias: bool) -> None:
    layer = replace(LINEAR, bias=bias).called_on(((2, 5, 6),))
    chain = registry()["svd"].chain(Site.of(layer), (2,))
    assert kinds(Piece(chain, 0, "")) == ["MatMul", "MatMul", *(["Add"] if bias else [])]


def test_weights_take_no_room() -> None:
    big = replace(CONV, in_channels=512, out_channels=512).called_on(((1, 512, 7, 7),))
    assert len(Piece((big,), 0, "add_relu").model()) < 1000


def test_the_runtime_folds_the_weights(tmp_path: object) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = f"{tmp_path}/optimized.onnx"
    options.log_severity_level = 4
    ort.InferenceSession(Piece((CONV,), 0, "relu").model(), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    assert "ConstantOfShape" not in kinds and "Relu" not in kinds and len(kinds) <= 3


def test_an_addition_is_fused(tmp_path: object) -> None:
    layer = replace(CONV, in_channels=32, out_channels=32).called_on(((1, 32, 8, 8),))
    options = ort.SessionOptions()
    options.optimized_model_filepath = f"{tmp_path}/optimized.onnx"
    options.log_severity_level = 4
    ort.InferenceSession(Piece((layer,), 0, "add_relu").model(), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    assert "Add" not in kinds and "Relu" not in kinds


def test_keys_tell_models_apart_and_names_do_not() -> None:
    two = replace(CONV, calls=(CONV.calls[0], Call((1, 6, 4, 4), (1, 8, 4, 4))))
    pieces = [
        Piece((CONV,), 0, ""), Piece((CONV,), 0, "relu"), Piece((two,), 1, ""), Piece((CONV, LAYERS["valid"]), 0, ""),
        *(Piece((layer,), 0, "") for name, layer in LAYERS.items() if name != "conv"),
    ]  # fmt: skip
    assert len({piece.key for piece in pieces}) == len({piece.model() for piece in pieces}) == len(pieces)
    alike = Piece((replace(two, name="other"),), 0, "")
    assert (alike.key, alike.model()) == (pieces[0].key, pieces[0].model())


def test_each_call_has_its_shapes() -> None:
    two = LINEAR.called_on(((4, 6), (3, 6)))
    assert [run(Piece((two,), call, ""))[0][0].shape for call in (0, 1)] == [(4, 6), (3, 6)]


@pytest.mark.parametrize(("layer", "nodes"), [(CONV, 1), (LINEAR.called_on(((2, 5, 7, 6),)), 0)])
def test_only_what_is_added_to_an_image_comes_from_an_operator(layer: LayerSpec, nodes: int) -> None:
    graph = onnx.load_from_string(Piece((layer,), 0, "add").model()).graph
    assert [node.op_type for node in graph.node].count("MaxPool") == nodes
