"""The command ``tdfx``; its verbs mirror the Python functions.

Exit codes: 0 done, 1 an error (one message on standard error), 2 a usage error, 130 interrupted.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from tdfx.budget import Budget
from tdfx.decompositions import registry
from tdfx.errors import TdfxError
from tdfx.loading import example_inputs, load_model, load_weights
from tdfx.onnx_export import LEAST_OPSET, ExportReport
from tdfx.records.plan import MOST_SEED
from tdfx.saving import FILES, output_folder
from tdfx.stages.compress import compress as compress_model
from tdfx.tables import align, count
from tdfx.version import VERSION

app = typer.Typer(
    name="tdfx",
    help="Compresses trained PyTorch networks by tensor decomposition, to a budget, verified, down to the ONNX file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Verify(str, Enum):
    """What is verified."""

    PLAN = "plan"
    FULL = "full"


INPUT_HELP = "1x3x224x224, or input_ids=2x128:int64 for a keyword; one for each argument."
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """Runs the command line."""
    app(prog_name="tdfx")


@contextmanager
def exit_codes(debug: bool) -> Iterator[None]:
    """Turns errors into one message on standard error and the process's exit code."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None
    except typer.Exit:
        raise
    except (Exception, SystemExit) as error:  # SystemExit: a model may call sys.exit
        if debug:
            traceback.print_exc()
        elif isinstance(error, TdfxError):
            typer.echo(f"error: {error}", err=True)
        else:
            first = next(iter(str(error).splitlines()), "")
            typer.echo(f"error: unexpected {type(error).__name__}: {first}; --debug shows where", err=True)
        raise typer.Exit(1) from None


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"tdfx {VERSION}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Holds the options that go without a command; its own help text is the application's."""


@app.command()
def compress(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="package.module:factory or file.py:factory.")],
    inputs: Annotated[list[str], typer.Option("--input", metavar="[NAME=]SHAPE[:DTYPE]", help=INPUT_HELP)],
    budget: Annotated[str, typer.Option(metavar="BUDGET", help='For example "flops=50%" or "params=2M,flops=1.2G".')],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for ONNX file, weights, plan and report.")],
    weights: Annotated[Path | None, typer.Option(metavar="FILE", help="State dict, .pt or .safetensors.")] = None,
    methods: Annotated[str | None, typer.Option(metavar="A,B", help="Methods to choose from; all if left out.")] = None,
    include: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Only layers of such names.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="No layers of such names.")] = None,
    metric: Annotated[str | None, typer.Option(help="Of the errors: weight:relative if left out.")] = None,
    planner: Annotated[str, typer.Option(help="What chooses methods and ranks.")] = "knapsack",
    target: Annotated[str, typer.Option(help='Runtime the result is meant for, or "none".')] = "ort-cpu",
    rank_multiple: Annotated[int | None, typer.Option(help="Grid of ranks, 1: any; the target's if left out.")] = None,
    trainable: Annotated[bool, typer.Option("--trainable", help="Keep BatchNorm and Dropout for fine-tuning.")] = False,
    verify: Annotated[Verify, typer.Option(help="full: also every method at full rank on every layer.")] = Verify.PLAN,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of example inputs and decompositions.")] = 0,
    cache_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Keeps errors between runs.")] = None,
    opset: Annotated[int | None, typer.Option(min=LEAST_OPSET, help="ONNX operator set; torch's if left out.")] = None,
    debug: Debug = False,
) -> None:
    """Compress a model to a budget and write it as a verified ONNX file."""
    with exit_codes(debug):
        limits = Budget.parse(budget)
        args, kwargs = example_inputs(inputs, seed)
        with output_folder(out) as output:
            network = load_model(model)
            if weights is not None:
                load_weights(network, weights)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module=r"tdfx\.cli")  # the plan's notes, which the report prints
                result = compress_model(
                    network,
                    args,
                    kwargs,
                    budget=limits,
                    methods=None if methods is None else [name.strip() for name in methods.split(",")],
                    include=include or None,
                    exclude=exclude or None,
                    metric=metric,
                    planner=planner,
                    target=None if target == "none" else target,
                    rank_multiple=rank_multiple,
                    trainable=trainable,
                    verify=verify.value,
                    seed=seed,
                    cache_dir=cache_dir,
                )
            export = output.save(result, args, kwargs, opset=opset)
        typer.echo(f"{result.report}\n\n{_written(out, export)}")


@app.command()
def methods() -> None:
    """List the decomposition methods."""
    rows = [(method.name, method.summary, method.source) for method in registry().values()]
    typer.echo(align(("name", "replaces -> by", "source"), rows))


@app.command()
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


def _written(out: Path, export: ExportReport) -> str:
    size, batches = f"{count(export.file_bytes)}B", " and ".join(map(str, export.batch_sizes))
    return (
        f"ONNX Runtime differs by {export.max_rel_diff:.2g} of the largest output, {export.rtol:g} allowed, "
        f"at batch {batches}\n"
        f"{out}: model.onnx ({size}, opset {export.opset}), {', '.join(FILES)}; tdfx.load reads it"
    )
