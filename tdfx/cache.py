"""A folder of small JSON files that keeps what was expensive to compute; an interrupted run goes on from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
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

    def get(self, key: tuple[object, ...], compute: Callable[[], list[float]]) -> list[float]:
        """The cached list for this key, or what ``compute`` returns, kept for the next time."""
        if self.folder is None:
            return compute()
        path = self.folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.json"
        try:
            values = json.loads(path.read_text())
            if isinstance(values, list) and all(isinstance(value, float) for value in values):
                return values
        except (OSError, ValueError):
            pass
        computed = compute()
        write_text(path, json.dumps(computed))
        return computed
