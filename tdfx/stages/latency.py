"""Between profile and plan: times of all candidates in ONNX Runtime, in place of estimates."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from tdfx.cache import ListCache, sources_digest
from tdfx.errors import InputError, OptionError, PlanError
from tdfx.files import write_text
from tdfx.latency import runner
from tdfx.latency.grid import measure_rank_grid
from tdfx.latency.kit import Kit, kit_of
from tdfx.onnx_export import export_onnx
from tdfx.passes.fused_operators import FusedOperators
from tdfx.passes.shape_prop import ShapeProp, bind
from tdfx.progress import Report, reporter
from tdfx.records.candidate import SLOWER_MEASURED, Candidate, format_rank
from tdfx.records.capture import Capture
from tdfx.records.cost import Cost, whole_ns
from tdfx.records.latency import LatencyTable, Runtime, Timing
from tdfx.records.plan import MEASURED, Plan
from tdfx.records.profile import Profile

FASTER = 0.98  # of a layer's time, that a chain takes at most to count as faster
MOST_SCALE = 4.0  # by which measured times of chains are corrected
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
        PlanError: the profile is of another model.
        OptionError: a site is not float32.
        ExportError: the network cannot be exported or run.
    """
    runtime = runtime or Runtime()
    kit = _kit(captured, profile)
    header = {"runtime": runtime.as_dict(), "host": runner.host()}
    kept = _Kept(cache_dir, header)
    with original_file(captured) as network, reporter(progress) as report:
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
    return LatencyTable(runtime, header["host"], **{**measured, "rows": rows})


def check_available(runtime: Runtime) -> None:
    """Raises OptionError unless ONNX Runtime has the provider here."""
    import onnxruntime as ort

    available = ort.get_available_providers()
    if runtime.provider not in available:
        raise OptionError(
            f"provider {runtime.provider!r} is not in this ONNX Runtime; expected one of {', '.join(available)}"
        )


@contextmanager
def original_file(captured: Capture) -> Iterator[Path]:
    """The network as given, as an ONNX file in a temporary folder, for inputs of the example's shapes.

    Raises:
        ExportError, VerificationError: as for ``export_onnx``.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / NETWORK
        export_onnx(captured.module, path, captured.args, captured.kwargs, dynamic=None)
        yield path


def measured_rank_grid(runtime: Runtime, cache_dir: str | Path | None = None) -> int:
    """The grid of ranks that a runtime computes without waste on this machine, timed once and kept.

    Args:
        runtime: its options.
        cache_dir: folder that keeps it between runs.
    """
    key = ("rank grid", sources_digest("tdfx.latency"), json.dumps([runtime.as_dict(), runner.host()], sort_keys=True))
    (grid,) = ListCache(cache_dir).get(key, 1, lambda: [float(measure_rank_grid(runtime.as_dict()))])
    return int(grid)


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
    kit = _kit(captured, profile)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"{folder} is not empty; choose a new folder")
        (folder / "models").mkdir()
    except OSError as error:
        raise InputError(f"cannot make {folder}: {error.strerror}") from error
    for key, piece in kit.pieces.items():
        (folder / "models" / f"{key}.onnx").write_bytes(piece.model())
    export_onnx(captured.module, folder / NETWORK, captured.args, captured.kwargs, dynamic=None)
    shutil.copyfile(str(runner.__file__), folder / RUN)
    write_text(folder / "kit.json", json.dumps(kit.listing) + "\n")
    return folder


def with_latency(profile: Profile, table: LatencyTable) -> Profile:
    """The profile with measured times in place of estimates.

    A candidate that is no faster than its layer as it is has a caveat; others have none, also off the grid.

    Raises:
        PlanError: the table is of another network, or lacks a candidate.
    """
    if table.structure != profile.structure:
        raise PlanError(
            f"the latency table is of another network (structure {table.structure[:8]}, the profile's "
            f"{profile.structure[:8]}); measure this one"
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
    rest_s = table.network_s - sum(dense_s[site.name] - overhead_s[site.name] for site in profile.sites)

    def timed(candidate: Candidate) -> Candidate:
        alone_s = found[candidate.site, candidate.method, candidate.rank]
        overhead = overhead_s[candidate.site]
        return _timed(candidate, alone_s - overhead, dense_s[candidate.site] - overhead)

    return replace(
        profile,
        candidates=tuple(map(timed, profile.candidates)),
        before=replace(profile.before, latency_s=whole_ns(table.network_s)),
        rest=replace(profile.rest, latency_s=whole_ns(max(rest_s, 0.0))),
        latency_source=MEASURED,
    )


def _overhead(profile: Profile, network_s: float, dense_s: Mapping[str, float]) -> dict[str, float]:
    """Seconds of every site that it takes only because it was timed alone, whatever its form.

    Alone, a layer reads and writes the layout that users see, and the runtime reorders both. That is why all layers
    together may take longer than the network: the difference is shared out by the elements that they read and write.
    """
    elements = {
        site.name: sum(math.prod(call.input_shape) + math.prod(call.output_shape) for call in site.layer.calls)
        for site in profile.sites
    }
    excess_s = max(sum(dense_s[name] for name in elements) - network_s, 0.0)
    return {name: excess_s * number / sum(elements.values()) for name, number in elements.items()}


def scaled_chains(profile: Profile, chosen: Plan, ratio: float) -> Profile:
    """A profile whose chains take so much more or less time that a plan's network takes a ratio of the original's."""
    dense_s = {c.site: _seconds(c.cost) for c in profile.candidates if c.is_dense}
    chains_s = sum(_seconds(c.cost) for c in chosen.candidates if not c.is_dense)
    if not chains_s:
        return profile
    wanted_s = chains_s + ratio * _seconds(chosen.before) - _seconds(chosen.after)
    factor = min(max(wanted_s / chains_s, 1 / MOST_SCALE), MOST_SCALE)
    return replace(
        profile,
        candidates=tuple(
            c if c.is_dense else _timed(c, factor * _seconds(c.cost), dense_s.get(c.site, math.inf))
            for c in profile.candidates
        ),
    )


def _timed(candidate: Candidate, latency_s: float, dense_s: float) -> Candidate:
    slower = not candidate.is_dense and latency_s > FASTER * dense_s
    cost = replace(candidate.cost, latency_s=whole_ns(max(latency_s, 0.0)))
    return replace(candidate, cost=cost, caveat=SLOWER_MEASURED if slower else "")


def _seconds(cost: Cost) -> float:
    assert cost.latency_s is not None
    return cost.latency_s


def _kit(captured: Capture, profile: Profile) -> Kit:
    if profile.structure != captured.structure:
        raise PlanError(
            f"the profile is of a model of another structure (fingerprint {profile.structure[:8]}, this model "
            f"{captured.structure[:8]}); profile this one"
        )
    metas = ShapeProp(bind(captured.module, captured.args, captured.kwargs)).run(captured.module)
    return kit_of(profile, FusedOperators(profile.sites, metas).run(captured.module))


def _ratios(text: str) -> dict[str, dict[str, float]]:
    """What a file of the cache holds; nothing if it is broken."""
    with suppress(ValueError, AttributeError):
        values = json.loads(text)
        if all(isinstance(value, float) for known in values.values() for value in known.values()):
            return cast(dict[str, dict[str, float]], values)
    return {}


class _Kept:
    """Ratios of a processor, versions, options and the code that takes them, in one file of the cache."""

    def __init__(self, cache_dir: str | Path | None, header: Mapping[str, Any]) -> None:
        key = [sources_digest("tdfx.latency"), header]
        digest = sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        self.path = None if cache_dir is None else Path(cache_dir) / f"latency-{digest}.json"
        self.ratios: dict[str, dict[str, float]] = {}
        if self.path is not None and self.path.exists():
            self.ratios = _ratios(self.path.read_text())

    def keep(self) -> None:
        """Writes what is known by now."""
        if self.path is not None:
            write_text(self.path, json.dumps(self.ratios))
