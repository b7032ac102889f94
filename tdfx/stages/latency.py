"""Between profile and plan: times of all candidates in ONNX Runtime, in place of estimates."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from tdfx.cache import ListCache, sources_digest
from tdfx.errors import InputError, OptionError, PlanError
from tdfx.files import write_text
from tdfx.latency import runner
from tdfx.latency.grid import SECONDS, sweep
from tdfx.latency.kit import Kit, kit_of
from tdfx.onnx_export import LEAST_OPSET, export_onnx
from tdfx.passes.fused_operators import FusedOperators
from tdfx.passes.shape_prop import ShapeProp, bind
from tdfx.passes.sites import FindSites
from tdfx.progress import Report, reporter
from tdfx.records.candidate import SLOWER_MEASURED, Candidate, format_rank
from tdfx.records.capture import Capture
from tdfx.records.cost import Cost, whole_ns
from tdfx.records.latency import LatencyTable, Measured, Runtime, Timing
from tdfx.records.layer import Call, Site
from tdfx.records.plan import MEASURED, Plan
from tdfx.records.profile import Profile
from tdfx.targets import ORT_CPU

FASTER = 0.98  # of a layer's time, that a chain takes at most to count as faster
MOST_SCALE = 4.0  # by which measured times of chains are corrected
ELEMENTS_OF_A_CALL = 10_000  # that are reordered in the time that starting a model takes
MOST_OVERHEAD = 0.9  # of the time of a layer or chain alone
NETWORK = "network.onnx"
RUN = "run.py"


def measure_latency(
    captured: Capture,
    profile: Profile,
    *,
    runtime: Runtime | None = None,
    cache_dir: str | Path | None = None,
    progress: bool | Report | None = None,
) -> LatencyTable:
    """Times every candidate of a profile, and the whole network, in ONNX Runtime on this machine.

    Each distinct layer and chain is a small ONNX model, with the ReLU and addition that the runtime fuses with it. A
    layer and what may take its place run in turn; medians of the wall clock. What was measured before under the same
    processor, versions and options is taken from the cache, and a run that was stopped goes on from there.

    Args:
        captured: what ``capture`` returned.
        profile: what ``profile`` returned for it.
        runtime: None for one thread of the CPU.
        cache_dir: folder that keeps times between runs.
        progress: a function, True, False, or None for a bar on terminals only.

    Raises:
        PlanError: the profile is of another model, or of inputs of other shapes.
        OptionError: a site is not float32, or the provider is not there or does not start.
        ExportError: the network cannot be exported or run.
    """
    runtime = runtime or Runtime()
    check_runtime(runtime)
    kit = _kit(captured, profile)
    kept = _Kept(cache_dir, runtime)
    with original_file(captured) as network, reporter(progress) as report, refused_by_runtime():
        measured = runner.measure(
            kit.listing,
            str(network),
            lambda key: kit.pieces[key].model(),
            runtime.as_dict(),
            ratios=kept.ratios,
            keep=kept.keep,
            progress=lambda done, total: report("timing layers", done, total),
        )
    rows = tuple(Timing(**{**row, "rank": tuple(row["rank"])}) for row in measured["rows"])
    return LatencyTable(runtime, runner.host(), **{**measured, "rows": rows})


def check_runtime(runtime: Runtime) -> None:
    """Raises OptionError unless it is a Runtime whose provider ONNX Runtime has here."""
    if not isinstance(runtime, Runtime):
        raise OptionError(f"runtime is a {type(runtime).__name__}; expected a tdfx.Runtime")
    try:
        runner.check_provider(runtime.provider)
    except ValueError as error:
        raise OptionError(str(error)) from None


@contextmanager
def refused_by_runtime() -> Iterator[None]:
    """Raises OptionError where ONNX Runtime does not open a session with the options given."""
    try:
        yield
    except ValueError as error:
        raise OptionError(f"latency cannot be measured: {error}") from error


@contextmanager
def original_file(captured: Capture) -> Iterator[Path]:
    """The network as given, as an ONNX file in a temporary folder, for inputs of the example's shapes.

    Raises:
        ExportError, VerificationError: as for ``export_onnx``.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / NETWORK
        export_onnx(captured.plain, path, captured.args, captured.kwargs, dynamic=None)
        yield path


def measured_rank_grid(runtime: Runtime, cache_dir: str | Path | None = None) -> int:
    """The grid of ranks that a runtime computes without waste on this machine, timed once and kept.

    That of the target "ort-cpu" where other processes ran beside all tries.

    Args:
        runtime: its options.
        cache_dir: folder that keeps it between runs.
    """
    kept = _Kept(cache_dir, runtime)
    widths = sweep()
    pieces = {piece.key: piece for piece in widths.values()}
    with refused_by_runtime():
        taken, disturbed = runner.time_groups(
            [list(pieces)],
            {key: piece.weight_bytes for key, piece in pieces.items()},
            lambda key: pieces[key].model(),
            runtime.as_dict(),
            ratios=kept.ratios,
            keep=kept.keep,
            progress=lambda done, total: None,
            seconds=SECONDS,
        )
    found = runner.rank_grid([(piece.key, width, piece.macs) for width, piece in widths.items()], taken)
    return ORT_CPU.rank_grid if disturbed or found is None else found


def write_latency_kit(captured: Capture, profile: Profile, folder: str | Path) -> Path:
    """Writes a folder that measures a profile's candidates on a device without PyTorch.

    ``python run.py`` in it needs numpy and onnxruntime only and writes ``latency.json``, which
    ``LatencyTable.from_json`` reads.

    Args:
        captured: what ``capture`` returned.
        profile: what ``profile`` returned for it.
        folder: is made; must not hold anything yet.

    Raises:
        InputError: the folder cannot be made, or is not empty.
        PlanError, OptionError, ExportError: as for ``measure_latency``.
    """
    folder = Path(folder)
    kit = _kit(captured, profile, with_grid=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty; choose a new folder")
        with tempfile.TemporaryDirectory(prefix=".tdfx-", dir=folder.parent) as beside:
            staged = Path(beside) / folder.name  # becomes the folder when it is whole
            _write_kit(captured, kit, staged)
            os.replace(staged, folder)
    except OSError as error:
        raise InputError(f"cannot make {folder}: {error.strerror}") from error
    return folder


def _write_kit(captured: Capture, kit: Kit, folder: Path) -> None:
    (folder / "models").mkdir(parents=True)
    for key, piece in kit.pieces.items():
        (folder / "models" / f"{key}.onnx").write_bytes(piece.model())
    export_onnx(captured.plain, folder / NETWORK, captured.args, captured.kwargs, dynamic=None, opset=LEAST_OPSET)
    shutil.copyfile(str(runner.__file__), folder / RUN)
    write_text(folder / "kit.json", json.dumps(kit.listing) + "\n")


def with_latency(profile: Profile, table: LatencyTable) -> Profile:
    """The profile with measured times in place of estimates.

    A candidate that is no faster than its layer as it is has a caveat; others have none, also off the grid.

    Raises:
        PlanError: the table is of another network, or lacks a candidate.
    """
    structure = timed_structure(profile)
    in_table, in_profile = ({entry.site for entry in table.rows}, {site.name for site in profile.sites})
    if in_table != in_profile and in_table & in_profile:
        apart = (("lacks", in_profile - in_table), ("holds besides", in_table - in_profile))
        told = " and ".join(f"{verb} {', '.join(sorted(names))}" for verb, names in apart if names)
        raise PlanError(f"the latency table {told}, unlike the profile; measure this profile")
    if table.structure != structure:
        raise PlanError(
            f"the latency table is of another network or of inputs of other shapes (fingerprint {table.structure[:8]}, "
            f"the profile's {structure[:8]}); measure this one"
        )
    found = table.by_candidate
    dense_s = {row.site: row.latency_s for row in table.rows if not row.rank}
    untimed = [site.name for site in profile.sites if site.name not in dense_s]
    if untimed:
        raise PlanError(f"the latency table has no time of {', '.join(untimed)} as it is; measure this profile")
    for candidate in profile.candidates:
        if (candidate.site, candidate.method, candidate.rank) not in found:
            raise PlanError(
                f"the latency table has no time of {candidate.method} {format_rank(candidate.rank)} at "
                f"{candidate.site}; measure this profile"
            )
    overhead_s = _overhead(profile, table.network_s, dense_s)
    layers_s = sum(dense_s[site.name] - overhead_s[site.name] for site in profile.sites)
    pace = min(table.network_s / layers_s, 1.0) if layers_s else 1.0
    is_optional = {candidate.site for candidate in profile.candidates if candidate.is_dense}

    def timed(candidate: Candidate) -> Candidate:
        alone_s = found[candidate.site, candidate.method, candidate.rank]
        overhead = overhead_s[candidate.site]
        within_s = alone_s - min(overhead, MOST_OVERHEAD * alone_s)
        # What a person fixed is offered, however long it takes.
        has_choice = candidate.site in is_optional or profile.rank_rule is not None
        layer_s = pace * (dense_s[candidate.site] - overhead) if has_choice else math.inf
        return _timed(candidate, pace * within_s, layer_s)

    return replace(
        profile,
        candidates=tuple(map(timed, profile.candidates)),
        before=replace(profile.before, latency_s=whole_ns(table.network_s)),
        rest=replace(profile.rest, latency_s=whole_ns(max(table.network_s - layers_s, 0.0))),
        latency_source=MEASURED,
    )


def notes_on(table: LatencyTable, profile: Profile) -> tuple[str, ...]:
    """What one should know who plans a profile by a table."""
    grid = table.rank_grid
    if grid is None or grid == profile.rank_multiple or profile.rank_rule is not None:
        return table.notes
    asked = f"multiples of {profile.rank_multiple}" if profile.rank_multiple > 1 else "any number"
    advice = f"profile with rank_multiple={grid} and measure again"
    return (*table.notes, f"ranks are {asked}, and the device's grid is {grid}: {advice}")


def _overhead(profile: Profile, network_s: float, dense_s: Mapping[str, float]) -> dict[str, float]:
    """Seconds of every site that it takes only because it was timed alone, whatever its form.

    Alone, a layer is started by itself, and reads and writes the layout that users see, which the runtime reorders.
    That is why all layers together may take longer than the network: the difference is shared out by calls and by the
    elements that they read and write, as far as it leaves a part of each layer's time.
    """
    weights = {
        site.name: sum(ELEMENTS_OF_A_CALL + math.prod(c.input_shape) + math.prod(c.output_shape) for c in _calls(site))
        for site in profile.sites
    }
    most_s = {name: MOST_OVERHEAD * dense_s[name] for name in weights}
    taken_s = dict.fromkeys(weights, 0.0)
    excess_s = sum(dense_s[name] for name in weights) - network_s
    while weights and excess_s > 0:
        shares = {name: excess_s * weight / sum(weights.values()) for name, weight in weights.items()}
        full = [name for name, share_s in shares.items() if taken_s[name] + share_s >= most_s[name]]
        for name, share_s in shares.items():
            given_s = min(share_s, most_s[name] - taken_s[name])
            taken_s[name] += given_s
            excess_s -= given_s
        if not full:
            break
        weights = {name: weight for name, weight in weights.items() if name not in full}
    return taken_s


def corrected_times(profile: Profile, chosen: Plan, measured: Measured) -> Profile:
    """A profile by whose times the original, and a plan's network, would have been predicted as they were measured.

    All times follow the original's; those of chains are multiplied by one factor besides.
    """
    pace = measured.original_s / _seconds(profile.before)
    dense_s = {c.site: pace * _seconds(c.cost) for c in profile.candidates if c.is_dense}
    chains_s = sum(_seconds(c.cost) for c in chosen.candidates if not c.is_dense)
    wanted_s = chains_s + measured.ratio * _seconds(chosen.before) - _seconds(chosen.after)
    factor = min(max(wanted_s / chains_s, 1 / MOST_SCALE), MOST_SCALE) if chains_s else 1.0

    def corrected(candidate: Candidate) -> Candidate:
        latency_s = pace * _seconds(candidate.cost) * (1 if candidate.is_dense else factor)
        return _timed(candidate, latency_s, dense_s.get(candidate.site, math.inf))

    def paced(cost: Cost) -> Cost:
        return replace(cost, latency_s=whole_ns(pace * _seconds(cost)))

    return replace(
        profile,
        candidates=tuple(map(corrected, profile.candidates)),
        before=paced(profile.before),
        rest=paced(profile.rest),
    )


def _timed(candidate: Candidate, latency_s: float, dense_s: float) -> Candidate:
    slower = not candidate.is_dense and latency_s > FASTER * dense_s
    cost = replace(candidate.cost, latency_s=whole_ns(max(latency_s, 0.0)))
    return replace(candidate, cost=cost, caveat=SLOWER_MEASURED if slower else "")


def _seconds(cost: Cost) -> float:
    assert cost.latency_s is not None
    return cost.latency_s


def _kit(captured: Capture, profile: Profile, *, with_grid: bool = False) -> Kit:
    if profile.structure != captured.structure:
        raise PlanError(
            f"the profile is of a model of another structure (fingerprint {profile.structure[:8]}, this model "
            f"{captured.structure[:8]}); profile this one"
        )
    metas = ShapeProp(bind(captured.module, captured.args, captured.kwargs)).run(captured.module)
    sites, _ = FindSites(metas).run(captured.module)
    calls = {site.name: _calls(site) for site in sites}
    for site in profile.sites:
        if calls.get(site.name) != _calls(site):
            raise PlanError(
                f"the profile is for inputs of other shapes: layer {site.name} is called on "
                f"{_shapes(_calls(site))} there, here on {_shapes(calls.get(site.name, ()))}; profile these inputs"
            )
    fused = FusedOperators(profile.sites, metas).run(captured.module)
    return replace(kit_of(profile, fused, with_grid=with_grid), structure=timed_structure(profile))


def timed_structure(profile: Profile) -> str:
    """Fingerprint of all that times depend on but the machine: the network's structure, and shapes of its layers."""
    about = [profile.structure, *((site.name, _calls(site)) for site in profile.sites)]
    return sha256(repr(about).encode()).hexdigest()[:32]


def _calls(site: Site) -> tuple[Call, ...]:
    """Of all layers of a site."""
    return tuple(call for layer in site.layers for call in layer.calls)


def _shapes(calls: tuple[Call, ...]) -> str:
    return ", ".join(str(call.input_shape) for call in calls) or "nothing"


class _Kept:
    """Ratios of a processor, versions, options and the code that takes them, in one file of the cache."""

    def __init__(self, cache_dir: str | Path | None, runtime: Runtime) -> None:
        folder = ListCache(cache_dir).folder
        key = [sources_digest("tdfx.latency"), {"runtime": runtime.as_dict(), "host": runner.host()}]
        digest = sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        self.path = None if folder is None else folder / f"latency-{digest}.json"
        self.ratios: dict[str, dict[str, float]] = {}
        if self.path is not None:
            with suppress(OSError, ValueError):  # a broken file counts as missing
                self.ratios = runner.usable_ratios(json.loads(self.path.read_text()))

    def keep(self) -> None:
        """Writes what is known by now."""
        if self.path is not None:
            write_text(self.path, json.dumps(self.ratios))
