"""The choice between the ways to a graph: symbolic tracing, torch.export, or none, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, fx, nn

from tdfx.agreement import compare_gradients, run_plain
from tdfx.errors import CaptureError
from tdfx.passes.capture import has_stock_forward, symbolic_trace
from tdfx.passes.capture_in_place import capture_in_place
from tdfx.passes.describe_parameters import DescribeParameters
from tdfx.passes.drop_unread import DropUnread
from tdfx.passes.export_trace import export_trace
from tdfx.passes.fold_weights import FoldWeights
from tdfx.passes.free_literals import FreeLiterals
from tdfx.passes.in_place import FIXED, sharing
from tdfx.passes.layer_operators import parameter_read
from tdfx.passes.lift_layers import LiftLayers
from tdfx.passes.lift_modules import LiftModules
from tdfx.records.capture import EXPORT, FX, INPLACE
from tdfx.trials import Trials

Traced = TypeVar("Traced")


def trace(
    model: nn.Module,
    args: tuple[Tensor, ...],
    kwargs: Mapping[str, Tensor],
    trials: Trials,
    trainable: bool,
    tier: str,
) -> tuple[str, fx.GraphModule, tuple[str, ...]]:
    """Tier, graph and notes, of the tier asked for or of the first one that takes the model.

    Args:
        model: as the later stages call it, with tensors alone; it stays as it is.
        args: positional example inputs.
        kwargs: example inputs by keyword.
        trials: the model at other sizes, which the graph has to compute too.
        trainable: keep what a graph for inference would compute once, as weights made from parameters.
        tier: one of ``TIERS``.

    Raises:
        CaptureError: the way asked for does not take the model; names the construct.
    """
    if tier == INPLACE:
        return INPLACE, trials.check(capture_in_place(model, args, kwargs)), ()
    if tier == FX:
        traced = trials.check(lift(_forced(FX, symbolic_trace, model, args, kwargs), model, trainable))
        return FX, traced, _gradient_notes(model, traced, args, kwargs) if trainable else ()
    if tier == EXPORT:
        exported, notes = _forced(EXPORT, export_trace, model, args, kwargs, trials.free)
        traced = trials.check(lift(exported, model, trainable))
        return EXPORT, traced, (*notes, *(_gradient_notes(model, traced, args, kwargs) if trainable else ()))
    try:
        return _trace_graph(model, args, kwargs, trials, trainable)
    except CaptureError as error:
        why = f"captured in place, where forward stays Python code: {error}"
        return INPLACE, trials.check(capture_in_place(model, args, kwargs)), (why,)


def _gradient_notes(
    model: nn.Module, traced: fx.GraphModule, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]
) -> tuple[str, ...]:
    try:
        compare_gradients(sharing(model), traced, args, kwargs)
    except CaptureError as error:
        return (f"{error}; capture={INPLACE!r} trains as the model does",)
    return ()


def _forced(tier: str, trace: Callable[..., Traced], *given: Any) -> Traced:
    """What a way of tracing returns.

    Raises:
        CaptureError: it fails; says what else to try.
    """
    try:
        return trace(*given)
    except CaptureError as error:
        other = EXPORT if tier == FX else FX
        raise CaptureError(
            f"capture={tier!r}: {error}; or try capture={other!r}, or capture={INPLACE!r}, which needs no graph"
        ) from error


def _trace_graph(
    model: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], trials: Trials, trainable: bool
) -> tuple[str, fx.GraphModule, tuple[str, ...]]:
    """Symbolic tracing if it sees all layers, or else torch.export if that sees more of them."""
    traced, problem = None, None
    try:
        # Tracing may leave its own in buffers and attributes.
        agreed = trials.agree(lift(symbolic_trace(sharing(model), args, kwargs), model, trainable))
        if trainable:
            compare_gradients(sharing(model), agreed, args, kwargs)
        traced = agreed
        if len(_layers(traced)) >= _count_called(sharing(model), args, kwargs) and not _calls_opaque(traced):
            return FX, traced, ()
    except CaptureError as error:
        problem = error
    try:
        exported, notes = export_trace(sharing(model), args, kwargs, trials.free)
        lifted = trials.agree(lift(exported, model, trainable))
        if trainable:
            compare_gradients(sharing(model), lifted, args, kwargs)
    except CaptureError as error:
        if traced is not None:
            why = f"symbolic tracing does not see all layers, and {error}"
            in_place = _in_place_if_better(model, args, kwargs, trials, traced)
            if in_place is not None:
                return INPLACE, in_place, (f"captured in place, where forward stays Python code: {why}",)
            return FX, traced, (why,)
        raise CaptureError(". ".join(dict.fromkeys((str(problem), str(error))))) from error
    if traced is not None and len(_layers(traced)) >= len(_layers(lifted)):
        return FX, traced, ()
    return EXPORT, lifted, notes


def _in_place_if_better(
    model: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], trials: Trials, traced: fx.GraphModule
) -> fx.GraphModule | None:
    """The model captured in place, if more layers can be replaced there than a graph calls."""
    try:
        in_place = trials.check(capture_in_place(model, args, kwargs))
    except CaptureError:
        return None
    replaceable = _count_called(sharing(model), args, kwargs) - len(in_place.meta[FIXED])
    return in_place if replaceable > len(_layers(traced)) else None


def lift(operators: nn.Module, model: nn.Module, trainable: bool) -> fx.GraphModule:
    """A graph of operators, or of modules, as one that calls the layers of ``model``."""
    assert isinstance(operators, fx.GraphModule)
    described = DescribeParameters().run(operators)
    folded = described if trainable else FoldWeights().run(described)
    return FreeLiterals().run(DropUnread().run(LiftModules(model).run(LiftLayers(model).run(folded))))


def _layers(graph_module: fx.GraphModule) -> set[str]:
    """Names of the Linear and convolution layers that a graph calls."""
    called = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    return {name for name in called if has_stock_forward(graph_module.get_submodule(name))}


def _calls_opaque(graph_module: fx.GraphModule) -> bool:
    """Whether weights go into functions that tracing does not look into (torch.fx.wrap)."""
    functions = (node for node in graph_module.graph.nodes if node.op == "call_function")
    opaque = (node for node in functions if getattr(node.target, "__module__", None) and not _is_known(node.target))
    return any(parameter_read(graph_module, value) is not None for node in opaque for value in node.all_input_nodes)


def _is_known(function: Any) -> bool:
    return function.__module__.partition(".")[0] in ("torch", "_operator", "operator", "builtins", "math")


def _count_called(model: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> int:
    """How many Linear and convolution layers one run calls."""
    called: set[nn.Module] = set()
    layers = [module for module in model.modules() if has_stock_forward(module)]
    handles = [layer.register_forward_hook(lambda module, *_: called.add(module)) for layer in layers]
    try:
        run_plain(model, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return len(called)
