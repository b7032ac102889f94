"""The command ``tdfx``; its verbs mirror the Python functions.

Exit codes: 0 done, 1 an error (one message on standard error), 2 a usage error, 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from tdfx.cli.bench import bench
from tdfx.cli.curves import frontier, sensitivity
from tdfx.cli.graph import graph
from tdfx.cli.latency import latency, latency_fit, latency_kit
from tdfx.cli.listings import inspect, methods, passes
from tdfx.cli.stages import apply, compress, export, plan, profile
from tdfx.cli.trial import demo
from tdfx.version import VERSION

app = typer.Typer(
    name="tdfx",
    help="Compresses trained PyTorch networks by tensor decomposition, to a budget, verified, down to the ONNX file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Runs the command line."""
    app(prog_name="tdfx")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"tdfx {VERSION}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Holds the options that go without a command; its own help text is the application's."""


COMMANDS: tuple[Callable[..., None], ...] = (
    compress, profile, plan, apply, export, latency, latency_kit, latency_fit, bench, frontier, sensitivity,
    graph, inspect, methods, passes, demo,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)
