"""The command that compares ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tdfx.bench import bench as bench_files
from tdfx.cli.options import Debug, Seed
from tdfx.cli.support import exit_codes
from tdfx.loading import example_inputs

INPUT_HELP = "1x3x224x224, or ids=2x128:int64 by name; drawn as the files declare it if left out."


def bench(
    files: Annotated[list[Path], typer.Argument(metavar="A.ONNX B.ONNX ...", help="The first is compared with.")],
    inputs: Annotated[
        list[str] | None, typer.Option("--input", metavar="[NAME=]SHAPE[:DTYPE]", help=INPUT_HELP)
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Of inputs that leave it open.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Of ONNX Runtime.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of each file.")] = 200,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Compare ONNX files on the CPU: how fast each runs and how far its outputs are from the first file's."""
    with exit_codes(debug):
        args, kwargs = example_inputs(inputs or (), seed)
        if args and kwargs:
            raise typer.BadParameter("name all inputs or none", param_hint="--input")
        typer.echo(str(bench_files(files, args or kwargs, batch=batch, threads=threads, rounds=rounds, seed=seed)))
