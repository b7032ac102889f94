"""Capture by symbolic tracing: from an nn.Module to a GraphModule that calls its layers by qualified name."""

from __future__ import annotations

import copy
import inspect
import linecache
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from tdfx.errors import CaptureError

_TORCH = Path(torch.__file__).parent
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_STOCK_FORWARDS = frozenset(
    layer.forward
    for layer in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.modules.linear.NonDynamicallyQuantizableLinear)
)


def isolate(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """A deep copy in eval mode, free of hooks and parametrizations, and notes for the user about what was removed.

    Raises:
        CaptureError: the model cannot be copied.
    """
    try:
        copied = copy.deepcopy(model).eval()
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be deep-copied ({type(error).__name__}: {error}); tdfx never works on "
            "the original: make the model copyable, e.g. by building it anew and loading its state dict"
        ) from error
    notes = []
    for name, module in copied.named_modules():
        _remove_reparametrizations(module)
        if any(getattr(module, hooks, None) for hooks in _HOOKS):
            notes.append(f"hooks of {name or 'the model'} are not part of the result")
            for hooks in _HOOKS:
                getattr(module, hooks, {}).clear()
    return copied, tuple(notes)


def symbolic_trace(model: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> fx.GraphModule:
    """Traces an isolated model for calls with these inputs; arguments left out are fixed to their defaults.

    Raises:
        CaptureError: naming the construct that cannot be traced, and where it stands.
    """
    given = inspect.signature(model.forward).bind(*args, **kwargs)
    fixed = {
        name: parameter.default
        for name, parameter in given.signature.parameters.items()
        if name not in given.arguments and parameter.default is not inspect.Parameter.empty
    }
    try:
        graph = LayerTracer().trace(model, concrete_args=fixed or None)
    except Exception as error:
        raise CaptureError(_explain(model, error)) from error
    _drop_fixed_arguments(graph)
    return fx.GraphModule(model, graph, type(model).__name__)


class LayerTracer(fx.Tracer):
    """torch.fx's tracer, with one more leaf rule.

    A convolution or linear whose forward is the stock one is a leaf even in a user's subclass, and so is a module
    without parameters that behaves differently in training (stochastic depth and the like), so that it keeps doing so.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return has_stock_forward(m) or _is_train_switch(m) or super().is_leaf_module(m, module_qualified_name)


def has_stock_forward(module: nn.Module) -> bool:
    """Whether a module computes what torch's layer of that kind computes, so that a chain may stand in for it."""
    stock_conv = not isinstance(module, nn.modules.conv._ConvNd) or type(module)._conv_forward in (
        nn.Conv1d._conv_forward,
        nn.Conv2d._conv_forward,
        nn.Conv3d._conv_forward,
    )
    return type(module).forward in _STOCK_FORWARDS and "forward" not in vars(module) and stock_conv


def _is_train_switch(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    is_own = not type(module).__module__.startswith("torch.")
    return is_own and code is not None and "training" in code.co_names and not any(_state(module))


def _state(module: nn.Module) -> Iterator[Any]:
    yield from module.parameters()
    yield from module.buffers()
    yield from module.children()


def _remove_reparametrizations(module: nn.Module) -> None:
    if parametrize.is_parametrized(module):
        for name in list(module.parametrizations):  # type: ignore[arg-type]
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    for key, hook in list(module._forward_pre_hooks.items()):
        # The hooks of torch.nn.utils.weight_norm and spectral_norm compute the weight anew at every call.
        if type(hook).__module__.startswith("torch.nn.utils.") and hasattr(hook, "remove"):
            hook.remove(module)
            del module._forward_pre_hooks[key]


def _drop_fixed_arguments(graph: fx.Graph) -> None:
    """Removes placeholders of arguments fixed to defaults, with the assertions torch.fx adds for them."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and "has been specialized to have value" in str(node.args):
            checked = node.args[0]
            graph.erase_node(node)
            if isinstance(checked, fx.Node) and checked.op != "placeholder" and not checked.users:
                graph.erase_node(checked)
    for node in list(graph.nodes):
        unused_star = node.op == "placeholder" and str(node.target).startswith("*")
        if node.op == "placeholder" and not node.users and (node.args or unused_star):
            graph.erase_node(node)


def _explain(model: nn.Module, error: Exception) -> str:
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if _TORCH not in Path(frame.filename).parents and Path(frame.filename).name != Path(__file__).name:
            source = linecache.getline(frame.filename, frame.lineno or 0).strip()
            place = f" at {Path(frame.filename).name}:{frame.lineno} in {frame.name}: `{source}`"
    return (
        f"{type(model).__name__} cannot be captured by symbolic tracing{place} "
        f"({type(error).__name__}: {error}). Move the construct out of forward or into a module of its own, "
        "or compress the submodule that does not contain it"
    )
