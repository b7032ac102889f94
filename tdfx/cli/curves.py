"""The commands that show curves: what networks lose as they get cheaper, and what each layer does."""

from __future__ import annotations

import difflib
from operator import attrgetter
from pathlib import Path
from typing import Annotated

import typer

from tdfx.cli import options as given
from tdfx.cli.options import Captured
from tdfx.cli.support import (
    Source,
    cache_folder,
    exit_codes,
    free_sizes,
    model_and_inputs,
    names,
    read_record,
    unless_none,
)
from tdfx.errors import InputError
from tdfx.evaluation import Evaluate
from tdfx.files import replacing, write_text
from tdfx.loading import module_from_file, module_named
from tdfx.plots import check_matplotlib, plot_sensitivity
from tdfx.records.latency import LatencyTable
from tdfx.records.profile import Profile
from tdfx.stages.capture import capture as capture_model
from tdfx.stages.frontier import frontier as find_frontier
from tdfx.stages.latency import with_latency
from tdfx.stages.profile import profile as make_profile
from tdfx.stages.sensitivity import sensitivity as find_sensitivity
from tdfx.stages.sensitivity import to_csv, to_table

EVALUATE_HELP = "package.module:function or file.py:function that takes a network and returns its score."

Resource = Annotated[str, typer.Option(help="What cost is: flops, macs, params, bytes or latency.")]
Csv = Annotated[Path | None, typer.Option(metavar="FILE", help="Where the numbers go.")]
Png = Annotated[Path | None, typer.Option(metavar="FILE", help="Where a picture goes; takes matplotlib.")]


def frontier(
    model: given.Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Where the points go, as CSV.")],
    inputs: given.Inputs = None,
    dynamic: given.Dynamic = None,
    weights: given.Weights = None,
    data: given.Data = None,
    samples: given.Samples = None,
    mean: given.Mean = None,
    std: given.Std = None,
    output: given.Output = "auto",
    evaluate: Annotated[str | None, typer.Option(metavar="FUNCTION", help=EVALUATE_HELP)] = None,
    points: Annotated[int, typer.Option(min=2, help="Number of points.")] = 8,
    resource: Resource = "flops",
    png: Png = None,
    methods: given.Methods = None,
    include: given.Include = None,
    exclude: given.Exclude = None,
    metric: given.Metric = None,
    planner: given.Planner = "knapsack",
    target: given.Target = "ort-cpu",
    rank_multiple: given.RankMultiple = None,
    latency: given.Latency = None,
    trainable: given.Trainable = False,
    capture: given.Capture = Captured.AUTO,
    seed: given.Seed = 0,
    cache_dir: given.CacheDir = None,
    debug: given.Debug = False,
) -> None:
    """Show what the best networks lose as they get cheaper: predicted error, and score where it is measured."""
    with exit_codes(debug), replacing(out) as staged:
        if png is not None:
            check_matplotlib()
        network, args, kwargs = model_and_inputs(model, weights, inputs, seed)
        score = None if evaluate is None else load_evaluate(evaluate)
        source = Source.of(data, samples, mean, std, output)
        captured = capture_model(
            network, args, kwargs, dynamic=free_sizes(dynamic), trainable=trainable, capture=capture.value
        )
        cache = cache_folder(cache_dir)
        moments = None if source is None else source.moments(captured, metric, seed, cache)
        profiled = make_profile(
            captured,
            methods=names(methods),
            include=include or None,
            exclude=exclude or None,
            metric=metric,
            moments=moments,
            target=unless_none(target),
            rank_multiple=rank_multiple,
            seed=seed,
            cache_dir=cache,
        )
        if latency is not None:
            profiled = with_latency(profiled, read_record(LatencyTable, latency))
        found = find_frontier(
            captured,
            profiled,
            moments=moments,
            resource=resource,
            points=points,
            planner=planner,
            evaluate=score,
            cache_dir=cache,
        )
        write_text(staged, found.to_csv())
        if png is not None:
            found.to_png(png)
        typer.echo(f"{found}\n\n{', '.join(map(str, filter(None, (out, png))))}: the curve")


def sensitivity(
    file: Annotated[Path, typer.Argument(metavar="PROFILE.JSON", help="What tdfx profile wrote.")],
    resource: Resource = "flops",
    csv: Csv = None,
    png: Png = None,
    debug: given.Debug = False,
) -> None:
    """Show which layers resist: error against cost for every layer and method of a profile."""
    with exit_codes(debug):
        records = find_sensitivity(read_record(Profile, file), resource)
        if csv is not None:
            write_text(csv, to_csv(records))
        if png is not None:
            plot_sensitivity(records, png)
        typer.echo(to_table(records))


def load_evaluate(name: str) -> Evaluate:
    """The function that ``package.module:function`` or ``file.py:function`` names.

    Raises:
        InputError: nothing of this name can be imported, or it cannot be called.
    """
    source, _, attribute = name.rpartition(":")
    if not source or not attribute:
        raise InputError(f"evaluate {name!r}: expected package.module:function or file.py:function, with a colon")
    try:
        module = module_from_file(name, Path(source)) if source.endswith(".py") else module_named(name, source)
    except InputError as error:
        raise InputError(str(error).replace("model", "evaluate", 1)) from error
    try:
        found: Evaluate = attrgetter(attribute)(module)
    except AttributeError as error:
        near = difflib.get_close_matches(attribute, vars(module), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"evaluate {name!r}: {source} has no {attribute!r}{hint}") from error
    if not callable(found):
        raise InputError(f"evaluate {name!r}: found a {type(found).__name__}; expected a function")
    return found
