"""Whole files or none: everything is written to a private folder beside its final name and renamed."""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import takewhile
from pathlib import Path

from tdfx.errors import InputError


@contextmanager
def replacing(path: str | os.PathLike[str], *, optional: bool = False) -> Iterator[Path]:
    """Give a temporary path to write to; it takes its final name when the block ends without an error.

    The temporary path has the final file name and lies in a folder of its own inside the final folder, so files
    that the block writes beside it travel too (each replaced on its own, the named file last). Missing parent
    folders are made. On any error, an interrupt included, everything made here is removed again and files at the
    final names stay as they were. A symbolic link is followed, not replaced.

    Args:
        path: the final name.
        optional: whether nothing happens if the block writes nothing, which is an error otherwise.

    Yields:
        The temporary path; nothing exists there yet.

    Raises:
        InputError: the path cannot be written.
    """
    final = _final_path(path)
    with ExitStack() as undo:
        with _refusing(path):
            for parent in reversed([*takewhile(lambda folder: not folder.exists(), final.parents)]):
                parent.mkdir(exist_ok=True)
                undo.callback(_remove_if_empty, parent)  # never empty once the file is in place
            folder = Path(tempfile.mkdtemp(prefix=".tdfx-", dir=final.parent))
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
        staged = folder / final.name
        yield staged
        if optional and not staged.exists():
            return
        with _refusing(path):
            for part in [*(beside for beside in folder.iterdir() if beside != staged), staged]:
                os.replace(part, final.parent / part.name)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file whole or not at all.

    Raises:
        InputError: the path cannot be written.
    """
    with replacing(path) as staged, _refusing(path):
        staged.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write a value as indented JSON, whole or not at all.

    Raises:
        InputError: the path cannot be written.
        ValueError: the value holds NaN or Inf, which JSON has no words for.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _final_path(path: str | os.PathLike[str]) -> Path:
    """The path with links followed, if a file can be there."""
    with _refusing(path):
        text = os.fsdecode(path)
        final = Path(os.path.realpath(text))
        try:
            mode = final.stat().st_mode
        except FileNotFoundError:
            mode = stat.S_IFREG
        if stat.S_ISDIR(mode) or not os.path.basename(text):
            raise IsADirectoryError(0, "it names a folder, not a file")
        if not stat.S_ISREG(mode):  # renaming onto /dev/null would remove the device
            raise OSError(0, "it is a device or pipe, not a file")
    return final


@contextmanager
def _refusing(path: object) -> Iterator[None]:
    """Turn what the system says about a path into an InputError."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:  # TypeError, ValueError: no path at all, a null byte
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {str(path)!r}: {reason}; choose an output path that can be written") from error


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
