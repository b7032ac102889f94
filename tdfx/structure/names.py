"""Names that may stand in the Python source that torch.fx generates from a graph."""

from __future__ import annotations

import keyword
import re

from torch import fx

from tdfx.errors import InputError

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
# What the generated source calls its own globals; an argument of such a name would stand in their place.
_TAKEN = frozenset({"self", *fx.graph._custom_builtins})
_OF_GRAPHS = frozenset({*dir(fx.GraphModule), *vars(fx.GraphModule({}, fx.Graph()))})


def identifier(name: object, what: str) -> str:
    """A plain identifier, and nothing else, for what the generated source assigns to.

    Raises:
        InputError: it is something else, a keyword, or a name of the generated source's own.
    """
    if name in _TAKEN:
        raise InputError(f"{what} is {name!r}; expected a plain Python identifier")
    return keyword_argument(name, what)


def keyword_argument(name: object, what: str) -> str:
    """A plain identifier, and nothing else; among them ``device``, which the generated source uses for its own.

    Raises:
        InputError: it is something else or a keyword.
    """
    if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name) or keyword.iskeyword(name):
        raise InputError(f"{what} is {name!r}; expected a plain Python identifier")
    return name


def path(name: object, what: str) -> str:
    """Qualified name of a module or tensor: letters, digits and underscores, joined by dots.

    Raises:
        InputError: it is something else, or reaches for what is no part of a network.
    """
    if not isinstance(name, str) or not _PATH.fullmatch(name):
        raise InputError(f"{what} is {name!r}; expected names joined by dots")
    parts = name.split(".")
    if parts[0] in _OF_GRAPHS or any(map(keyword.iskeyword, parts)):
        raise InputError(f"{what} is {name!r}, which names no part of a network")
    return name
