"""The commands that compress: all of it in one, or stage by stage with a file between each two."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from tdfx.budget import Budget
from tdfx.cli import options as given
from tdfx.cli.curves import EVALUATE_HELP, load_evaluate
from tdfx.cli.listings import parity
from tdfx.cli.options import Captured, Guarded, Quantized, Verify
from tdfx.cli.support import (
    Source,
    asked_runtime,
    cache_folder,
    exit_codes,
    free_sizes,
    model_and_inputs,
    names,
    read_record,
    unless_none,
    write_onnx,
)
from tdfx.errors import ExportError
from tdfx.files import replacing, write_text
from tdfx.latency.runner import CPU
from tdfx.loading import draw_inputs, example_inputs, open_model
from tdfx.moments import Moments
from tdfx.onnx_export import ExportReport
from tdfx.records.capture import AUTO, INPLACE
from tdfx.records.latency import LatencyTable
from tdfx.records.plan import MEASURED, Plan
from tdfx.records.profile import Profile
from tdfx.saving import FILES, INT8_ONNX, ONNX, load, output_folder
from tdfx.stages.apply import apply as apply_plan
from tdfx.stages.capture import capture as capture_model
from tdfx.stages.compress import UNTIMED
from tdfx.stages.compress import compress as compress_model
from tdfx.stages.guard import limits_latency
from tdfx.stages.latency import notes_on, with_latency
from tdfx.stages.plan import plan as make_plan
from tdfx.stages.profile import profile as make_profile
from tdfx.stages.tune import tune as tune_result

MOMENTS = "moments.safetensors"


def compress(
    model: given.Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for ONNX file, weights, plan and report.")],
    inputs: given.Inputs = None,
    dynamic: given.Dynamic = None,
    weights: given.Weights = None,
    budget: given.Budget = None,
    ranks: given.Ranks = None,
    methods: given.Methods = None,
    include: given.Include = None,
    exclude: given.Exclude = None,
    metric: given.Metric = None,
    data: given.Data = None,
    samples: given.Samples = None,
    mean: given.Mean = None,
    std: given.Std = None,
    output: given.Output = "auto",
    correct: given.Correct = True,
    tune: Annotated[float | None, typer.Option(metavar="MINUTES", help="Train on --data, without labels.")] = None,
    evaluate: Annotated[str | None, typer.Option(metavar="FUNCTION", help=EVALUATE_HELP)] = None,
    minimize: Annotated[str, typer.Option(help="What a drop buys: flops, macs, params, bytes or latency.")] = "flops",
    planner: given.Planner = "knapsack",
    target: given.Target = "ort-cpu",
    guard: given.Guard = Guarded.ESTIMATED,
    threads: given.Threads = 1,
    provider: given.Provider = CPU,
    session_config: given.SessionConfig = None,
    rank_multiple: given.RankMultiple = None,
    trainable: given.Trainable = False,
    capture: given.Capture = Captured.AUTO,
    verify: given.Verification = Verify.PLAN,
    seed: given.Seed = 0,
    cache_dir: given.CacheDir = None,
    opset: given.Opset = None,
    fixed_batch: given.FixedBatch = False,
    quantize: given.Quantize = None,
    debug: given.Debug = False,
) -> None:
    """Compress a model to a budget and write it as a verified ONNX file."""
    with exit_codes(debug):
        if (budget is None) == (ranks is None):
            raise typer.BadParameter("give exactly one of --budget and --ranks")
        if tune is not None and not 0 < tune < math.inf:
            raise typer.BadParameter(f"{tune} is no number of minutes above 0", param_hint="--tune")
        if tune is not None and data is None:
            raise typer.BadParameter("name the inputs to train on by --data", param_hint="--tune")
        limits = None if budget is None else Budget.parse(budget)
        free, free_in_file = free_sizes(dynamic), free_sizes(dynamic, fixed_batch)
        runtime = asked_runtime(threads, provider, session_config)
        cache = cache_folder(cache_dir)
        with output_folder(out) as folder:
            network, args, kwargs = model_and_inputs(model, weights, inputs, seed)
            score = None if evaluate is None else load_evaluate(evaluate)
            source, moments = Source.of(data, samples, mean, std, output), None
            if source is not None:
                captured = capture_model(
                    network, args, kwargs, dynamic=free, trainable=trainable, capture=capture.value
                )
                moments = source.moments(captured, metric, seed, cache)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module=r"tdfx\.cli")  # the plan's notes, which the report prints
                result = compress_model(
                    network,
                    args,
                    kwargs,
                    dynamic=free,
                    budget=limits,
                    ranks=ranks,
                    methods=names(methods),
                    include=include or None,
                    exclude=exclude or None,
                    metric=metric,
                    calibration=moments,
                    correct=correct,
                    planner=planner,
                    target=unless_none(target),
                    guard=guard.value,
                    runtime=runtime,
                    rank_multiple=rank_multiple,
                    trainable=trainable,
                    capture=capture.value,
                    verify=verify.value,
                    seed=seed,
                    minimize=minimize,
                    evaluate=score,
                    cache_dir=cache,
                )
            if tune is not None and source is not None:
                result = tune_result(
                    result, source.read(captured), output=output, minutes=tune, seed=seed, cache_dir=cache
                )
            calibration = None if source is None or quantize is None else source.read(captured)
            written: ExportReport | ExportError
            try:
                written = write_onnx(
                    folder,
                    result,
                    args,
                    kwargs,
                    opset,
                    free_in_file,
                    quantize,
                    calibration,
                    samples,
                    None if quantize is None else score,
                )
            except ExportError as error:
                if result.report.tier != INPLACE:
                    raise
                folder.save_result(result)
                written = error
        typer.echo(f"{result.report}\n")
        if isinstance(written, ExportError):
            typer.echo(f"{_files(out, *FILES)}; tdfx.load reads it with the model\nnote: no ONNX file: {written}")
        else:
            typer.echo(f"{_exported(out, written, *FILES)}; tdfx.load reads it{_stale(out, quantize)}")


def profile(
    model: given.Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Where it goes, as JSON.")],
    inputs: given.Inputs = None,
    dynamic: given.Dynamic = None,
    weights: given.Weights = None,
    ranks: given.Ranks = None,
    methods: given.Methods = None,
    include: given.Include = None,
    exclude: given.Exclude = None,
    metric: given.Metric = None,
    data: given.Data = None,
    samples: given.Samples = None,
    mean: given.Mean = None,
    std: given.Std = None,
    output: given.Output = "auto",
    correct: given.Correct = True,
    target: given.Target = "ort-cpu",
    rank_multiple: given.RankMultiple = None,
    trainable: given.Trainable = False,
    capture: given.Capture = Captured.AUTO,
    seed: given.Seed = 0,
    cache_dir: given.CacheDir = None,
    debug: given.Debug = False,
) -> None:
    """Find what can be compressed and what each choice costs and loses; the slow stage, kept in a cache.

    With --data the moments of the inputs go to moments.safetensors beside it, for tdfx apply.
    """
    with exit_codes(debug), replacing(out) as staged:
        network, args, kwargs = model_and_inputs(model, weights, inputs, seed)
        captured = capture_model(
            network, args, kwargs, dynamic=free_sizes(dynamic), trainable=trainable, capture=capture.value
        )
        cache = cache_folder(cache_dir)
        source = Source.of(data, samples, mean, std, output)
        moments = None if source is None else source.moments(captured, metric, seed, cache)
        found = make_profile(
            captured,
            methods=names(methods),
            ranks=ranks,
            include=include or None,
            exclude=exclude or None,
            metric=metric,
            moments=moments,
            correct=correct,
            target=unless_none(target),
            rank_multiple=rank_multiple,
            seed=seed,
            cache_dir=cache,
        )
        write_text(staged, found.to_json())
        if moments is not None:
            moments.save(staged.parent / MOMENTS)  # goes with the profile when that is in its place
        beside = "" if moments is None else f"\n{out.parent / MOMENTS}: moments; tdfx apply takes them as --moments"
        typer.echo(f"{found}\n\n{out}: profile; tdfx plan reads it{beside}")


def plan(
    file: Annotated[Path, typer.Argument(metavar="PROFILE.JSON", help="What tdfx profile wrote.")],
    budget: given.Budget = None,
    planner: given.Planner = "knapsack",
    latency: given.Latency = None,
    guard: given.Guard = Guarded.ESTIMATED,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Where it goes, as JSON.")] = None,
    debug: given.Debug = False,
) -> None:
    """Choose a method and rank for every layer, within a budget or as the profile's rank rule says."""
    with exit_codes(debug):
        profiled = read_record(Profile, file)
        notes: tuple[str, ...] = ()
        is_guarded = guard is Guarded.MEASURED
        if latency is not None:
            table = read_record(LatencyTable, latency)
            profiled, notes = with_latency(profiled, table), notes_on(table, profiled)
        if is_guarded and profiled.latency_source != MEASURED:
            raise typer.BadParameter("name the times to go by with --latency", param_hint="--guard")
        if is_guarded and profiled.rank_rule is not None:
            raise typer.BadParameter(
                f"{file} holds ranks by {profiled.rank_rule}, which leaves nothing to guard; profile without --ranks",
                param_hint="--guard",
            )
        if is_guarded or (latency is not None and limits_latency(Budget.parse(budget) if budget else None)):
            notes = (*notes, UNTIMED)
        chosen = make_plan(profiled, budget, planner=planner, slower=not is_guarded)
        chosen = replace(chosen, notes=(*chosen.notes, *notes))
        if out is not None:
            write_text(out, chosen.to_json())
        typer.echo(str(chosen) if out is None else f"{chosen}\n\n{out}: plan; tdfx apply reads it")


def apply(
    model: given.Model,
    file: Annotated[Path, typer.Argument(metavar="PLAN.JSON", help="What tdfx plan wrote; it may be edited.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for weights, structure, plan and report.")],
    inputs: given.Inputs = None,
    dynamic: given.Dynamic = None,
    weights: given.Weights = None,
    moments: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What tdfx profile --data wrote; for plans made with data.")
    ] = None,
    data: given.Data = None,
    samples: given.Samples = None,
    mean: given.Mean = None,
    std: given.Std = None,
    output: given.Output = "auto",
    cache_dir: given.CacheDir = None,
    capture: given.Capture = Captured.AUTO,
    verify: given.Verification = Verify.PLAN,
    debug: given.Debug = False,
) -> None:
    """Carry a plan out on a model and save the result; a plan made with data takes --moments, or --data again."""
    with exit_codes(debug):
        if moments is not None and data is not None:
            raise typer.BadParameter("give one of --moments and --data")
        free = free_sizes(dynamic)
        chosen = read_record(Plan, file)
        found = None if moments is None else Moments.load(moments)
        with output_folder(out, FILES) as folder:
            network, args, kwargs = model_and_inputs(model, weights, inputs, chosen.seed)
            source = Source.of(data, samples, mean, std, output)
            if source is not None:
                tier = chosen.capture or AUTO if capture is Captured.AUTO else capture.value
                captured = capture_model(network, args, kwargs, dynamic=free, trainable=chosen.trainable, capture=tier)
                cache = cache_folder(cache_dir)
                found = source.moments(captured, chosen.metric, chosen.seed, cache)
            result = apply_plan(
                network,
                args,
                chosen,
                example_kwargs=kwargs,
                dynamic=free,
                moments=found,
                verify=verify.value,
                capture=capture.value,
            )
            folder.save_result(result)
        typer.echo(f"{result.report}\n\n{_files(out, *FILES)}; tdfx.load and tdfx export read it")
        if (out / ONNX).exists():
            typer.echo(f"note: {out / ONNX} was there before; tdfx export {out} writes it anew")


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What tdfx apply or tdfx.save wrote.")],
    inputs: given.Inputs = None,
    dynamic: given.Dynamic = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="What was compressed; for results saved without structure.")
    ] = None,
    opset: given.Opset = None,
    fixed_batch: given.FixedBatch = False,
    quantize: given.Quantize = None,
    data: given.Data = None,
    samples: given.Samples = None,
    mean: given.Mean = None,
    std: given.Std = None,
    evaluate: Annotated[str | None, typer.Option(metavar="FUNCTION", help=EVALUATE_HELP)] = None,
    rtol: given.Rtol = None,
    debug: given.Debug = False,
) -> None:
    """Write a saved result as a verified ONNX file, into its folder; with --quantize also in int8."""
    with exit_codes(debug):
        for option, value in (("--data", data), ("--evaluate", evaluate)):
            if value is not None and quantize is None:
                raise typer.BadParameter("it is for --quantize, which is left out", param_hint=option)
        score = None if evaluate is None else load_evaluate(evaluate)
        free = free_sizes(dynamic, fixed_batch)
        result = load(folder, None if model is None else open_model(model))
        args, kwargs = example_inputs(inputs) if inputs else draw_inputs(result.report.inputs)
        source = Source.of(data, samples, mean, std, "auto")
        calibration = None if source is None else source.read(capture_model(result.module, args, kwargs))
        with output_folder(folder) as output:
            written = write_onnx(output, result, args, kwargs, opset, free, quantize, calibration, samples, score, rtol)
        typer.echo(f"{_exported(folder, written)}{_stale(folder, quantize)}")


def _exported(folder: Path, export: ExportReport, *others: str) -> str:
    return f"{parity(export)}\n{_files(folder, ONNX, *([INT8_ONNX] if export.quantization else []), *others)}"


def _stale(folder: Path, quantize: Quantized | None) -> str:
    if quantize is not None or not (folder / INT8_ONNX).exists():
        return ""
    return f"\nnote: {folder / INT8_ONNX} was there before; tdfx export {folder} --quantize int8 writes it anew"


def _files(folder: Path, *files: str) -> str:
    return f"{folder}: {', '.join(files)}"
