"""Measured latency of a network, and of everything that may become of its layers; readable JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

from tdfx.errors import OptionError, PlanError
from tdfx.records.candidate import format_rank
from tdfx.records.layer import Rank
from tdfx.records.reading import read_text
from tdfx.records.writing import to_text
from tdfx.tables import align, seconds

VERSION = 2


@dataclass(frozen=True)
class Runtime:
    """How ONNX Runtime is asked to run.

    Attributes:
        threads: of one operator.
        provider: execution provider.
        config: entries of the session's configuration, e.g. {"session.intra_op.allow_spinning": "0"}; by names without
            a dot attributes of SessionOptions, {"graph_optimization_level": "ORT_ENABLE_BASIC"}; under "provider."
            options of the provider. Unless told otherwise, threads do not spin after a run
            ("session.force_spinning_stop"), which slows down what runs next.

    Raises:
        OptionError: fewer threads than one, or entries that are no text.
    """

    threads: int = 1
    provider: str = "CPUExecutionProvider"
    config: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.threads, int) or isinstance(self.threads, bool) or self.threads < 1:
            raise OptionError(f"threads is {self.threads!r}; expected a whole number of 1 or more")
        entries = self.config.items() if isinstance(self.config, dict) else [(None, None)]
        if not all(isinstance(text, str) for text in (self.provider, *chain.from_iterable(entries))):
            raise OptionError(
                f"provider is {self.provider!r} and config {self.config!r}; expected text, and a dictionary of texts"
            )

    def as_dict(self) -> dict[str, Any]:
        """For ``tdfx.latency.runner``, which knows no classes."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.provider}, {self.threads} thread{'s' * (self.threads > 1)}"


@dataclass(frozen=True)
class Measured:
    """A result timed against its original, in turn in one process.

    Attributes:
        original_s: median seconds of one run of the original.
        compressed_s: of the result.
        ratio: median over the rounds of the result's seconds over the original's.
        quartiles: lower and upper quartile of the same.
        predicted_ratio: what the plan expected; None where it had no latency.
        plans: how many were made.
        runtime: that both ran in.
    """

    original_s: float
    compressed_s: float
    ratio: float
    quartiles: tuple[float, ...]
    predicted_ratio: float | None
    plans: int
    runtime: Runtime

    def __str__(self) -> str:
        lower, upper = self.quartiles
        predicted = "" if self.predicted_ratio is None else f", predicted {self.predicted_ratio:.1%}"
        return (
            f"{seconds(self.original_s)} -> {seconds(self.compressed_s)} ({self.ratio:.1%}, quartiles {lower:.1%} and "
            f"{upper:.1%}{predicted}; {self.runtime})"
        )


@dataclass(frozen=True)
class Timing:
    """Seconds that a site takes in one form, all its calls together, with what follows it in the same operators."""

    site: str
    method: str
    rank: Rank
    latency_s: float


@dataclass(frozen=True)
class LatencyTable:
    """Times of one network on one machine.

    Attributes:
        runtime: the options they were taken with.
        host: "processor" and version of "onnxruntime".
        structure: fingerprint of the network's structure.
        network_s: seconds of the whole network as given.
        disturbed: groups of layers beside which other processes ran, so that their times are not sure.
        rank_grid: ranks that the runtime computes without waste are multiples of it; None if it was not looked for.
        rows: of every candidate.

    Raises:
        PlanError: a site, method and rank stand in it twice.
    """

    runtime: Runtime
    host: dict[str, str]
    structure: str
    network_s: float
    disturbed: int
    rank_grid: int | None
    rows: tuple[Timing, ...]

    def __post_init__(self) -> None:
        if len(self.by_candidate) < len(self.rows):
            raise PlanError("the latency table has two times for the same site, method and rank; measure anew")

    @property
    def by_candidate(self) -> dict[tuple[str, str, Rank], float]:
        """Seconds by site, method and rank."""
        return {(row.site, row.method, row.rank): row.latency_s for row in self.rows}

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        if not self.disturbed:
            return ()
        return (f"other processes ran while {self.disturbed} groups of layers were timed: measure on an idle machine",)

    def __str__(self) -> str:
        lines = []
        for site in dict.fromkeys(row.site for row in self.rows):
            dense, *others = sorted((row for row in self.rows if row.site == site), key=lambda row: len(row.rank) > 0)
            best = min(others, key=lambda row: row.latency_s, default=dense)
            form = f"{best.method} {format_rank(best.rank)}"
            lines.append((site, seconds(dense.latency_s), str(len(others)), seconds(best.latency_s), form))
        table = align(("layer", "as it is", "forms", "quickest", ""), lines, right=(1, 2, 3))
        where = f"{self.runtime}, onnxruntime {self.host.get('onnxruntime')}, {self.host.get('processor')}"
        grid = () if self.rank_grid is None else (f"ranks without waste are multiples of {self.rank_grid}",)
        return "\n".join((table, *grid, f"whole network {seconds(self.network_s)}; {where}", *self.notes))

    def to_json(self) -> str:
        """JSON text with one time a line; ``from_json`` gives an equal table back."""
        return to_text(self, VERSION, rows=("rows",))

    @classmethod
    def from_json(cls, text: str) -> LatencyTable:
        """Reads what ``to_json`` or a latency kit wrote.

        Raises:
            PlanError: naming the field that is missing, unknown or of the wrong type, or the version.
        """
        return read_text(cls, text, "latency table", VERSION)
