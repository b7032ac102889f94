"""A folder of small JSON files that keeps what was expensive to compute; an interrupted run goes on from it."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tdfx.errors import InputError, OptionError
from tdfx.files import write_text


class ListCache:
    """Lists of floats by key. A file that cannot be read counts as missing and is written anew.

    Raises:
        InputError: the folder cannot be made.
        OptionError: the folder is no path.
    """

    def __init__(self, folder: str | Path | None) -> None:
        if folder is not None and not isinstance(folder, str | Path):
            raise OptionError(f"cache_dir is a {type(folder).__name__}; expected a path, or None for no cache")
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        try:  # before the long work, not at its first result
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cache_dir {folder}: {error.strerror}; choose a folder that can be written") from error

    def get(self, key: tuple[object, ...], length: int, compute: Callable[[], list[float]]) -> list[float]:
        """The cached list of this length for this key, or what ``compute`` returns, kept for the next time."""
        if self.folder is None:
            return compute()
        path = self.folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.json"
        try:
            values = json.loads(path.read_text())
            if _is_list_of_numbers(values, length):
                return values  # type: ignore[no-any-return]
        except (OSError, ValueError):
            pass
        computed = compute()
        write_text(path, json.dumps(computed))
        return computed


def user_cache() -> Path:
    """The folder for what this user's runs keep: ``$XDG_CACHE_HOME/tdfx``, without that variable ``~/.cache/tdfx``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "tdfx")


@cache
def sources_digest(package: str) -> str:
    """SHA-256 of a package's source files; as part of a key it leaves out what other code computed."""
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    digest = hashlib.sha256()
    for path in sorted(Path(spec.origin).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _is_list_of_numbers(value: object, length: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == length
        and all(isinstance(entry, float) and math.isfinite(entry) for entry in value)
    )
