"""The command that draws a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tdfx.cli import options as given
from tdfx.cli.support import exit_codes, free_sizes, model_and_inputs, read_record, unless_none
from tdfx.drawing.files import check_format
from tdfx.records.capture import AUTO
from tdfx.records.plan import Plan
from tdfx.stages.capture import capture as capture_model
from tdfx.stages.graph import graph as find_graph


def graph(
    model: given.Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Picture: .svg or .png; .dot for Graphviz.")],
    inputs: given.Inputs = None,
    dynamic: given.Dynamic = None,
    weights: given.Weights = None,
    plan: Annotated[Path | None, typer.Option(metavar="PLAN.JSON", help="Colours layers by what they become.")] = None,
    target: given.Target = "ort-cpu",
    trainable: given.Trainable = False,
    capture: given.Capture = given.Captured.AUTO,
    seed: given.Seed = 0,
    debug: given.Debug = False,
) -> None:
    """Draw a network, with its critical path, and the layers coloured by what a plan makes of them."""
    with exit_codes(debug):
        check_format(out)
        made = None if plan is None else read_record(Plan, plan)
        network, args, kwargs = model_and_inputs(model, weights, inputs, seed)
        planned = None if made is None else made.capture
        captured = capture_model(
            network,
            args,
            kwargs,
            dynamic=free_sizes(dynamic),
            trainable=trainable if made is None else made.trainable,
            capture=planned or AUTO if capture is given.Captured.AUTO else capture.value,
        )
        found = find_graph(captured, made, target=unless_none(target))
        found.draw(out)
        typer.echo(f"{found}\n\n{out}: the picture")
