"""The commands that only show: files as tables, methods, passes."""

from __future__ import annotations

import pkgutil
from dataclasses import fields
from importlib import import_module
from inspect import getdoc, isabstract, isclass
from pathlib import Path
from typing import Annotated, Any

import typer

import tdfx.passes
from tdfx.cli.options import Debug
from tdfx.cli.support import exit_codes, read_file, read_record
from tdfx.decompositions import registry
from tdfx.errors import InputError
from tdfx.onnx_export import ExportReport
from tdfx.passes.base import GraphPass, RewritePass
from tdfx.quantization import Quantization
from tdfx.records.latency import LatencyTable
from tdfx.records.plan import Plan
from tdfx.records.profile import Profile
from tdfx.records.reading import parse, read
from tdfx.records.result import Report
from tdfx.saving import REPORT
from tdfx.tables import align, count

RECORDS: tuple[type[Plan | Profile | Report | LatencyTable], ...] = (Plan, Profile, Report, LatencyTable)


def inspect(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="plan.json, profile.json, report.json or their folder.")],
    debug: Debug = False,
) -> None:
    """Show a plan, profile, report or latency table."""
    with exit_codes(debug):
        typer.echo(describe(path / REPORT if path.is_dir() else path))


def methods() -> None:
    """List the decomposition methods."""
    rows = [(method.name, method.summary, method.source) for method in registry().values()]
    typer.echo(align(("name", "replaces -> by", "source"), rows))


def passes() -> None:
    """List the graph passes."""
    rows = [
        (kind.__name__, "rewrite" if issubclass(kind, RewritePass) else "analysis", _first_line(kind))
        for kind in graph_passes()
    ]
    typer.echo(align(("name", "kind", "what it does"), rows))


def describe(path: Path) -> str:
    """What a file holds, as a table.

    Raises:
        InputError: it cannot be read, or holds nothing that tdfx wrote.
        PlanError: naming the field that is missing, unknown or of the wrong type.
    """
    values = parse(read_file(path), str(path), InputError)
    shared = [len(values.keys() & {field.name for field in fields(record)}) for record in RECORDS]
    if not any(shared):
        raise InputError(
            f"{path} has the fields {', '.join(values)}; expected a plan, profile, report or latency table"
        )
    record = RECORDS[shared.index(max(shared))]
    text = str(read_record(record, path))
    if record is Report and "export" in values:
        text += f"\n{parity(read(ExportReport, values['export'], f'{path}: report.export'))}"
    return text


def parity(export: ExportReport) -> str:
    """How well an ONNX file agrees with its network, in a line; another one for its int8 version."""
    batches = " and ".join(map(str, export.batch_sizes))
    text = (
        f"{export.path}: {count(export.file_bytes)}B, opset {export.opset}; ONNX Runtime differs by "
        f"{export.max_rel_diff:.2g} of the largest output, {export.rtol:g} allowed, at batch {batches}"
    )
    int8 = export.quantization
    if int8 is None:
        return text
    where = f"calibrated on {int8.calibrated} samples" if int8.calibrated else "not calibrated"
    error = max(output.rel_l2_diff for output in int8.outputs)
    return (
        f"{text}\n{int8.path}: {count(int8.file_bytes)}B, int8, {where}; differs by {int8.max_rel_diff:.2g} of the "
        f"largest output, by {error:.2g} in Euclidean norm{_beside(int8)}"
        + "".join(f"\nnote: {note}" for note in int8.notes)
    )


def _beside(int8: Quantization) -> str:
    """Time and score beside those of the float32 file."""
    lower, upper = int8.speed_quartiles
    text = f"; {int8.speed:.2f}x as fast as float32 (quartiles {lower:.2f} and {upper:.2f})"
    if int8.scores is not None:
        text += "; score {:.4g}, of float32 {:.4g}".format(*reversed(int8.scores))
    return text


def graph_passes() -> list[type[GraphPass[Any]]]:
    """All passes by name: concrete ``GraphPass`` classes in the modules of ``tdfx.passes``."""
    found = []
    for info in pkgutil.iter_modules(tdfx.passes.__path__):
        module = import_module(f"tdfx.passes.{info.name}")
        found += [value for value in vars(module).values() if _is_pass(value) and value.__module__ == module.__name__]
    return sorted(found, key=lambda kind: kind.__name__)


def _is_pass(value: object) -> bool:
    return isclass(value) and issubclass(value, GraphPass) and not isabstract(value)


def _first_line(kind: type) -> str:
    return (getdoc(kind) or "").partition("\n")[0]
