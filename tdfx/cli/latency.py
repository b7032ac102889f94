"""The commands about time: measuring the choices for a network's layers, here or on a device without PyTorch."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from tdfx.cli import options as given
from tdfx.cli.support import asked_runtime, cache_folder, exit_codes, free_sizes, model_and_inputs, read_record
from tdfx.files import write_text
from tdfx.latency.fit import fit_target
from tdfx.latency.runner import CPU
from tdfx.records.capture import AUTO, Capture
from tdfx.records.latency import LatencyTable
from tdfx.records.profile import Profile
from tdfx.stages.capture import capture
from tdfx.stages.latency import measure_latency, measured_rank_grid, with_latency, write_latency_kit
from tdfx.targets import FILE, ORT_CPU

File = Annotated[Path, typer.Argument(metavar="PROFILE.JSON", help="What tdfx profile wrote for the model.")]


def latency(
    model: given.Model,
    file: File,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Where it goes, as JSON.")],
    inputs: given.Inputs = None,
    dynamic: given.Dynamic = None,
    weights: given.Weights = None,
    threads: given.Threads = 1,
    provider: given.Provider = CPU,
    session_config: given.SessionConfig = None,
    cache_dir: given.CacheDir = None,
    debug: given.Debug = False,
) -> None:
    """Time every choice of a profile in ONNX Runtime on this machine, for tdfx plan --latency."""
    with exit_codes(debug):
        captured, profile = _profiled(model, file, inputs, dynamic, weights)
        runtime = asked_runtime(threads, provider, session_config)
        cache = cache_folder(cache_dir)
        table = measure_latency(captured, profile, runtime=runtime, cache_dir=cache)
        table = replace(table, rank_grid=measured_rank_grid(runtime, cache))
        write_text(out, table.to_json())
        typer.echo(f"{table}\n\n{out}: times; tdfx plan reads it as --latency")


def latency_kit(
    model: given.Model,
    file: File,
    out: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    inputs: given.Inputs = None,
    dynamic: given.Dynamic = None,
    weights: given.Weights = None,
    debug: given.Debug = False,
) -> None:
    """Write a folder that times every choice of a profile on a device with only numpy and onnxruntime."""
    with exit_codes(debug):
        write_latency_kit(*_profiled(model, file, inputs, dynamic, weights), out)
        typer.echo(f"{out}: copy it to the device, run python run.py there; tdfx plan --latency reads its latency.json")


def latency_fit(
    file: File,
    table: Annotated[Path, typer.Argument(metavar="LATENCY.JSON", help="What tdfx latency or a latency kit measured.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.json", help="Where the target goes.")],
    debug: given.Debug = False,
) -> None:
    """Fit the estimate of latency to measured times, as a target for tdfx profile --target FILE.json."""
    with exit_codes(debug):
        if out.suffix != FILE:
            raise typer.BadParameter(
                f"{out} must end in {FILE}, by which targets in files are known", param_hint="--out"
            )
        times = read_record(LatencyTable, table)
        start = ORT_CPU if times.rank_grid is None else replace(ORT_CPU, rank_grid=times.rank_grid)
        fit = fit_target(with_latency(read_record(Profile, file), times), str(out), start)
        write_text(out, json.dumps(asdict(fit.target), indent=2) + "\n")
        typer.echo(f"{fit}\n\n{out}: target; tdfx profile reads it as --target {out}")


def _profiled(
    model: str, file: Path, inputs: list[str] | None, dynamic: list[str] | None, weights: Path | None
) -> tuple[Capture, Profile]:
    profile = read_record(Profile, file)
    network, args, kwargs = model_and_inputs(model, weights, inputs, profile.seed)
    free, tier = free_sizes(dynamic), profile.capture or AUTO
    return capture(network, args, kwargs, dynamic=free, trainable=profile.trainable, capture=tier), profile
