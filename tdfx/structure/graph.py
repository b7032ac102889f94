"""A torch.fx graph over layers of torch.nn as a JSON value and back.

torch.fx runs Python source that it writes from a graph's names and constants. So every name is checked to be a plain
one, and every target to be on a list or part of the network, before a graph is made of them.
"""

from __future__ import annotations

import builtins
import copy
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Literal

from torch import Tensor, fx, nn

from tdfx.errors import InputError, TdfxError
from tdfx.passes.base import assemble
from tdfx.passes.capture import LayerTracer
from tdfx.records.layer import Shape
from tdfx.records.reading import read
from tdfx.structure.functions import attributes, find_function, function_name, holds_outputs, methods
from tdfx.structure.modules import HOLDERS, decode_layer, encode_layer
from tdfx.structure.names import identifier, keyword_argument, path
from tdfx.structure.values import DTYPES, decode, encode

GETATTR = "builtins.getattr"  # how torch.fx reads x.shape; in no list of functions, since it would read anything


@dataclass(frozen=True)
class NodeRecord:
    """A node as torch.fx has it; targets are names, arguments JSON values."""

    name: str
    op: Literal["placeholder", "get_attr", "call_function", "call_method", "call_module", "output"]
    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class TensorRecord:
    """A parameter or buffer.

    Attributes:
        name: its qualified name.
        parameter: whether it is a parameter.
        shape: its shape.
        dtype: name of its dtype.
        requires_grad: whether it is trained.
        persistent: whether it is in the state dict.
        same_as: an earlier name of the same tensor, None for a tensor of its own.
    """

    name: str
    parameter: bool
    shape: Shape
    dtype: str
    requires_grad: bool
    persistent: bool
    same_as: str | None


@dataclass(frozen=True)
class GraphRecord:
    """A graph module without the values of its tensors.

    Attributes:
        name: of its class.
        modules: layers as class and arguments by qualified name, None for what only holds others, in order.
        tensors: parameters and buffers, in order.
        training: qualified names of the modules in train mode; "" is the root.
        nodes: the graph.
    """

    name: str
    modules: dict[str, Any]
    tensors: tuple[TensorRecord, ...]
    training: tuple[str, ...]
    nodes: tuple[NodeRecord, ...]


def encode_graph(module: nn.Module) -> dict[str, Any]:
    """All of a graph module but the values of its tensors, which ``named_tensors`` gives, as a JSON value.

    Raises:
        InputError: it is no graph, or holds layers, functions or constants that are not torch's.
    """
    if not isinstance(module, fx.GraphModule):
        raise InputError(f"the network is a {type(module).__name__} and no torch.fx.GraphModule")
    try:
        return _encode(module)
    except TdfxError:
        raise
    except Exception as error:  # layers that were taken apart lack what their class has
        raise InputError(f"the network cannot be written down: {type(error).__name__}: {error}") from error


def _encode(module: fx.GraphModule) -> dict[str, Any]:
    called = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    if type(module.graph._codegen) is not fx.graph.CodeGen:
        raise InputError(f"the graph is called through a {type(module.graph._codegen).__name__}")
    record = GraphRecord(
        name=identifier(type(module).__name__, "the class"),
        modules=dict(_encode_modules(module, called)),
        tensors=tuple(_encode_tensors(module)),
        training=tuple(name for name, part in module.named_modules(remove_duplicate=False) if part.training),
        nodes=tuple(_encode_node(node) for node in module.graph.nodes),
    )
    encoded: dict[str, Any] = json.loads(json.dumps(asdict(record), allow_nan=False))
    rebuilt = decode_graph(encoded, {name: tensor.detach() for name, tensor in named_tensors(module).items()})
    if rebuilt.graph.python_code("self").src != _as_saved(module.graph).python_code("self").src:
        raise InputError("the graph reads differently when it is rebuilt")
    return encoded


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, tied ones under each of their names, those outside the state dict too."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def decode_graph(encoded: object, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """The graph module that ``encode_graph`` was given.

    Args:
        encoded: the JSON value.
        tensors: all of its tensors by name; they become the module's own.

    Raises:
        InputError: ``encode_graph`` writes no such thing, or the tensors are of another network. Nothing is run.
    """
    try:
        return _decode(read(GraphRecord, encoded, "graph", InputError), tensors)
    except TdfxError:
        raise
    except Exception as error:  # whatever torch says to what no graph is
        raise InputError(f"no network can be made of it: {type(error).__name__}: {error}") from error


def _decode(record: GraphRecord, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    root = type(identifier(record.name, "the class"), (nn.Module,), {})()
    # A few words can ask for any number of layers, but not for any that have tensors.
    sizes = Counter(owner for tensor in record.tensors for owner in accumulate(tensor.name.split("."), "{}.{}".format))
    for name, layer in record.modules.items():
        _place(root, name, nn.Module() if layer is None else decode_layer(layer, sizes[name]))
    _fill(root, record, tensors)
    _set_training(root, record.training)
    module = assemble(root, _decode_nodes(record, root))
    # The whole tree, in its order: optimizers number parameters by it, and torch.fx takes that of the nodes.
    for table in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        setattr(module, table, getattr(root, table))
    module.graph.lint()
    return module


def _decode_nodes(record: GraphRecord, root: nn.Module) -> fx.Graph:
    graph = fx.Graph(tracer_cls=LayerTracer)
    parts = {"call_module": dict(root.named_modules(remove_duplicate=False)), "get_attr": named_tensors(root)}
    nodes: dict[str, fx.Node] = {}
    for node in record.nodes:
        if node.name in nodes:
            raise InputError(f"two nodes have the name {node.name!r}")
        if node.op in parts and node.target not in parts[node.op]:
            raise InputError(f"node {node.name}: the network has no {node.target!r}")
        nodes[node.name] = _decode_node(graph, node, nodes)
    if [node.op for node in record.nodes].count("output") != 1 or record.nodes[-1].op != "output":
        raise InputError("a graph has one output, its last node")
    return graph


def _encode_modules(module: fx.GraphModule, called: set[str]) -> Iterator[tuple[str, Any]]:
    """Layers that the graph calls, and on the way to them what holds them; what is inside a layer goes with it."""
    pending = [*reversed([*module._modules.items()])]
    while pending:
        name, part = pending.pop()
        if part is None:
            continue
        path(name, "a module")
        if name in called:
            try:
                yield name, encode_layer(part)
            except InputError as error:
                raise InputError(f"layer {name}: {error}") from error
        else:
            if type(part) not in HOLDERS and any(True for _ in part.parameters(recurse=False)):
                raise InputError(f"{name}: a {type(part).__name__} that the graph does not call holds parameters")
            yield name, None
            pending += [(f"{name}.{child}", inner) for child, inner in reversed([*part._modules.items()])]


def _encode_tensors(module: nn.Module) -> Iterator[TensorRecord]:
    first: dict[int, str] = {}
    for name, tensor in named_tensors(module).items():
        owner, _, key = path(name, "a tensor").rpartition(".")
        same_as = first.get(id(tensor))
        first.setdefault(id(tensor), name)
        yield TensorRecord(
            name=name,
            parameter=isinstance(tensor, nn.Parameter),
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            requires_grad=tensor.requires_grad,
            persistent=key not in module.get_submodule(owner)._non_persistent_buffers_set,
            same_as=same_as,
        )


def _encode_node(node: fx.Node) -> NodeRecord:
    try:
        target: Any = node.target
        if callable(target):
            target = GETATTR if target is builtins.getattr else function_name(target)
        return NodeRecord(
            node.name,
            node.op,  # type: ignore[arg-type]
            target,
            tuple(encode(value) for value in node.args),
            {name: encode(value) for name, value in node.kwargs.items()},
        )
    except InputError as error:
        raise InputError(f"node {node.name}: {error}") from error


def _decode_node(graph: fx.Graph, node: NodeRecord, nodes: Mapping[str, fx.Node]) -> fx.Node:
    identifier(node.name, "a node")
    args = tuple(decode(value, nodes) for value in node.args)
    kwargs = {
        keyword_argument(name, f"an argument of {node.name}"): decode(entry, nodes)
        for name, entry in node.kwargs.items()
    }
    target: Any = node.target
    if node.op == "call_function" and target == GETATTR:
        _check_getattr(node.name, args, kwargs)
        target = builtins.getattr
    elif node.op == "call_function":
        target = find_function(target)
    elif node.op == "call_method":
        if target not in methods():
            raise InputError(f"node {node.name}: {target!r} is no method of a tensor that computes")
        if not args or not isinstance(args[0], fx.Node):
            raise InputError(f"node {node.name}: method {target} is called on {args[:1]}; expected a node")
    elif node.op == "placeholder":
        identifier(target, "an input")
        if len(args) > 1 or kwargs or any(isinstance(value, fx.Node) for value in args):
            raise InputError(f"node {node.name}: an input has a default value at most")
    elif node.op == "output" and (len(args) != 1 or kwargs):
        raise InputError(f"node {node.name}: an output has one argument")
    return graph.create_node(node.op, target, args, kwargs, name=node.name)


def _check_getattr(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if kwargs or len(args) != 2 or not isinstance(args[0], fx.Node) or args[1] not in attributes():
        raise InputError(f"node {name}: getattr{args} reads no attribute of a tensor")


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, key = path(name, "a module").rpartition(".")
    try:
        holder = root.get_submodule(parent)
    except AttributeError as error:
        raise InputError(f"module {name}: there is no {parent} before it") from error
    if key in holder._modules or (type(holder) is not nn.Module and holder is not root):
        raise InputError(f"module {name}: it is there already, or part of a layer")
    holder.add_module(key, module)


def _fill(root: nn.Module, record: GraphRecord, tensors: Mapping[str, Tensor]) -> None:
    """Gives every parameter and buffer its tensor, and holders those that lie on them."""
    expected = named_tensors(root)
    holders = {name for name, layer in record.modules.items() if layer is None} | {""}
    placed: dict[str, Tensor] = {}
    for entry in record.tensors:
        owner, _, key = path(entry.name, "a tensor").rpartition(".")
        if entry.name not in expected and owner not in holders:
            raise InputError(f"tensor {entry.name}: the network has no such parameter or buffer")
        tensor = _checked(entry, tensors, expected.get(entry.name))
        if entry.same_as is not None:
            if entry.same_as not in placed:
                raise InputError(f"tensor {entry.name}: there is no {entry.same_as!r} before it")
            tensor = placed[entry.same_as]
        elif entry.parameter:
            tensor = nn.Parameter(tensor, entry.requires_grad)
        else:
            tensor = tensor.requires_grad_(entry.requires_grad)
        placed[entry.name] = tensor
        _set_tensor(root.get_submodule(owner), key, tensor, entry)
    missing = [*expected.keys() - placed.keys(), *tensors.keys() ^ placed.keys()]
    if missing:
        raise InputError(f"tensors {', '.join(sorted(missing)[:5])} are not on both sides: file and network")


def _checked(entry: TensorRecord, tensors: Mapping[str, Tensor], expected: Tensor | None) -> Tensor:
    tensor = tensors.get(entry.name)
    if tensor is None or tuple(tensor.shape) != entry.shape or tensor.dtype is not DTYPES.get(entry.dtype):
        found = "no such tensor" if tensor is None else f"shape {tuple(tensor.shape)} and {tensor.dtype}"
        raise InputError(f"tensor {entry.name}: found {found}, expected shape {entry.shape} and {entry.dtype}")
    if expected is not None and (
        expected.shape != tensor.shape or isinstance(expected, nn.Parameter) != entry.parameter
    ):
        raise InputError(
            f"tensor {entry.name}: its layer has another shape, {tuple(expected.shape)}, or kind of tensor"
        )
    return tensor


def _set_tensor(owner: nn.Module, key: str, tensor: Tensor, entry: TensorRecord) -> None:
    if key in owner._parameters or key in owner._buffers:
        if (key not in owner._non_persistent_buffers_set) != entry.persistent:
            raise InputError(f"tensor {entry.name}: its layer says otherwise whether it is in the state dict")
        setattr(owner, key, tensor)
    elif isinstance(tensor, nn.Parameter):
        owner.register_parameter(key, tensor)
    else:
        owner.register_buffer(key, tensor, persistent=entry.persistent)


def _set_training(root: nn.Module, training: tuple[str, ...]) -> None:
    modules = dict(root.named_modules(remove_duplicate=False))
    unknown = [name for name in training if name not in modules]
    if unknown:
        raise InputError(f"there are no modules {', '.join(unknown)} to train")
    for name, module in modules.items():
        module.training = name in training


def _as_saved(graph: fx.Graph) -> fx.Graph:
    """The graph without what is not saved: annotations, and classes of outputs."""
    copied = copy.deepcopy(graph)
    for node in copied.nodes:
        node.type = None
        if holds_outputs(node.target):
            node.target = dict
    return copied
