"""Capture by torch.export, for models that symbolic tracing does not take: a graph of operators, batch size free."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from tdfx.contained import plain_attention, quiet, reason
from tdfx.errors import CaptureError
from tdfx.passes.base import assemble
from tdfx.passes.capture import LayerTracer

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
    model: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Exports an isolated model: its graph of operators, and notes for the user.

    Weights keep their qualified names and are shared with the model. The first dimension of the first input is the
    batch, which stays free in all inputs that have it where the model allows that.

    Raises:
        CaptureError: torch.export does not take the model.
    """
    batch = next((value.shape[0] for value in (*args, *kwargs.values()) if value.dim()), 0)
    # torch.export takes a dimension of 1 for fixed.
    doubled = [value.repeat(2, *[1] * (value.dim() - 1)) if _has_batch(value, 1) and batch == 1 else value
               for value in (*args, *kwargs.values())]  # fmt: skip
    many = (tuple(doubled[: len(args)]), dict(zip(kwargs, doubled[len(args) :], strict=True)))
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    for value in doubled:
        if _has_batch(value, max(batch, 2)):
            shapes[value] = {0: Dim.DYNAMIC}
    try:
        return operators(_export(model, *many, shapes)), ()
    except Exception as error:
        failure = error
    try:
        graph_module = operators(_export(model, args, dict(kwargs), None))
    except Exception as error:
        raise CaptureError(f"{type(model).__name__} cannot be captured by torch.export ({reason(error)})") from error
    return graph_module, (f"the batch size is fixed: with a free one torch.export says {reason(failure)}",)


def _has_batch(value: Tensor, batch: int) -> bool:
    return value.dim() > 0 and value.shape[0] == batch


def _export(
    model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], shapes: ShapesCollection | None
) -> ExportedProgram:
    with torch.no_grad(), plain_attention(), quiet(), torch.random.fork_rng(devices=[]):
        dynamic = None if shapes is None else shapes.dynamic_shapes(model, args, kwargs)  # type: ignore[no-untyped-call]
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=False)


def operators(program: ExportedProgram) -> fx.GraphModule:
    """The graph of an exported program, called and returning as the model; weights under their qualified names."""
    root = program.module(check_guards=False)
    for module in root.modules():
        module.training = False
    assert isinstance(root, fx.GraphModule)
    assert root._in_spec is not None and root._out_spec is not None
    graph = fx.Graph(tracer_cls=LayerTracer)  # pickling traces anew
    leaves = _copy(graph, root, {})
    names = [None] * len(root._in_spec.children()[0].children()) + list(root._in_spec.children()[1].context)
    for name, node in zip(names, graph.find_nodes(op="placeholder"), strict=True):
        node.target = name or node.target
    graph.output(_structured(graph, root._out_spec, iter(leaves)))
    return assemble(root, graph)


def _copy(graph: fx.Graph, source: fx.GraphModule, values: dict[fx.Node, Any]) -> tuple[Any, ...]:
    """Copies a graph without assertions and writes into buffers, blocks without gradients as if they had them."""
    output: Any = ()
    for node in source.graph.nodes:
        if node in values:
            continue
        if node.op == "output":
            (output,) = node.args
        elif _is_dropped(node):
            values[node] = None
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


def _is_dropped(node: fx.Node) -> bool:
    packet = getattr(node.target, "overloadpacket", None)
    if getattr(packet, "__name__", "") in ASSERTIONS:
        return True
    written = node.args[0] if node.target is aten.copy_.default else None
    return isinstance(written, fx.Node) and written.op == "get_attr"


def _inlined(source: fx.GraphModule, node: fx.Node) -> tuple[fx.GraphModule, Sequence[Any]] | None:
    """The block that a no_grad or a disabled autocast runs, and its arguments."""
    if node.target is higher_order.wrap_with_set_grad_enabled:
        _, block, *given = node.args
    elif node.target is higher_order.wrap_with_autocast and not node.args[2]:
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
    if isinstance(spec.type, type) and (is_dataclass(spec.type) or issubclass(spec.type, Mapping)):
        return graph.call_function(spec.type, (), dict(zip(spec.context, values, strict=True)))
    return tuple(values)
