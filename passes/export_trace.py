"""Capture by torch.export, for models that symbolic tracing does not take: a graph of operators, batch size free."""

from __future__ import annotations

import copy
import operator
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.modules import transformer
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tdfx.contained import plain_attention, quiet, reason
from tdfx.dynamic import BATCH, free_axes
from tdfx.errors import CaptureError
from tdfx.inputs import entries, opened
from tdfx.passes.base import assemble
from tdfx.passes.capture import LayerTracer
from tdfx.passes.layer_operators import parameter_read
from tdfx.passes.opaque import put_together, taken_apart
from tdfx.signature import with_output

_ONE_AT_A_TIME = threading.RLock()
_TORCH = Path(torch.__file__).parent
_NUMBERS = (Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.item, Tensor.tolist)
aten, higher_order = torch.ops.aten, torch.ops.higher_order
# Checks of what held while tracing, dtypes among them; they would forbid what a user may do with the result later.
ASSERTIONS = frozenset(
    {
        "_assert_tensor_metadata",
        "_assert_scalar",
        "_assert_async",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
    }
)


def export_trace(
    model: nn.Module,
    args: tuple[Tensor, ...],
    kwargs: Mapping[str, Tensor],
    free: Sequence[Mapping[int, str]] | None = None,
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Exports an isolated model: its graph of operators, and notes for the user.

    Weights keep their qualified names and are shared with the model.

    Args:
        model: the model.
        args: positional example inputs.
        kwargs: example inputs by keyword.
        free: the dimensions of each input that stay free, by their names; the batch does so where the model allows
            that, in all inputs or the first one. None for the batch alone.

    Raises:
        CaptureError: torch.export does not take the model, or fixes a named dimension.
    """
    values = {str(index): value for index, value in enumerate((*args, *kwargs.values()))}
    if free is None:
        axes = free_axes(BATCH, values)
        free = [axes.get(name, {}) for name in values]
    alike = frozenset(index for index, dims in enumerate(free) if BATCH in dims.values())
    named = dict.fromkeys(name for dims in free for name in dims.values() if name != BATCH)
    failures = []
    outputs = _Outputs(model, args, kwargs)
    # Another input may have the batch's size by chance.
    for batch in dict.fromkeys((alike, alike & {min(alike, default=0)}, frozenset[int]())):
        dims = [[d for d, name in axes.items() if name != BATCH or i in batch] for i, axes in enumerate(free)]
        try:
            graph_module = outputs.restored(operators(_export(outputs.of(model), args, kwargs, dims)))
        except Exception as error:
            failures.append(error)
            continue
        if batch or not failures:
            return graph_module, ()
        return graph_module, (f"the batch size is fixed: with a free one torch.export says {reason(failures[0])}",)
    asked = f" with {', '.join(named)} free" if named else ""
    advice = "; leave out of dynamic what forward needs as a number" if named else ""
    raise CaptureError(
        f"{type(model).__name__} cannot be captured by torch.export{asked} ({reason(failures[-1])}){advice}"
    ) from failures[-1]


def _export(
    model: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], free: Sequence[Sequence[int]]
) -> ExportedProgram:
    containment = plain_attention(), _unread_masks(), quiet(), torch.random.fork_rng(devices=[])
    # What is exchanged in torch meanwhile is so for all threads.
    with _ONE_AT_A_TIME, ExitStack() as stack:
        for context in (torch.no_grad(), *containment, _no_caught_refusals(), _KeptInputs()):
            stack.enter_context(context)
        # Marks, since torch.export cannot match a structure of dynamic shapes to a forward that hides its arguments.
        copies = [_marked(value, dims) for value, dims in zip((*args, *kwargs.values()), free, strict=True)]
        positional, named = tuple(copies[: len(args)]), dict(zip(kwargs, copies[len(args) :], strict=True))
        return torch.export.export(model, positional, named, strict=False)


def _marked(value: Tensor, free: Sequence[int]) -> Tensor:
    """A copy, whose free dimensions are marked as such."""
    # torch.export takes a dimension of 1 for fixed.
    repeats = [2 if dim in free and size == 1 else 1 for dim, size in enumerate(value.shape)]
    copied = value.repeat(repeats) if 2 in repeats else value.clone()
    for dim in free:
        torch._dynamo.mark_dynamic(copied, dim)
    return copied


class _Outputs:
    """Outputs in classes that torch does not know, as lists while a model is exported; others as they are."""

    def __init__(self, model: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        positional, named = pytree.tree_map_only(Tensor, torch.clone, (args, dict(kwargs)))
        with torch.no_grad(), plain_attention(), torch.random.fork_rng(devices=[]):
            # On a copy, since forward may write into buffers.
            output = copy.deepcopy(model, {id(value): value for value in model.parameters()})(*positional, **named)
        leaves = pytree.tree_leaves(output)
        self.is_strange = any(entries(leaf) is not None or taken_apart(leaf) is not None for leaf in leaves)
        self.tree: Any = None

    def of(self, model: nn.Module) -> nn.Module:
        """The model, or a view of it that returns such outputs' leaves; a view has attributes of its own."""
        return with_output(model, self._leaves) if self.is_strange else model

    def _leaves(self, output: Any) -> list[Any]:
        self.tree = output
        return list(opened(output))

    def restored(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """The graph with the leaves in their classes again."""
        if self.tree is None:
            return graph_module
        output = graph_module.graph.output_node()
        leaves = iter(output.args[0])  # type: ignore[arg-type]
        with graph_module.graph.inserting_before(output):
            output.args = (_made(graph_module.graph, self.tree, leaves),)
        graph_module.recompile()
        return graph_module


def _made(graph: fx.Graph, tree: Any, leaves: Iterator[Any]) -> Any:
    """Leaves in containers like those of the tree, in its order."""
    found, spec = pytree.tree_flatten(tree)
    values = []
    for value in found:
        inner = entries(value)
        if inner is not None:
            made = {name: _made(graph, entry, leaves) for name, entry in inner.items()}
            values.append(graph.call_function(type(value), (), made))
        elif (parts := taken_apart(value)) is not None:
            rest, tensors = parts
            values.append(graph.call_function(put_together, (rest, *(next(leaves) for _ in tensors))))
        else:
            values.append(next(leaves))
    return _structured(graph, spec, iter(values))


class _KeptInputs(TorchFunctionMode):
    """Gives dropout a second name of its input.

    That of channels and that of SELU return in eval mode the tensor that they were given, and torch.export would take
    their result for the input too where that is read later, as in ``y = dropout(x); return x + y``.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if "dropout" in getattr(func, "__name__", ""):
            args = tuple(aten.alias(value) if isinstance(value, Tensor) else value for value in args)
            kwargs = {name: aten.alias(value) if isinstance(value, Tensor) else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


@contextmanager
def _no_caught_refusals() -> Iterator[None]:
    """Raises what torch.export says where forward asks for a value, even if forward catches it and goes another way."""
    refusals: list[Exception] = []
    answer, thread = torch.SymBool.__bool__, threading.get_ident()

    def asked(value: torch.SymBool) -> bool:
        try:
            return bool(answer(value))  # type: ignore[no-untyped-call]
        except GuardOnDataDependentSymNode as error:
            # torch has ways of its own, and other threads what they do.
            if _TORCH not in Path(sys._getframe(1).f_code.co_filename).parents and threading.get_ident() == thread:
                refusals.append(error)
            raise

    torch.SymBool.__bool__ = asked  # type: ignore[method-assign]
    try:
        with _Asking(refusals):
            yield
    finally:
        torch.SymBool.__bool__ = answer  # type: ignore[method-assign]
    if refusals:
        raise refusals[0]


class _Asking(TorchFunctionMode):
    """Notes what torch.export says where a tensor is made a number.

    Args:
        refusals: of it, where they are entered.
    """

    def __init__(self, refusals: list[Exception]) -> None:
        super().__init__()
        self.refusals = refusals

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except GuardOnDataDependentSymNode as error:
            if func in _NUMBERS:
                self.refusals.append(error)
            raise


@contextmanager
def _unread_masks() -> Iterator[None]:
    """Keeps torch's transformers from looking whether a mask is causal: a hint alone, and dependent on values."""
    detect = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = detect


def operators(program: ExportedProgram) -> fx.GraphModule:
    """The graph of an exported program, called and returning as the model; weights under their qualified names.

    Raises:
        CaptureError: the program takes containers of tensors.
    """
    root = program.module(check_guards=False)
    for module in root.modules():
        module.training = False
    assert isinstance(root, fx.GraphModule)
    assert root._in_spec is not None and root._out_spec is not None
    graph = fx.Graph(tracer_cls=LayerTracer)  # pickling traces anew
    leaves = _copy(graph, root, {})
    names = [None] * len(root._in_spec.children()[0].children()) + list(root._in_spec.children()[1].context)
    inputs = graph.find_nodes(op="placeholder")
    if len(names) != len(inputs):
        raise CaptureError(
            f"the exported program takes {len(inputs)} values as {len(names)} arguments; expected tensors as "
            "arguments, not containers of them: export a module that takes tensors"
        )
    for name, node in zip(names, inputs, strict=True):
        node.target = name or node.target
    graph.output(_structured(graph, root._out_spec, iter(leaves)))
    if any("functorch" in getattr(node.target, "__module__", "") for node in graph.nodes if callable(node.target)):
        raise CaptureError("torch.vmap and the like inside forward are not part of a graph; compute on the whole batch")
    _contain_writes(graph, root)
    return assemble(root, graph)


def _copy(graph: fx.Graph, source: fx.GraphModule, values: dict[fx.Node, Any]) -> tuple[Any, ...]:
    """Copies a graph without assertions and second names, blocks without gradients as if they had them."""
    output: Any = ()
    for node in source.graph.nodes:
        if node in values:
            continue
        if node.op == "output":
            (output,) = node.args
        elif getattr(getattr(node.target, "overloadpacket", None), "__name__", "") in ASSERTIONS:
            values[node] = None
        elif node.target is aten.alias.default:
            values[node] = values[node.args[0]]
        elif (inner := _inlined(source, node)) is not None:
            block, given = inner
            given = fx.node.map_arg(given, lambda n: values[n])
            values[node] = _copy(graph, block, dict(zip(block.graph.find_nodes(op="placeholder"), given, strict=True)))
        elif node.target is operator.getitem and isinstance(values[node.args[0]], tuple):
            values[node] = values[node.args[0]][node.args[1]]
        else:
            values[node] = graph.node_copy(node, lambda n: values[n])
    flat = fx.node.map_arg(output, lambda n: values[n])
    return tuple(flat) if isinstance(flat, list | tuple) else (flat,)


def _contain_writes(graph: fx.Graph, root: fx.GraphModule) -> None:
    """Writes into buffers go into a copy made at every call, or nowhere if nobody reads them."""
    for node in graph.find_nodes(op="get_attr"):
        names = dict.fromkeys(_names_of_same(node))
        written = {name.target for name in names if _is_mutable(name)}
        # Rows of an embedding that are rescaled as they are looked up stay so in the model too.
        if not written or (written == {aten.embedding_renorm_.default} and parameter_read(root, node) is not None):
            continue
        if all(user in names for name in names for user in name.users):
            for name in sorted(names, reverse=True):
                graph.erase_node(name)
        else:
            with graph.inserting_after(node):
                copied = graph.call_function(aten.clone.default, (node,))
            node.replace_all_uses_with(copied, delete_user_cb=lambda user, copied=copied: user is not copied)


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _names_of_same(node: fx.Node) -> Iterator[fx.Node]:
    """A value with its views and those who write into it."""
    yield node
    for user in node.users:
        arguments = user.target._schema.arguments if isinstance(user.target, torch._ops.OpOverload) else ()
        if any(value is node and argument.alias_info for argument, value in zip(arguments, user.args, strict=False)):
            yield from _names_of_same(user)


def _inlined(source: fx.GraphModule, node: fx.Node) -> tuple[fx.GraphModule, Sequence[Any]] | None:
    """The block that a no_grad or a disabled autocast runs, and its arguments."""
    if node.target is higher_order.wrap_with_set_grad_enabled:
        _, block, *given = node.args
    elif node.target is higher_order.wrap_with_autocast:
        if node.args[2]:
            raise CaptureError("autocast inside forward is not part of a graph; put it around the model")
        block, given = node.args[4], list(node.args[5:])
    else:
        return None
    return getattr(source, str(block.target)), given  # type: ignore[union-attr]


def _structured(graph: fx.Graph, spec: pytree.TreeSpec, leaves: Iterator[Any]) -> Any:
    """Output values in the containers that the model returns them in; of unknown ones, a tuple."""
    if spec.is_leaf():
        return next(leaves)
    values = [_structured(graph, child, leaves) for child in spec.children()]
    if spec.type is list:
        return values
    if spec.type is dict:
        return dict(zip(spec.context, values, strict=True))
    if spec.type is namedtuple:
        return graph.call_function(spec.context, tuple(values))
    names, absent = spec.context, ()
    if isinstance(spec.type, type) and is_dataclass(spec.type) and not issubclass(spec.type, Mapping):
        names, absent = spec.context
    elif not (
        isinstance(spec.type, type) and issubclass(spec.type, Mapping) and all(isinstance(n, str) for n in names)
    ):
        return tuple(values)
    return graph.call_function(spec.type, (), dict(zip(names, values, strict=True)) | dict.fromkeys(absent))
