"""Progress of long work: on a terminal, silent in pipes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tdfx.errors import OptionError

Report = Callable[[str, int, int], None]
"""Called with a description, steps done and steps in all."""


@contextmanager
def reporter(progress: bool | Report | None) -> Iterator[Report]:
    """The function to report steps to.

    Args:
        progress: a function of the caller's, True or False to show or hide a bar on standard error, None to show it
            only where that is a terminal.
    """
    if callable(progress):
        yield progress
        return
    if not isinstance(progress, bool | None):
        raise OptionError(f"progress is {progress!r}; expected a function, True, False or None")
    if not (sys.stderr.isatty() if progress is None else progress):
        yield lambda description, done, total: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda description, done, total: bar.update(task, description=description, completed=done, total=total)
