"""A folder of small JSON files that keeps what was expensive to compute; an interrupted run goes on from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from tdfx.files import write_text


class ListCache:
    """Lists of floats by key. A file that cannot be read counts as missing and is written anew."""

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)

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
