"""A network whose own forward runs as Python, in the form of a graph: one node that calls the whole of it.

Control flow that depends on values has no graph. What passes need of one is still there: placeholders for the inputs,
an output, and layers under their qualified names, whose calls ``LayerInterpreter`` sees inside the node.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

ROOT = "_root"
FIXED = "fixed"
"""Key, in the meta of the graph module, of the layers that nothing may take the place of, with reasons."""

_TABLES = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")


def run_root(root: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The call that stands in the graph."""
    return root(*args, **kwargs)


class InPlace(fx.GraphModule):
    """A graph that calls ``root`` and has its parameters, buffers and submodules, under their names.

    Args:
        root: the network; it is run as it is, and shows what is exchanged here.
        graph: what ``of`` makes, or a copy.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__({ROOT: root}, graph, type(root).__name__)
        # Only its tables: as a submodule it would give everything a second name.
        self._modules.clear()
        vars(self)[ROOT] = root
        for table in _TABLES:
            vars(self)[table] = vars(root)[table]
        self.training = root.training

    @classmethod
    def of(cls, root: nn.Module, positional: int, keywords: Collection[str]) -> InPlace:
        """The graph of calls with so many positional arguments and these keywords."""
        graph = fx.Graph()
        args = [graph.placeholder(name) for name in _names(root, positional)]
        kwargs: dict[str, Any] = {name: graph.placeholder(name) for name in keywords}
        called = graph.call_function(run_root, (graph.get_attr(ROOT), *args), kwargs)
        graph.output(called)
        return cls(root, graph)

    @property
    def root(self) -> nn.Module:
        """The network itself, of the class that the user gave it."""
        found = vars(self)[ROOT]
        assert isinstance(found, nn.Module)
        return found

    def forked(self) -> InPlace:
        """A copy that shares the parameters; what forward does to anything else does not reach this one."""
        duplicate = InPlace(sharing(self.root), copy.deepcopy(self.graph))
        duplicate.meta.update(self.meta)
        return duplicate

    def get_submodule(self, target: str) -> nn.Module:
        """The module at a qualified name, which may be one that torch.fx uses itself ("graph")."""
        return self.root.get_submodule(target) if target else self

    def train(self, mode: bool = True) -> InPlace:
        """As for any module; the root has a mode of its own."""
        self.root.train(mode)
        self.training = mode
        return self

    def delete_all_unused_submodules(self) -> None:
        """None is known to be unused."""

    def __reduce__(self) -> tuple[Any, ...]:
        (call,) = self.graph.find_nodes(op="call_function", target=run_root)
        return _rebuilt, (self.root, len(call.args) - 1, tuple(call.kwargs), self.meta)

    def __deepcopy__(self, memo: dict[int, Any]) -> InPlace:
        duplicate = InPlace(duplicated(self.root, memo), copy.deepcopy(self.graph))
        duplicate.meta.update(self.meta)
        return duplicate


def _rebuilt(root: nn.Module, positional: int, keywords: Collection[str], meta: dict[str, Any]) -> InPlace:
    module = InPlace.of(root, positional, keywords)
    module.meta.update(meta)
    return module


def duplicated(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy; of what earlier runs left behind, as the weight of weight_norm or a list, without its history."""
    memo = {} if memo is None else memo
    held = [value for part in model.modules() for values in (vars(part), part._buffers) for value in values.values()]
    for value in pytree.tree_leaves(held):
        if isinstance(value, Tensor) and not value.is_leaf:
            memo.setdefault(id(value), value.detach().clone())
    return copy.deepcopy(model, memo)


def sharing(model: nn.Module) -> nn.Module:
    """A copy that has the same parameters, and everything else of its own."""
    return duplicated(model, {id(parameter): parameter for parameter in model.parameters()})


def _names(root: nn.Module, count: int) -> list[str]:
    """Names for positional arguments, as forward calls them."""
    names: list[str] = []
    for parameter in inspect.signature(root.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{index}" for index in range(count - len(names))]
            break
        names.append(parameter.name)
    return names[:count]
