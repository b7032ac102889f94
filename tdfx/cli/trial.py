"""The command that tries tdfx out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tdfx.cli.options import Debug
from tdfx.cli.support import exit_codes


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the files.")] = Path("build/demo"),
    debug: Debug = False,
) -> None:
    """Train a small network on handwritten digits, compress it and compare the two."""
    with exit_codes(debug):
        from tdfx.demo import demo as run  # scikit-learn stands behind it, an optional extra

        failures = run(out, typer.echo)
        for failure in failures:
            typer.echo(f"error: {failure}", err=True)
        if failures:
            raise typer.Exit(1)
