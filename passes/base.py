"""The contract of a graph pass and the driver that enforces it.

A pass is a frozen dataclass whose fields are its options. ``run`` checks the graph before and after it: an
analysis pass must leave the graph as it was, a rewrite pass must return a valid graph and leave its input alone.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar, cast

from torch import fx, nn

from tdfx.errors import PassError, TdfxError
from tdfx.passes.in_place import InPlace

T = TypeVar("T")
Layer = nn.Linear | nn.modules.conv._ConvNd


class GraphPass(ABC, Generic[T]):
    """Base of all passes."""

    @property
    def name(self) -> str:
        """As errors print it."""
        return type(self).__name__

    def run(self, graph_module: fx.GraphModule) -> T:
        """Checks the graph, runs the pass, checks what it left.

        Raises:
            PassError: the graph is invalid before or after the pass, or the pass edited what it was given.
        """
        check(graph_module, f"before {self.name}")
        before = describe(graph_module)
        try:
            result = self.apply(graph_module)
        except TdfxError:
            raise
        except Exception as error:
            raise PassError(f"pass {self.name} failed: {type(error).__name__}: {error}") from error
        if describe(graph_module) != before:
            raise PassError(f"pass {self.name} edited the graph it was given; it must work on a copy")
        return result

    @abstractmethod
    def apply(self, graph_module: fx.GraphModule) -> T:
        """The pass itself; called by ``run``."""


class AnalysisPass(GraphPass[T]):
    """Reads a graph and returns records."""


class RewritePass(GraphPass[fx.GraphModule]):
    """Returns a new graph module; submodules may be shared with the input but are never changed in place."""

    def apply(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        rewritten = fork(graph_module)
        self.rewrite(rewritten)
        rewritten.delete_all_unused_submodules()
        check(rewritten, f"after {self.name}")
        rewritten.recompile()
        return rewritten

    @abstractmethod
    def rewrite(self, graph_module: fx.GraphModule) -> None:
        """Edits graph and submodule table of a fork; replaces submodules rather than changing them."""


def fork(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A graph module with its own graph and module tree whose leaf modules, or parameters at least, are shared."""
    if isinstance(graph_module, InPlace):
        return graph_module.forked()
    return assemble(graph_module, copy.deepcopy(graph_module.graph))


def assemble(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A graph over the parts of ``root`` that it uses; what torch.fx adds to hold them is set up as in ``root``."""
    if isinstance(root, InPlace):
        return InPlace(root.root, graph)
    graph_module = Network(root, graph, type(root).__name__)
    for name, holder in graph_module.named_modules():
        holder.training = root.get_submodule(name).training
    _keep_out(graph_module, _kept_out(root))
    return graph_module


class Network(fx.GraphModule):
    """A graph module whose copies have in their state dict what it has; in torch.fx's own, all buffers are."""

    def __copy__(self) -> fx.GraphModule:
        copied = assemble(self, self.graph)
        copied.meta = self.meta
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        copied = super().__deepcopy__(memo)
        _keep_out(copied, _kept_out(self))
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        make, args = super().__reduce__()
        return _unpickled, (make, args, _kept_out(self))


def _unpickled(
    make: Callable[..., fx.GraphModule], args: tuple[Any, ...], kept_out: Mapping[str, set[str]]
) -> fx.GraphModule:
    plain = make(*args)
    _keep_out(plain, kept_out)
    graph_module = assemble(plain, plain.graph)
    for name, value in vars(plain).items():
        if not hasattr(graph_module, name):
            setattr(graph_module, name, value)
    return graph_module


def _kept_out(root: nn.Module) -> dict[str, set[str]]:
    """By module, names of its buffers that are in no state dict."""
    modules = root.named_modules(remove_duplicate=False)
    return {name: set(part._non_persistent_buffers_set) for name, part in modules if part._non_persistent_buffers_set}


def _keep_out(graph_module: fx.GraphModule, names: Mapping[str, set[str]]) -> None:
    for name, holder in graph_module.named_modules(remove_duplicate=False):
        holder._non_persistent_buffers_set |= names.get(name, set()) & holder._buffers.keys()


def describe(graph_module: fx.GraphModule) -> tuple[str, tuple[tuple[str, int], ...]]:
    """The graph's text and the identities of modules, parameters and buffers: other once one of them is exchanged."""
    named = (graph_module.named_modules, graph_module.named_parameters, graph_module.named_buffers)
    held = tuple((name, id(value)) for names in named for name, value in names(remove_duplicate=False))
    return str(graph_module.graph), held


def check(graph_module: fx.GraphModule, when: str) -> None:
    """Raises PassError, naming the node, unless the graph is well formed and all its targets exist."""
    try:
        graph_module.graph.lint()
    except Exception as error:
        raise PassError(f"{when}: {error}") from error


def layer_at(root: nn.Module, path: str) -> Layer:
    """The Linear or convolution layer at a qualified name."""
    return cast(Layer, root.get_submodule(path))


def call_chain(chain: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The output of layers in order, of which the first one takes all that the layer they stand for is called with."""
    first, *others = chain.children()
    value = first(*args, **kwargs)
    for layer in others:
        value = layer(value)
    return value


def set_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module at a qualified name, replacing what is there."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def exchange(root: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module in the place of the one at a qualified name, under all names that it has."""
    given = root.get_submodule(path)
    for holder in list(root.modules()):
        for name, child in holder._modules.items():
            if child is given:
                holder._modules[name] = module
