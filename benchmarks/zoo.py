"""What tdfx makes of many architectures with random weights: one row each, and why layers were left alone.

    python benchmarks/zoo.py [--families handwritten timm] [--names "*vit*"] [--keep rows.jsonl]

The families torchvision, timm and transformers need the extra ``zoo`` (torchvision beside it with ``pip install
--no-deps``); what is not there is left out. Every architecture runs in a process of its own: one that crashes or takes
longer than ``--limit`` is a row that says so. With --keep finished rows are written at once, and a run that was stopped
goes on from there. Columns are those of ``zoo_examine.Row``; "seen" is the share of the FLOPs of convolutions and
linear layers, by torch's counter, in layers that tdfx sees, "of sites" that in layers that it can compress.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import multiprocessing
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn
from zoo_examine import Row, examine
from zoo_models import FAMILIES, Case, Factory, build, family

from tdfx.tables import align

HEADER = (
    "network", "tier", "layers", "sites", "factorized", "left", "seen", "of sites", "captured", "batch 3", "full rank",
    "FLOPs", "ONNX Runtime", "CPU s",
)  # fmt: skip
MOST_DIFFERENCE = 1e-4
LEAST_COVERAGE = 0.99


def main() -> None:
    """Prints the table, what went wrong, why layers were left alone, and a summary."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    options.add_argument("--names", nargs="+", default=["*"], help='globs over "family/name"')
    options.add_argument("--keep", type=Path, default=None, help="file that keeps finished rows between runs")
    options.add_argument("--limit", type=float, default=300, help="seconds for one architecture")
    options.add_argument("--list", action="store_true", help="print the names alone")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    models = {
        name: factory
        for name, factory in found_models(arguments.families).items()
        if any(fnmatch.fnmatch(name, glob) for glob in arguments.names)
    }
    if arguments.list:
        print(*models, sep="\n")
        return
    rows = {row.name: row for row in _read(arguments.keep) if row.name in models}
    warm_up()
    for name, factory in models.items():
        if name in rows:
            continue
        row = rows[name] = contained(name, factory, arguments.limit)
        if arguments.keep is not None:
            with arguments.keep.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
        print(*cells(row), flush=True)
    print(f"\n{align(HEADER, [cells(row) for row in rows.values()], right=range(2, len(HEADER)))}\n")
    for row in rows.values():
        print(*(f"{row.name} {problem}" for problem in problems(row)), sep="\n", end="\n" * bool(problems(row)))
    print("\nleft alone:", *reasons(rows.values()), "", summary(rows.values()), sep="\n")


def found_models(families: Iterable[str]) -> dict[str, Factory]:
    """Factories by "family/name", of the families whose libraries are there."""
    models: dict[str, Factory] = {}
    for name in families:
        try:
            models |= {f"{name}/{key}": factory for key, factory in family(name).items()}
        except ImportError as error:
            print(f"{name} is left out: {error}", flush=True)
    return models


def warm_up() -> None:
    """Makes everything be imported that a row needs, once for all processes."""
    examine("warm-up", lambda: Case(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), (torch.randn(2, 64),)))


def contained(name: str, factory: Factory, limit: float) -> Row:
    """The row of an architecture, from a process of its own."""
    # Forked, since importing the libraries takes longer than most rows.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_row, args=(sender, name, factory))
    process.start()
    sender.close()
    try:
        if receiver.poll(limit):
            row: Row = receiver.recv()
            return row
        return Row(name, failed=f"time: more than {limit:.0f} s", seconds=limit)
    except EOFError:
        process.join()
        return Row(name, failed=f"process: ended with code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _send_row(sender: Connection, name: str, factory: Factory) -> None:
    sender.send(examine(name, lambda: build(factory)))


def cells(row: Row) -> tuple[str, ...]:
    """A line of the table."""
    if row.tier == "":
        return (row.name, "crash", *["-"] * (len(HEADER) - 3), f"{row.seconds:.0f}")  # why is said below
    parity = "-" if row.parity is None else f"{row.parity:.0e}" + ", fixed batch" * row.fixed_batch
    return (
        row.name, row.tier, _number(row.seen), _number(row.compressible), _number(row.factorized), str(len(row.left)),
        _share(row.coverage), _share(row.compressible_share), _small(row.captured), _small(row.larger_batch),
        _small(row.full_rank), _share(row.flops), parity, f"{row.seconds:.0f}",
    )  # fmt: skip


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}" if value else "0"


def problems(row: Row) -> list[str]:
    """What is wrong with a row, in sentences."""
    found = [row.failed] if row.failed else []
    if row.coverage is not None and row.coverage < LEAST_COVERAGE:
        found.append(f"sees only {row.coverage:.1%} of the FLOPs of convolutions and linear layers")
    if row.larger_batch is not None and row.larger_batch > MOST_DIFFERENCE:
        found.append(f"the captured graph differs by {row.larger_batch:.0e} at another batch size")
    if row.full_rank is not None and row.full_rank > MOST_DIFFERENCE:
        found.append(f"differs by {row.full_rank:.0e} at full rank")
    if row.unmoved:
        found.append(f"does not notice factors that are wrong: {', '.join(row.unmoved)}")
    if row.factorized == 0:
        found.append("has no layer factorized")
    if row.dense_export:
        found.append(f"as given is not exported by torch.onnx either: {row.dense_export}")
    return found


def reasons(rows: Iterable[Row]) -> list[str]:
    """Why layers were left alone, most frequent first, with one layer of each network."""
    layers: dict[str, dict[str, str]] = {}
    times: Counter[str] = Counter()
    for row in rows:
        for entry in row.left:
            layer, _, reason = entry.partition(": ")
            times[reason] += 1
            layers.setdefault(reason, {}).setdefault(row.name, layer)
    return [
        f"{count} x {reason}: " + ", ".join(f"{name} {layer}" for name, layer in layers[reason].items())
        for reason, count in times.most_common()
    ]


def summary(rows: Iterable[Row]) -> str:
    """Counts of what went wrong."""
    rows = list(rows)

    def count(what: str, is_so: Iterable[bool]) -> str:
        return f"{sum(is_so)} {what}"

    return "; ".join(
        (
            f"{len(rows)} architectures",
            count("crashed", (row.tier == "" for row in rows)),
            count("failed later", (row.tier != "" and row.failed != "" for row in rows)),
            count(
                "with coverage under 99%", (row.coverage is not None and row.coverage < LEAST_COVERAGE for row in rows)
            ),
            count("that differ at full rank", ((row.full_rank or 0) > MOST_DIFFERENCE for row in rows)),
            count("where a wrong factor goes unnoticed", (bool(row.unmoved) for row in rows)),
            count("not exported or with other outputs there", (row.tier != "" and row.parity is None for row in rows)),
            count("exported for one batch size only", (row.fixed_batch for row in rows)),
            count("with no layer factorized", (not row.factorized for row in rows)),
            count("of those that torch.onnx does not export as given either", (bool(row.dense_export) for row in rows)),
            f"{math.fsum(row.seconds for row in rows):.0f} s",
        )
    )


def _read(path: Path | None) -> list[Row]:
    if path is None or not path.exists():
        return []
    found = map(json.loads, path.read_text().splitlines())
    return [Row(**{**row, "left": tuple(row["left"]), "unmoved": tuple(row["unmoved"])}) for row in found]


if __name__ == "__main__":
    main()
