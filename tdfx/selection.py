"""Which layers are compressed and how, from the user's include, exclude and overrides."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from tdfx.decompositions import find_methods
from tdfx.decompositions.base import Decomposition
from tdfx.errors import OptionError
from tdfx.records.layer import Rank, Site, Skipped

KEYS = ("methods", "rank", "skip")


@dataclass(frozen=True)
class Selection:
    """The user's wishes about layers; globs match qualified names, ``*`` crosses dots.

    Attributes:
        methods: methods for every site.
        include: only layers that match one of these, all if empty.
        exclude: no layer that matches one of these.
        overrides: per glob, what differs there: "methods", "rank", "skip"; later globs win.
    """

    methods: tuple[Decomposition, ...]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    overrides: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(
        cls,
        methods: Sequence[str] | None,
        include: Sequence[str] | str | None,
        exclude: Sequence[str] | str | None,
        overrides: Mapping[str, Mapping[str, Any]] | None,
    ) -> Selection:
        """From the options of the public functions.

        Raises:
            OptionError: unknown method or key, or a value of the wrong form.
        """
        if not isinstance(overrides, Mapping | None):
            raise OptionError(f"overrides is a {type(overrides).__name__}; expected a dictionary by glob")
        for glob, wishes in (overrides or {}).items():
            if not isinstance(glob, str):
                raise OptionError(f"overrides has the key {glob!r}; expected a glob over layer names")
            if not isinstance(wishes, Mapping):
                raise OptionError(f"overrides[{glob!r}] is a {type(wishes).__name__}; expected a dictionary")
            for key in wishes:
                if key not in KEYS:
                    raise OptionError(f"overrides[{glob!r}] has {key!r}; understood are {', '.join(KEYS)}")
            if "rank" in wishes:
                as_rank(wishes["rank"], f"overrides[{glob!r}]['rank']")
            if "methods" in wishes:
                find_methods(wishes["methods"])
            if not isinstance(wishes.get("skip", False), bool):
                raise OptionError(f"overrides[{glob!r}]['skip'] is {wishes['skip']!r}; expected True or False")
        included = _globs(include, "include")
        if include is not None and not included:
            raise OptionError("include is empty; name at least one glob, or leave it out for all layers")
        return cls(find_methods(methods), included, _globs(exclude, "exclude"), dict(overrides or {}))

    def check(self, names: Sequence[str]) -> None:
        """Raises OptionError for a glob that matches none of the model's layers."""
        for option, globs in (("include", self.include), ("exclude", self.exclude), ("overrides", self.overrides)):
            for glob in globs:
                if not any(fnmatchcase(name, glob) for name in names):
                    some = ", ".join(names[:5])
                    raise OptionError(
                        f"{option}: {glob!r} matches no layer; the model has {some}{', ...' * (len(names) > 5)}"
                    )

    def check_one_method(self) -> None:
        """Raises OptionError where several methods stand to choice, of which a rank rule could not say the better."""
        choices = {"methods": self.methods}
        choices |= {
            f"overrides[{glob!r}]['methods']": find_methods(wishes["methods"])
            for glob, wishes in self.overrides.items()
            if "methods" in wishes
        }
        for option, methods in choices.items():
            if len(methods) != 1:
                raise OptionError(
                    f"{option} names {', '.join(method.name for method in methods)}; expected exactly one method with "
                    'ranks, e.g. methods="tucker2", or a budget instead'
                )

    def reason_to_skip(self, site: Site) -> Skipped | None:
        """Why the user leaves this site alone, if so."""
        if self.include and not _matches(site, self.include):
            return Skipped(site.name, f"not among include ({', '.join(self.include)})")
        if _matches(site, self.exclude):
            return Skipped(site.name, f"excluded ({', '.join(self.exclude)})")
        if self._wishes(site).get("skip"):
            return Skipped(site.name, "skipped by overrides")
        return None

    def methods_for(self, site: Site) -> tuple[Decomposition, ...]:
        """The methods to try at this site."""
        wishes = self._wishes(site)
        return find_methods(wishes["methods"]) if "methods" in wishes else self.methods

    def rank_for(self, site: Site) -> Rank | None:
        """The rank fixed for this site, if any."""
        wishes = self._wishes(site)
        return as_rank(wishes["rank"], "rank") if "rank" in wishes else None

    def _wishes(self, site: Site) -> dict[str, Any]:
        wishes: dict[str, Any] = {}
        for glob, values in self.overrides.items():
            if _matches(site, [glob]):
                wishes.update(values)
        return wishes


def as_rank(value: object, what: str) -> Rank:
    """A rank from an integer or a sequence of integers.

    Raises:
        OptionError: naming ``what``.
    """
    entries: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if not entries or not all(isinstance(r, int) and not isinstance(r, bool) and r >= 1 for r in entries):
        raise OptionError(
            f"{what} is {value!r}; expected a positive integer, or several for a method with several ranks"
        )
    return tuple(int(r) for r in entries)


def _matches(site: Site, globs: Sequence[str]) -> bool:
    """Whether any layer of a site is meant."""
    return any(fnmatchcase(layer.name, glob) for layer in site.layers for glob in globs)


def _globs(value: Collection[str] | str | None, option: str) -> tuple[str, ...]:
    globs = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(globs, Collection) or not all(isinstance(glob, str) for glob in globs):
        raise OptionError(f"{option} is {value!r}; expected a glob over layer names, or several")
    return tuple(globs)
