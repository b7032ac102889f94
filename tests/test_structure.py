from __future__ import annotations

import copy
import json
import math
import operator
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from tdfx.errors import InputError
from tdfx.passes.base import assemble
from tdfx.passes.capture import LayerTracer
from tdfx.stages.capture import capture
from tdfx.structure import decode_graph, encode_graph, named_tensors, values
from tdfx.structure.functions import attributes, find_function, function_name, methods
from tdfx.structure.modules import decode_layer, encode_layer

aten = torch.ops.aten


class Parts(nn.Module):
    """Raw and tied parameters, buffers in and out of the state dict, nested outputs. Inputs (2, 6) and (2, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block.second = nn.Linear(6, 6)
        self.block.first = nn.Linear(6, 6)
        self.block.first.weight = self.block.second.weight
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.3)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6), requires_grad=False)
        self.register_buffer("shift", torch.linspace(-1, 1, 6))
        self.register_buffer("mask", torch.tensor([0.0, -math.inf] * 3), persistent=False)
        self.lstm = nn.LSTM(6, 4, batch_first=True)

    def forward(self, x: Tensor, other: Tensor) -> dict[str, Any]:
        x = self.dropout(self.norm(self.block.first(x) * self.scale + self.shift))
        x += F.relu(self.block.second(other))
        y = torch.where(self.mask == -math.inf, x, other)[..., 1:5:2].to(torch.float64)
        flat = y.reshape(x.shape[0], -1).max(dim=1).values
        sequence, (hidden, _) = self.lstm(x.unsqueeze(1)), (1, 2)
        return {"a": (x, [flat]), "b": sequence[0] + hidden, "c": torch.zeros(2, dtype=torch.int64, device="cpu")}


INPUTS = (torch.linspace(-1, 1, 12).reshape(2, 6), torch.linspace(1, -2, 12).reshape(2, 6).cos())


def traced(model: nn.Module) -> fx.GraphModule:
    return assemble(model, LayerTracer().trace(model))


@cache
def parts() -> fx.GraphModule:
    """Not to be changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = traced(Parts().eval())
    module.norm.train()
    return module


@cache
def encoded_text() -> str:
    return json.dumps(encode_graph(parts()))


def encoded() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(encoded_text())
    return values


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in named_tensors(module).items()}


def again(module: fx.GraphModule) -> fx.GraphModule:
    return decode_graph(json.loads(json.dumps(encode_graph(module))), tensors(module))


def leaves(module: nn.Module, *inputs: Tensor) -> list[Any]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tree_leaves(module(*(x.clone() for x in inputs)))


def assert_same_outputs(left: nn.Module, right: nn.Module, *inputs: Tensor) -> None:
    for wanted, found in zip(leaves(left, *inputs), leaves(right, *inputs), strict=True):
        assert type(wanted) is type(found)
        assert torch.equal(torch.as_tensor(wanted), torch.as_tensor(found))


def rebuilt() -> fx.GraphModule:
    return decode_graph(encoded(), tensors(parts()))


def test_all_of_a_graph_module_is_rebuilt() -> None:
    module, found = parts(), rebuilt()
    assert_same_outputs(module, found, *INPUTS)
    assert found(*INPUTS).keys() == module(*INPUTS).keys()
    assert [(n.name, n.op, n.target, str(n.args)) for n in found.graph.nodes] == [
        (n.name, n.op, n.target, str(n.args)) for n in module.graph.nodes
    ]
    assert type(found).__name__ == "Parts"
    for names in ("named_parameters", "named_buffers", "named_modules"):
        wanted, got = ([*getattr(m, names)(remove_duplicate=False)] for m in (module, found))
        assert [name for name, _ in got] == [name for name, _ in wanted]
    assert [*found.state_dict()] == [*module.state_dict()]
    assert "mask" not in found.state_dict()
    assert {n: p.requires_grad for n, p in found.named_parameters()} == {
        n: p.requires_grad for n, p in module.named_parameters()
    }
    assert {n: m.training for n, m in found.named_modules()} == {n: m.training for n, m in module.named_modules()}
    assert found.norm.training and not found.training


def test_tied_tensors_stay_tied() -> None:
    found = rebuilt()
    assert found.block.first.weight is found.block.second.weight
    assert len([*found.parameters()]) == len([*parts().parameters()])


def test_a_rebuilt_graph_trains_copies_and_pickles() -> None:
    module, found = copy.deepcopy(parts()).train(), rebuilt().train()
    assert_same_outputs(module, found, *INPUTS)
    assert torch.equal(module.norm.running_mean, found.norm.running_mean)
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found)), again(found)):
        assert_same_outputs(found.eval(), other.eval(), *INPUTS)


def test_the_callers_graph_is_left_as_it_is() -> None:
    module = parts()
    before = module.code, {name: id(tensor) for name, tensor in named_tensors(module).items()}
    flags = [parameter.requires_grad for parameter in module.parameters()]
    encode_graph(module)
    assert (module.code, {name: id(tensor) for name, tensor in named_tensors(module).items()}) == before
    assert [parameter.requires_grad for parameter in module.parameters()] == flags


def operator_graph() -> fx.GraphModule:
    """What torch.export leaves: operators of aten, sizes as numbers."""
    root = nn.Module()
    root.linear = nn.Linear(6, 6)
    graph = fx.Graph(tracer_cls=LayerTracer)
    x = graph.placeholder("input")
    size = graph.call_function(aten.sym_size.int, (x, 0))
    half = graph.call_function(operator.floordiv, (graph.call_function(torch.sym_max, (size, 2)), 1))
    y = graph.call_module("linear", (x,))
    y = graph.call_function(aten.view.default, (y, [half, 2, 3]))
    y = graph.call_function(F.scaled_dot_product_attention, (y, y, y), {"scale": 0.5})
    top = graph.call_function(aten.max.dim, (y, -1))
    y = graph.call_function(aten._to_copy.default, (graph.call_function(operator.getitem, (top, 0)),),
                            {"dtype": torch.float16, "memory_format": torch.contiguous_format})  # fmt: skip
    graph.output((y, graph.call_function(getattr, (y, "shape"))))
    return assemble(root, graph)


def test_operators_are_saved_by_name() -> None:
    module = operator_graph()
    found = again(module)
    assert found.code == module.code
    assert_same_outputs(module, found, INPUTS[0])
    assert [n.target for n in found.graph.nodes if n.op == "call_function"] == [
        n.target for n in module.graph.nodes if n.op == "call_function"
    ]


def test_modules_that_no_node_calls_stay() -> None:
    module = traced(nn.Sequential(nn.Linear(3, 3), nn.Identity()))
    module.add_module("spare", nn.Module())
    module.spare.register_parameter("weight", nn.Parameter(torch.ones(2)))
    assert [*again(module).state_dict()] == [*module.state_dict()]


LAYERS: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(3, 4, bias=False),
    lambda: nn.Bilinear(2, 3, 4),
    lambda: nn.Conv1d(4, 6, 3, 2, 1, 2, 2, bias=False, padding_mode="circular"),
    lambda: nn.Conv2d(4, 6, (3, 1), padding="same", padding_mode="reflect"),
    lambda: nn.Conv3d(2, 2, 3, stride=(1, 2, 1), padding=(0, 1, 2)),
    lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2, dilation=2),
    lambda: nn.BatchNorm2d(4, eps=1e-3, momentum=None, affine=False),
    lambda: nn.BatchNorm1d(4, track_running_stats=False),
    lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    lambda: nn.LayerNorm((3, 4), eps=1e-3, bias=False),
    lambda: nn.LayerNorm(4, elementwise_affine=False),
    lambda: nn.RMSNorm(4),
    lambda: nn.GroupNorm(2, 4, affine=False),
    lambda: nn.LocalResponseNorm(3, 1e-3),
    lambda: nn.LSTM(3, 4, 2, bias=False, batch_first=True, dropout=0.1, bidirectional=True, proj_size=2),
    lambda: nn.GRU(3, 4, bidirectional=True),
    lambda: nn.RNN(3, 4, nonlinearity="relu"),
    lambda: nn.LSTMCell(3, 4, bias=False),
    lambda: nn.RNNCell(3, 4, nonlinearity="relu"),
    lambda: nn.Embedding(5, 3, padding_idx=-1, max_norm=2.0, scale_grad_by_freq=True),
    lambda: nn.EmbeddingBag(5, 3, mode="max"),
    lambda: nn.MultiheadAttention(4, 2, 0.1, bias=False, add_bias_kv=True, kdim=3, vdim=5, batch_first=True),
    lambda: nn.MultiheadAttention(4, 2, add_zero_attn=True),
    lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.2, F.gelu, 1e-3, True, True, False),
    lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, activation=nn.GELU()), 2, nn.LayerNorm(4), False),
    lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8), 2),
    lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 10, [2, 5], 2.0, True),
    lambda: nn.PReLU(3, 0.1),
    lambda: nn.Hardtanh(-2, 3, True),
    lambda: nn.Threshold(0.1, -1, True),
    lambda: nn.Softmax(dim=-1),
    lambda: nn.GELU("tanh"),
    lambda: nn.Dropout2d(0.2, True),
    lambda: nn.MaxPool2d(3, 2, 1, 1, False, True),
    lambda: nn.AvgPool2d((2, 3), ceil_mode=True, count_include_pad=False, divisor_override=2),
    lambda: nn.AdaptiveAvgPool2d((None, 3)),
    lambda: nn.LPPool2d(2.0, 3),
    lambda: nn.Upsample(scale_factor=(2.0, 3.0), mode="bilinear", align_corners=True),
    lambda: nn.UpsamplingNearest2d(size=4),
    lambda: nn.ZeroPad2d((1, 2, 3, 4)),
    lambda: nn.ConstantPad1d(2, -math.inf),
    lambda: nn.Flatten(0, 1),
    lambda: nn.Unflatten(1, (2, 3)),
    lambda: nn.Fold((4, 5), (2, 2)),
    lambda: nn.PixelShuffle(2),
    lambda: nn.ChannelShuffle(2),
    lambda: nn.CosineSimilarity(0, 1e-3),
    lambda: nn.Identity(),
]


@pytest.mark.parametrize("make", LAYERS)
def test_layers_are_rebuilt_by_their_constructors(make: Callable[[], nn.Module]) -> None:
    layer = make()
    found = decode_layer(json.loads(json.dumps(encode_layer(layer), allow_nan=False)), 10)
    assert repr(found) == repr(layer)
    assert type(found) is type(layer)
    assert all(tensor.is_meta for tensor in named_tensors(found).values())
    assert {n: t.shape for n, t in named_tensors(found).items()} == {
        n: t.shape for n, t in named_tensors(layer).items()
    }


class Named(nn.Linear):
    """Computes what a linear layer does."""

    def __init__(self) -> None:
        super().__init__(3, 4)


class Own(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_subclass_that_computes_nothing_of_its_own_is_its_base() -> None:
    assert encode_layer(Named()) == encode_layer(nn.Linear(3, 4))
    with pytest.raises(InputError, match=r"Own is no layer of torch.nn"):
        encode_layer(Own(3, 4))


def changed(**attributes: Any) -> nn.Linear:
    layer = nn.Linear(3, 4)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (changed(forward=abs), "forward differ"),
        (changed(weight=nn.Parameter(torch.ones(5, 3))), "shapes of tensors differ"),
        (changed(child=nn.ReLU()), "child differ"),
        (changed(extra=nn.Parameter(torch.ones(1))), "shapes of tensors differ"),
    ],
)
def test_a_layer_that_is_not_what_its_constructor_makes_is_told(layer: nn.Module, message: str) -> None:
    with pytest.raises(InputError, match=f"a Linear cannot be rebuilt by its constructor: .*{message}"):
        encode_layer(layer)


def test_a_layer_that_was_taken_apart_is_told() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8)
    layer.linear1 = nn.Identity()
    with pytest.raises(InputError, match=r"the network cannot be written down: AttributeError: .*out_features"):
        encode_graph(traced(nn.Sequential(layer)))


class Switch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x


def graph_of(target: Any, *args: Any) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(target, (x, *args)))
    return assemble(nn.Module(), graph)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(1, 1), "the network is a Linear and no torch.fx.GraphModule"),
        (traced(nn.Sequential(nn.ReLU(), Switch())), r"layer 1: .*Switch is no layer of torch.nn"),
        (graph_of(print), "node print_1: builtins.print is no function of torch"),
        (graph_of(torch.add, torch.ones(1)), r"node add: tensor\(\[1.\]\) of type Tensor has no form in JSON"),
        (graph_of(aten.resize_.default, [1]), "node resize_.*: 'aten.resize_.default' is no function of torch"),
    ],
)
def test_what_cannot_be_saved_is_named(module: nn.Module, message: str) -> None:
    with pytest.raises(InputError, match=message):
        encode_graph(module)


constants = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.complex_numbers(allow_nan=False, allow_infinity=False, max_magnitude=1e10)
    | st.sampled_from([..., torch.float16, torch.strided, torch.channels_last, torch.device("cuda", 1)]),
    lambda inner: st.lists(inner, max_size=3)
    | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=2)
    | st.builds(slice, inner, inner, inner),
    max_leaves=6,
)  # fmt: skip


@settings(deadline=None, max_examples=100)
@given(constants)
def test_every_constant_survives_json(value: Any) -> None:
    found = values.decode(json.loads(json.dumps(values.encode(value), allow_nan=False)), {})
    assert repr(found) == repr(value)


def test_functions_have_one_name_each() -> None:
    for function in (
        F.relu,
        F.max_pool2d,
        torch.cat,
        operator.iadd,
        aten.add.Tensor,
        torch.linalg.norm,
        F.relu_,
        math.ceil,
    ):
        assert find_function(function_name(function)) is function


HARMFUL = [
    "builtins.eval", "builtins.exec", "builtins.getattr", "builtins.__import__", "os.system",
    "torch.load", "torch.save", "torch.hub.load",
    "torch.from_file", "torch.compile", "torch.jit.load", "torch.ops.load_library", "operator.attrgetter",
    "operator.methodcaller", "operator.call", "aten.from_file.default", "aten.set_data.default", "aten.resize_.default",
    "aten.__class__.default", "aten.add.__init__", "aten.add", "torchvision.nms.default", "__class__", "",
    "torch.nn.functional.boolean_dispatch", "torch.set_default_device", "aten._reshape_alias.default",
]  # fmt: skip


@pytest.mark.parametrize("name", HARMFUL)
def test_no_other_function_is_found(name: str) -> None:
    with pytest.raises(InputError, match="is no function of torch that computes with tensors"):
        find_function(name)


def test_no_method_or_attribute_reaches_out_of_tensors() -> None:
    assert {"view", "add_", "size", "to"} <= methods()
    assert {"shape", "values", "dtype"} <= attributes()
    harmful = {"numpy", "tofile", "data_ptr", "storage", "share_memory_", "map_", "apply_", "register_hook", "backward"}
    assert not harmful & methods()
    assert not [name for name in {*methods(), *attributes()} if name.startswith("_")]


INJECTED = "x=__import__('os').system('touch pwned')"
Edit = Callable[[dict[str, Any]], object]


def node(values: dict[str, Any], op: str, target: str = "") -> dict[str, Any]:
    found: dict[str, Any] = next(n for n in values["nodes"] if n["op"] == op and n["target"].startswith(target))
    return found


def tensor(values: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for entry in values["tensors"] if entry["name"] == name)
    return found


def setter(op: str, field: str, value: object, target: str = "") -> Edit:
    return lambda values: node(values, op, target).update({field: value})


def rename(old: str, new: str) -> Edit:
    def edit(values: dict[str, Any]) -> None:
        changed = json.loads(json.dumps(values).replace(f'"{old}"', json.dumps(new)))
        values.update(changed)

    return edit


def rename_module(old: str, new: str) -> Edit:
    def edit(values: dict[str, Any]) -> None:
        node(values, "call_module", old)["target"] = new
        values["modules"] = {new if name == old else name: layer for name, layer in values["modules"].items()}

    return edit


def deep(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


HOSTILE: dict[str, Edit] = {
    "node name": rename("relu", INJECTED),
    "node name with newline": rename("relu", "relu\n"),
    "keyword as node name": rename("relu", "lambda"),
    "node named as a global": rename("relu", "torch"),
    "input": setter("placeholder", "target", INJECTED),
    "input self": setter("placeholder", "target", "self"),
    "input torch": setter("placeholder", "target", "torch"),
    "input with star": setter("placeholder", "target", "*x"),
    "input of a node": setter("placeholder", "args", [{"node": "x"}]),
    "input with defaults": setter("placeholder", "args", [1, 2]),
    "keyword argument": setter("call_function", "kwargs", {INJECTED: 1}),
    "keyword": setter("call_function", "kwargs", {"class": 1}),
    "class name": lambda values: values.update(name=INJECTED),
    "function": setter("call_function", "target", "builtins.eval"),
    "getattr": setter("call_function", "args", [{"node": "add_1"}, "__class__"], "builtins"),
    "getattr of a constant": setter("call_function", "args", ["x", "shape"], "builtins"),
    "getattr with default": setter("call_function", "args", [{"node": "add_1"}, "shape", 1], "builtins"),
    "method": setter("call_method", "target", "numpy"),
    "method with dunder": setter("call_method", "target", "__reduce_ex__"),
    "method of a constant": setter("call_method", "args", ["x"]),
    "method of nothing": setter("call_method", "args", []),
    "module": setter("call_module", "target", "block.first.__class__"),
    "module in quotes": setter("call_module", "target", 'block."); import os; ("'),
    "root as module": setter("call_module", "target", ""),
    "tensor as module": setter("call_module", "target", "scale"),
    "attribute": setter("get_attr", "target", "__class__"),
    "attribute of a layer": setter("get_attr", "target", "norm.forward"),
    "node after": setter("call_function", "args", [{"node": "output"}]),
    "op": setter("output", "op", "call"),
    "no output": lambda values: values["nodes"].pop(),
    "two outputs": lambda values: values["nodes"].append({**values["nodes"][-1], "name": "more"}),
    "output of nothing": setter("output", "args", []),
    "twice the same name": lambda values: values["nodes"].insert(5, values["nodes"][4]),
    "no nodes": lambda values: values.update(nodes=[]),
    "deep constant": setter("output", "args", deep(50)),
    "unknown constant": setter("output", "args", [{"eval": "1"}]),
    "two constants": setter("output", "args", [{"tuple": [], "dict": []}]),
    "dtype": setter("output", "args", [{"dtype": "load"}]),
    "device": setter("output", "args", [{"device": INJECTED}]),
    "dict with lists as keys": setter("output", "args", [{"dict": [[{"tuple": []}, 1]]}]),
    "layer class": lambda values: values["modules"]["norm"].update({"class": "ModuleList"}),
    "layer class in dots": lambda values: values["modules"]["norm"].update({"class": "modules.module.torch.load"}),
    "layer argument": lambda values: values["modules"]["norm"]["arguments"].update(device="cpu"),
    "layer function": lambda values: values["modules"]["norm"]["arguments"].update(eps={"function": "builtins.eval"}),
    "layer with many parts": lambda values: values["modules"]["lstm"]["arguments"].update(num_layers=10**9),
    "layer of many sizes": lambda values: values["modules"]["norm"]["arguments"].update(num_features=10**30),
    "layer of another size": lambda values: values["modules"]["norm"]["arguments"].update(num_features=10**12),
    "module name": rename_module("dropout", 'drop"); print("'),
    "module of torch.fx": lambda values: values["modules"].update(graph=None),
    "module with dunder": lambda values: values["modules"].update(__class__=None),
    "module without parent": lambda values: values["modules"].update({"a.b": None}),
    "module in a layer": lambda values: values["modules"].update({"norm.b": None}),
    "tensor in a layer": lambda values: values["tensors"].append({**values["tensors"][0], "name": "norm.more"}),
    "tensor that is a method": lambda values: values["tensors"].append({**values["tensors"][0], "name": "forward"}),
    "tensor shape": lambda values: values["tensors"][0].update(shape=[10**15]),
    "tensor dtype": lambda values: values["tensors"][0].update(dtype="int8"),
    "tensor missing": lambda values: values["tensors"].pop(),
    "tensor twice": lambda values: values["tensors"][1].update(name=values["tensors"][0]["name"]),
    "tensor tied to nothing": lambda values: values["tensors"][0].update(same_as="nothing"),
    "tensor outside the state dict": lambda values: tensor(values, "norm.running_mean").update(persistent=False),
    "tensor of another kind": lambda values: tensor(values, "norm.weight").update(parameter=False),
    "training": lambda values: values["training"].append("nothing"),
    "no modules": lambda values: values.pop("modules"),
    "modules in a list": lambda values: values.update(modules=[]),
}  # fmt: skip


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder that stays empty."""
    monkeypatch.chdir(tmp_path)
    yield
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("edit", HOSTILE.values(), ids=HOSTILE)
def test_what_is_not_written_so_is_not_read(edit: Edit, nowhere: None) -> None:
    values, before = encoded(), encoded()
    edit(values)
    assert values != before
    with pytest.raises(InputError):
        decode_graph(values, tensors(parts()))


def test_tensors_of_another_network_are_refused() -> None:
    given = tensors(parts())
    with pytest.raises(InputError, match="shift: found no such tensor"):
        decode_graph(encoded(), {name: tensor for name, tensor in given.items() if name != "shift"})
    with pytest.raises(InputError, match="tensors more are not on both sides"):
        decode_graph(encoded(), {**given, "more": torch.ones(1)})


def test_stacks_of_layers_are_as_many_as_their_tensors() -> None:
    layer = encode_layer(nn.Identity())
    stack = {"class": "TransformerEncoder", "arguments": {"encoder_layer": {"layer": layer}, "num_layers": 11}}
    with pytest.raises(InputError, match=r"has \[11\] layers; expected at most 10"):
        decode_layer(stack, 10)
    inner = {"class": "TransformerEncoder", "arguments": {"encoder_layer": {"layer": layer}, "num_layers": 4}}
    stack["arguments"] = {"encoder_layer": {"layer": inner}, "num_layers": 4}
    with pytest.raises(InputError, match=r"has \[4\] layers; expected at most 2"):
        decode_layer(stack, 10)


@pytest.mark.parametrize("name", ["Sequential", "ModuleList", "Module", "SyncBatchNorm", "LazyLinear", "DataParallel"])
def test_what_only_holds_layers_is_no_layer(name: str) -> None:
    with pytest.raises(InputError, match=f"'{name}' is no layer of torch.nn"):
        decode_layer({"class": name, "arguments": {}}, 10)


@dataclass
class Outputs:
    scores: Tensor
    hidden: Tensor | None = None


class ByName(nn.Module):
    """Input (batch, 8), output a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Outputs:
        return Outputs(self.layer(x), x)


def test_outputs_by_name_come_back_as_a_dictionary() -> None:
    x = torch.randn(2, 8)
    module = capture(ByName(), x).module
    decoded = decode_graph(encode_graph(module), named_tensors(module))
    found = decoded(x)
    assert found.keys() == {"scores", "hidden"}
    torch.testing.assert_close(found["scores"], module(x).scores, rtol=0, atol=0)


def test_methods_and_operators_that_trust_their_arguments_are_refused() -> None:
    assert "new" not in methods()
    names = (
        "aten.sparse_coo_tensor.indices_size", "aten._sparse_coo_tensor_unsafe.default", "torch.sparse_coo_tensor",
        "torch.fbgemm_linear_int8_weight", "torch.quantized_lstm_cell", "aten.lstm.data",
        "aten.linalg_lu_solve.default",
    )  # fmt: skip
    for name in names:
        with pytest.raises(InputError, match="is no function of torch that computes with tensors"):
            find_function(name)
