"""How a network is called: where in its arguments the tensors lie; all else there is constant."""

from __future__ import annotations

import inspect
import keyword
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

Path = tuple[Any, ...]  # torch's steps into containers
VIEWED = "_tdfx_viewed"  # of a view's class: the model's own


@dataclass(frozen=True)
class Slot:
    """The place of a tensor."""

    name: str


@dataclass(frozen=True, eq=False)
class Signature:
    """One way to call a network.

    Attributes:
        args: positional arguments by name: each a ``Slot``, a constant, or containers of these.
        kwargs: arguments by keyword.
    """

    args: dict[str, Any]
    kwargs: dict[str, Any]

    @classmethod
    def of(
        cls, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Signature, tuple[Tensor, ...]]:
        """That of a call, and its tensors in order."""
        given = dict(zip(_names(forward, args, kwargs), args, strict=True)), dict(kwargs)
        found = {path[1:]: leaf for path, leaf in _leaves(given) if isinstance(leaf, Tensor)}
        slots = iter(_unique(found, {*given[0], *given[1]}))
        tree = pytree.tree_map(lambda leaf: Slot(next(slots)) if isinstance(leaf, Tensor) else leaf, given)
        return cls(*tree), tuple(found.values())

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the tensors: the key of an entry where no other tensor has it, else all keys on the way to it."""
        return tuple(leaf.name for _, leaf in _leaves((self.args, self.kwargs)) if isinstance(leaf, Slot))

    @property
    def is_plain(self) -> bool:
        """Whether every argument is a tensor."""
        return all(isinstance(value, Slot) for value in (*self.args.values(), *self.kwargs.values()))

    @property
    def constants(self) -> dict[str, Any]:
        """What is no tensor, by its place as one would write it, e.g. "options['scale']"."""
        found = [(path[1:], leaf) for path, leaf in _leaves((self.args, self.kwargs)) if not isinstance(leaf, Slot)]
        return {f"{path[0].key}{pytree.keystr(path[1:])}": leaf for path, leaf in found}

    def call(self, tensors: Iterable[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, positional and by keyword, with these for tensors."""
        left = iter(tensors)
        args, kwargs = pytree.tree_map(
            lambda leaf: next(left) if isinstance(leaf, Slot) else leaf, (self.args, self.kwargs)
        )
        return tuple(args.values()), kwargs


def with_flat_call(model: nn.Module, signature: Signature) -> nn.Module:
    """A view of a model, on the same parts, whose forward takes the tensors of a call alone, in order."""
    inner = _forward(model)

    def forward(self: nn.Module, *tensors: Any) -> Any:
        args, kwargs = signature.call(tensors)
        return inner(self, *args, **kwargs)

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in signature.names]
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    return _view(model, forward, inspect.Signature([itself, *parameters]))


def with_output(model: nn.Module, change: Callable[[Any], Any]) -> nn.Module:
    """A view of a model, on the same parts, whose forward returns what is made of the model's output."""
    inner = _forward(model)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return change(inner(self, *args, **kwargs))

    return _view(model, forward, inspect.signature(inner))


def _forward(model: nn.Module) -> Callable[..., Any]:
    """A model's forward, as a function of model and arguments."""
    own = vars(model).get("forward")
    return type(model).forward if own is None else lambda self, *args, **kwargs: own(*args, **kwargs)


def _view(model: nn.Module, forward: Callable[..., Any], signature: inspect.Signature) -> nn.Module:
    kind = type(model)
    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__wrapped__ = kind.forward  # type: ignore[attr-defined]
    # A graph module compiles forward anew when it is copied.
    base = nn.Module if issubclass(kind, fx.GraphModule) else kind
    # Some models look themselves up by the name of their class.
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, VIEWED: getattr(kind, VIEWED, kind)}
    view: nn.Module = nn.Module.__new__(type(kind.__name__, (base,), {"forward": forward, **named}))
    view.__dict__.update({key: value for key, value in vars(model).items() if key != "forward"})
    return view


def without_flat_call(view: nn.Module) -> nn.Module:
    """The model, called as it was, on the parts that a view of it has now."""
    model: nn.Module = nn.Module.__new__(getattr(type(view), VIEWED))
    model.__dict__.update(vars(view))
    return model


def named_leaves(tree: Any) -> dict[str, Any]:
    """What lies in nested containers, named as the tensors of a call are."""
    found = dict(_leaves(tree))
    names = _unique(found, {str(key) for key in tree} if isinstance(tree, Mapping) else ())
    return dict(zip(names, found.values(), strict=True))


def _names(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """Of the positional arguments."""
    try:
        bound = inspect.signature(forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return [f"input_{index}" for index in range(len(args))]  # running it says what is wrong
    names: list[str] = []
    for name, value in bound.arguments.items():
        several = bound.signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
        names += [f"{name}_{index}" for index in range(len(value))] if several else [name]
    return [name for name in names if name not in kwargs][: len(args)]


def _leaves(tree: Any) -> list[tuple[Path, Any]]:
    return pytree.tree_flatten_with_path(tree)[0]


def _unique(paths: Iterable[Path], arguments: Collection[str]) -> list[str]:
    """Identifiers: last keys where these differ from all others and from arguments, all keys joined elsewhere."""
    keys = [[str(getattr(step, "key", getattr(step, "name", getattr(step, "idx", "")))) for step in p] for p in paths]
    short, whole = ([_identifier(part) for part in parts] for parts in ((k[-1:] for k in keys), keys))
    many = Counter(short)
    taken: Counter[str] = Counter()
    names = []
    for last, joined, path in zip(short, whole, keys, strict=True):
        is_clear = len(path) == 1 or (many[last] == 1 and last not in arguments and not path[-1].isdecimal())
        name = last if is_clear else joined
        taken[name] += 1
        names.append(name if taken[name] == 1 else f"{name}_{taken[name]}")
    return names


def _identifier(parts: Iterable[str]) -> str:
    name = re.sub(r"\W", "_", "_".join(parts))
    return name if name.isidentifier() and not keyword.iskeyword(name) and name != "self" else f"_{name}"
