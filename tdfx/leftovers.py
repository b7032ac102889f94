"""What killed runs leave in a cache folder, and how it goes away."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from pathlib import Path

DAYS = 7.0
"""After so many days without a write a run counts as dead; a living one writes, or ``touch``es, much more often."""

HEX = "[0-9a-f]"
PATTERNS = (
    f"batches-{HEX * 32}",
    f"partial-{HEX * 32}.safetensors",
    f"partial-{HEX * 32}-{HEX * 16}.safetensors",
    f"tune-{HEX * 32}.pt",
    ".tdfx-????????",  # where files are written before they take their names
)


def remove_leftovers(folder: Path, key: str) -> None:
    """Removes what no run has touched for ``DAYS``.

    Age is the whole rule: it holds across hosts and containers that share a folder, which see neither each other's
    processes nor, always, each other's locks.

    Args:
        folder: the cache.
        key: of the run that opens it; files with it in their names, from which it may go on, stay whatever their age.
    """
    now = time.time()
    for path in [path for pattern in PATTERNS for path in folder.glob(pattern) if key not in path.name]:
        with suppress(OSError):  # another run may be removing it
            if now - path.stat().st_mtime < DAYS * 86400:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
