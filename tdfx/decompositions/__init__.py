"""Decomposition methods: one file each, found by themselves.

A module of this package that defines a concrete ``Decomposition`` adds a method; nothing else needs to know of it.
"""

from __future__ import annotations

import difflib
import inspect
import pkgutil
from collections.abc import Iterable
from functools import cache
from importlib import import_module

from tdfx.decompositions.base import Decomposition
from tdfx.decompositions.grouped import in_groups
from tdfx.errors import OptionError
from tdfx.records.layer import Site


@cache
def registry() -> dict[str, Decomposition]:
    """All methods by name, in alphabetical order."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            if _is_method(value) and value.__module__ == module.__name__:
                found[value.name] = value()
    return dict(sorted(found.items()))


def method_for(site: Site, name: str) -> Decomposition:
    """The method of this name as it is at a site, whose layer may be in groups."""
    return in_groups(registry()[name], site.layer.groups)


def find_methods(names: Iterable[str] | None) -> tuple[Decomposition, ...]:
    """The methods of these names, all of them for None.

    Raises:
        OptionError: for a name that no method has, or an empty selection.
    """
    known = registry()
    if names is None:
        return tuple(known.values())
    if not isinstance(names, Iterable):
        raise OptionError(f"methods is {names!r}; expected names, of {', '.join(known)}")
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise OptionError(f"methods is empty; name at least one of {', '.join(known)}, or leave it out for all")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            raise OptionError(f"unknown method {name!r}{hint} known methods: {', '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(names))


def _is_method(value: object) -> bool:
    is_concrete = inspect.isclass(value) and issubclass(value, Decomposition) and not inspect.isabstract(value)
    return is_concrete and hasattr(value, "name")  # what has a name only of another's is no method of its own
