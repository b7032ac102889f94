"""What the commands have in common: exit codes, reading what the options name, writing the ONNX file."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, cast

import typer
from torch import Tensor, nn
from torch.export import ExportedProgram

from tdfx.cache import user_cache
from tdfx.cli.data import load_data
from tdfx.cli.options import Quantized
from tdfx.dynamic import BATCH, Dynamic
from tdfx.errors import InputError, PlanError, TdfxError
from tdfx.evaluation import Evaluate
from tdfx.latency.runner import entries
from tdfx.loading import example_inputs, is_program, open_model, program_inputs
from tdfx.metrics import LOSS
from tdfx.moments import Moments
from tdfx.onnx_export import ExportReport, export_onnx
from tdfx.passes.shape_prop import bind
from tdfx.records.capture import Capture
from tdfx.records.latency import LatencyTable, Runtime
from tdfx.records.plan import Plan
from tdfx.records.profile import Profile
from tdfx.records.result import Report, Result
from tdfx.saving import INT8_ONNX, ONNX, Output
from tdfx.stages.calibrate import calibrate
from tdfx.stages.latency import check_runtime

NONE = "none"
Record = TypeVar("Record", bound=Plan | Profile | Report | LatencyTable)


@contextmanager
def exit_codes(debug: bool) -> Iterator[None]:
    """Turns errors into one message on standard error and the process's exit code."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None
    except (typer.Exit, typer.BadParameter):
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


def model_and_inputs(
    model: str, weights: Path | None, inputs: Sequence[str] | None, seed: int
) -> tuple[nn.Module | ExportedProgram, tuple[Tensor, ...], dict[str, Tensor]]:
    """The model of this name, and example inputs for it: as asked for, or those of an exported program.

    Raises:
        BadParameter: a model without inputs that is no exported program.
        InputError: as for ``open_model`` and ``example_inputs``.
    """
    if not inputs and not is_program(model):
        raise typer.BadParameter(
            f"give the shapes that {model} takes; only .pt2 files know theirs", param_hint="--input"
        )
    args, kwargs = example_inputs(inputs or (), seed)
    network = open_model(model, weights)
    if not inputs and isinstance(network, ExportedProgram):
        args, kwargs = program_inputs(network)
    return network, args, kwargs


def free_sizes(dynamic: Sequence[str] | None, fixed_batch: bool = False) -> Dynamic:
    """Which sizes are free: the batch and those that are named, or none.

    Raises:
        BadParameter: a text is not INPUT:DIM=NAME, or the batch is fixed beside it.
    """
    if dynamic and fixed_batch:
        raise typer.BadParameter("it is for a free batch too; leave out --fixed-batch", param_hint="--dynamic")
    found: dict[str, dict[int, str | None]] = {}
    for text in dynamic or ():
        match = re.fullmatch(r"(\w+):(\d+)=(\w+)", text)
        if match is None:
            raise typer.BadParameter(f"{text!r} is no INPUT:DIM=NAME like input_ids:1=sequence", param_hint="--dynamic")
        found.setdefault(match[1], {})[int(match[2])] = match[3]
    return found or (None if fixed_batch else BATCH)


def names(methods: str | None) -> list[str] | None:
    """Names joined by commas, None as it is."""
    return None if methods is None else [name.strip() for name in methods.split(",")]


def unless_none(target: str) -> str | None:
    """None for the word."""
    return None if target == NONE else target


def cache_folder(cache_dir: str | None) -> Path | None:
    """The folder asked for, None for the word; the user's own if there is none, and if it can be written."""
    if cache_dir is not None:
        return None if cache_dir == NONE else Path(cache_dir)
    folder = user_cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def asked_runtime(threads: int, provider: str, session_config: Sequence[str] | None) -> Runtime:
    """What latency is measured in.

    Raises:
        BadParameter: an entry of the session's configuration is not KEY=VALUE.
        OptionError: the provider is not there.
    """
    try:
        config = entries(session_config or ())
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--session-config") from None
    runtime = Runtime(threads, provider, config)
    check_runtime(runtime)
    return runtime


@dataclass(frozen=True)
class Source:
    """What ``--data`` names, and how it is read.

    Attributes:
        data: the text of ``--data``.
        samples: how many of them to calibrate on; None for all.
        mean: by channel, of a folder of images, joined by commas.
        std: likewise.
        output: "logits", "values" or "auto".
    """

    data: str
    samples: int | None
    mean: str | None
    std: str | None
    output: str

    @classmethod
    def of(cls, data: str | None, samples: int | None, mean: str | None, std: str | None, output: str) -> Source | None:
        """None without ``--data``."""
        return None if data is None else cls(data, samples, mean, std, output)

    def read(self, captured: Capture) -> object:
        """The inputs, for this model.

        Raises:
            InputError: they cannot be read, or do not fit.
        """
        placeholders = [str(node.target) for node in captured.module.graph.nodes if node.op == "placeholder"]
        shapes = [tuple(value.shape) for value in bind(captured.module, captured.args, captured.kwargs)]
        mean, std = _numbers(self.mean, "--mean"), _numbers(self.std, "--std")
        return load_data(self.data, placeholders, shapes, mean=mean, std=std)

    def moments(self, captured: Capture, metric: str | None, seed: int, cache: Path | None) -> Moments:
        """Moments of the model, of the loss too unless the metric does without.

        Raises:
            InputError, OptionError: as for ``load_data`` and ``calibrate``.
        """
        return calibrate(
            captured,
            self.read(captured),
            metric=LOSS if metric in (None, LOSS) else "feature",
            output=self.output,
            samples=self.samples,
            seed=seed,
            cache_dir=cache,
        )


def _numbers(text: str | None, option: str) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of numbers like 0.5,0.5,0.5", param_hint=option) from None


def read_file(path: Path) -> str:
    """The text of a file.

    Raises:
        InputError: it cannot be read, or is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text: {error}") from error


def read_record(record: type[Record], path: Path) -> Record:
    """The plan, profile or report in a file.

    Raises:
        InputError: the file cannot be read.
        PlanError: it holds something else; names the field.
    """
    try:
        return cast(Record, record.from_json(read_file(path)))
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def write_onnx(
    output: Output,
    result: Result,
    args: Sequence[Tensor],
    kwargs: Mapping[str, Tensor],
    opset: int | None,
    dynamic: Dynamic,
    quantize: Quantized | None = None,
    calibration: object = None,
    samples: int | None = None,
    evaluate: Evaluate | None = None,
    rtol: float | None = None,
) -> ExportReport:
    """Writes all files of a result, the network as ``model.onnx`` and, if asked for, ``model.int8.onnx`` among them.

    Raises:
        ExportError, InputError, OptionError, VerificationError: as for ``export_onnx``.
    """
    export = export_onnx(
        result.module,
        output.stage(ONNX if quantize is None else INT8_ONNX),
        args,
        kwargs,
        dynamic=dynamic,
        rtol=rtol,
        opset=opset,
        quantize=None if quantize is None else quantize.value,
        calibration=calibration,
        samples=None if calibration is None else samples,
        evaluate=evaluate,
        float32=None if quantize is None else output.stage(ONNX),
    )
    export = replace(export, path=str(output.folder / ONNX))
    if export.quantization is not None:
        int8 = replace(export.quantization, path=str(output.folder / INT8_ONNX))
        export = replace(export, quantization=int8)
    output.save_result(result, export)
    return export
