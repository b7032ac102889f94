"""Capture by symbolic tracing: from an nn.Module to a GraphModule that calls its layers by qualified name."""

from __future__ import annotations

import inspect
import linecache
import operator
import traceback
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tdfx.errors import CaptureError
from tdfx.passes.base import assemble
from tdfx.passes.in_place import duplicated

_TORCH, _HERE = Path(torch.__file__).parent, Path(__file__).parent
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_LAYERS = (
    nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Embedding, nn.EmbeddingBag,
)  # fmt: skip
_INNER_FORWARDS = ("_conv_forward", "_output_padding")


def isolate(model: nn.Module, *, keep_hooks: bool = False) -> tuple[nn.Module, tuple[str, ...]]:
    """A deep copy in eval mode, free of hooks and parametrizations, and notes for the user about what was removed.

    Args:
        model: the model, which is left as it is.
        keep_hooks: leave hooks, for models that do not run without.

    Raises:
        CaptureError: the model cannot be copied.
    """
    try:
        copied = duplicated(model).eval()
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be deep-copied ({type(error).__name__}: {error}); tdfx never works on "
            "the original: make the model copyable, e.g. by building it anew and loading its state dict"
        ) from error
    notes = []
    for name, module in copied.named_modules():
        _remove_reparametrizations(module)
        if not keep_hooks and _is_hooked(module):
            notes.append(f"hooks of {name or 'the model'} are not part of the result")
            for hooks in _HOOKS:
                getattr(module, hooks, {}).clear()
    return copied, tuple(notes)


def has_hooks(model: nn.Module) -> bool:
    """Whether any module of a model has hooks around its forward or backward."""
    return any(map(_is_hooked, model.modules()))


def _is_hooked(module: nn.Module) -> bool:
    return any(getattr(module, hooks, None) for hooks in _HOOKS)


def symbolic_trace(model: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> fx.GraphModule:
    """Traces an isolated model for calls with these inputs; arguments left out keep their defaults for good.

    Raises:
        CaptureError: naming the construct that cannot be traced, and where it stands.
    """
    try:
        given = inspect.signature(model.forward).bind(*args, **kwargs)
        return assemble(model, LayerTracer(given).trace(model))
    except Exception as error:
        raise CaptureError(_explain(model, error)) from error


class _Proxy(fx.Proxy):
    """A proxy on which ``x += y`` and the like stay in place.

    torch.fx makes x = x + y of them, which other names of the same tensor do not see.
    """

    def __float__(self) -> float:
        assert isinstance(self.tracer, LayerTracer)
        return self.tracer.to_number(self)

    def __int__(self) -> int:
        return int(float(self))


def _in_place(operation: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda proxy, other: proxy.tracer.create_proxy("call_function", operation, (proxy, other), {})


for _operation in (
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.iand, operator.ior, operator.ixor,
):  # fmt: skip
    setattr(_Proxy, f"__{_operation.__name__}__", _in_place(_operation))


class _NestedProxies(TorchFunctionMode):
    """Traces functions that meet proxies inside lists alone, as torch.zeros((batch, 3)) does; torch.fx misses them.

    Args:
        tracer: traces functions that meet no proxies either, as torch.zeros(3).
    """

    def __init__(self, tracer: fx.Tracer | None) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if types:
            return func(*args, **kwargs)
        found = next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, fx.Proxy)), None)
        tracer = self.tracer if found is None else found.tracer
        return func(*args, **kwargs) if tracer is None else tracer.create_proxy("call_function", func, args, kwargs)


class LayerTracer(fx.Tracer):
    """torch.fx's tracer, with two more leaf rules, for one call.

    A module whose forward is torch's own is a leaf even in a user's subclass, and so is a module without parameters
    that behaves differently in training (stochastic depth and the like), so that it keeps doing so.

    Args:
        given: the call; placeholders stand for what it gives. None is torch.fx's rule, for a graph that is unpickled:
            whatever its code calls was in the graph.
    """

    def __init__(self, given: inspect.BoundArguments | None = None) -> None:
        super().__init__()
        self.given = given
        self.proxy_buffer_attributes = given is None
        self.refusals: list[Exception] = []
        self._autocast = _autocast()

    def trace(self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with _NestedProxies(self if self.given is None else None):
            graph = super().trace(root, concrete_args)
        if self.refusals:
            raise self.refusals[0]  # which forward caught, and went another way
        return graph

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self._asked(super().to_bool, obj))

    def iter(self, obj: fx.Proxy) -> Any:
        return self._asked(super().iter, obj)

    def to_number(self, obj: fx.Proxy) -> float:
        """Called when a proxy is converted to a number; raises TypeError."""
        return float(self._asked(_unknown, obj))

    def _asked(self, answer: Callable[..., Any], obj: Any) -> Any:
        try:
            return answer(obj)
        except Exception as error:
            if not _is_of_shapes(obj.node):  # with those in its place, forward goes on as it would
                self.refusals.append(error)
            raise

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _autocast() != self._autocast:
            raise fx.proxy.TraceError("autocast inside forward is not part of a graph")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, OrderedDict) and all(isinstance(key, str) for key in a):
            # torch.fx makes a plain dictionary of it, whose entries are no attributes.
            return self.create_node("call_function", type(a), (), {key: self.create_arg(a[key]) for key in a})
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if _is_hooked(m):
            return False  # what hooks do is part of the graph then
        return has_torch_forward(m) or _is_train_switch(m) or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        if self.given is None:
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        arguments: dict[str, Any] = {}
        for name, value in self.given.arguments.items():
            kind = self.given.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                arguments[name] = tuple(self._placeholder(f"{name}_{index}") for index in range(len(value)))
            elif kind is inspect.Parameter.VAR_KEYWORD:
                arguments[name] = {key: self._placeholder(key) for key in value}
            else:
                arguments[name] = self._placeholder(name)
        call = inspect.BoundArguments(self.given.signature, OrderedDict(arguments))
        return lambda root: root_fn(root, *call.args, **call.kwargs), [self.root]

    def _placeholder(self, name: str) -> fx.Proxy:
        return self.create_proxy("placeholder", name, (), {})


def _is_of_shapes(node: fx.Node) -> bool:
    """Whether a value is computed from shapes alone."""
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    if node.op == "call_method" and node.target in ("size", "dim", "numel"):
        return True
    return bool(node.all_input_nodes) and all(map(_is_of_shapes, node.all_input_nodes))


def _unknown(obj: fx.Proxy) -> float:
    raise TypeError(f"the value of the symbolically traced variable {obj.node.name} is not known")


def has_stock_forward(module: nn.Module) -> bool:
    """Whether a module computes what torch's layer of that kind computes, so that a chain may stand in for it."""
    forward = getattr(type(module), "forward", None)  # TorchScript's classes have none
    kind = next((layer for layer in _LAYERS if forward is layer.forward), None)
    if kind is None or "forward" in vars(module):
        return False
    return all(getattr(type(module), name, None) is getattr(kind, name, None) for name in _INNER_FORWARDS)


def has_torch_forward(module: nn.Module) -> bool:
    """Whether a module computes what some module of torch computes."""
    path = getattr(getattr(type(module), "forward", None), "__module__", None) or ""
    return path.startswith("torch.nn.") and not isinstance(module, nn.Sequential)


def _autocast() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


def _is_train_switch(module: nn.Module) -> bool:
    code = getattr(getattr(type(module), "forward", None), "__code__", None)
    is_own = not type(module).__module__.startswith("torch.")
    has_state = any(True for held in (module.parameters(), module.buffers(), module.children()) for _ in held)
    return is_own and code is not None and "training" in code.co_names and not has_state


def _remove_reparametrizations(module: nn.Module) -> None:
    """Leaves the weights that weight_norm, spectral_norm, pruning and other parametrizations compute."""
    if parametrize.is_parametrized(module):
        # Removal edits the class, which the copy shares with the caller's model: edit a class of its own.
        shared = type(module)
        module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
        for name in list(module.parametrizations):  # type: ignore[arg-type]
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    # The older forms are hooks that compute the weight anew at every call, and hooks that load what it is made of.
    for hook in module._forward_pre_hooks.values():
        if _is_from_torch(hook):
            hook.remove(module)  # type: ignore[attr-defined]
    for hooks in (module._forward_pre_hooks, module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key in [key for key, hook in hooks.items() if _is_from_torch(hook)]:
            del hooks[key]


def is_reparametrized(module: nn.Module) -> bool:
    """Whether a module's weight is computed anew at every call, by torch's own means."""
    return parametrize.is_parametrized(module) or any(map(_is_from_torch, module._forward_pre_hooks.values()))


def _is_from_torch(hook: Any) -> bool:
    return type(getattr(hook, "hook", hook)).__module__.startswith("torch.nn.utils.")


def _explain(model: nn.Module, error: Exception) -> str:
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if _TORCH not in Path(frame.filename).parents and Path(frame.filename).parent != _HERE:
            source = linecache.getline(frame.filename, frame.lineno or 0).strip()
            place = f" at {Path(frame.filename).name}:{frame.lineno} in {frame.name}: `{source}`"
    return (
        f"{type(model).__name__} cannot be captured by symbolic tracing{place} "
        f"({type(error).__name__}: {error}). Move the construct out of forward or into a module of its own, "
        "or compress the submodule that does not contain it"
    )
