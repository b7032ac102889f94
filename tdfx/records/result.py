"""What ``compress`` and ``apply`` return."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from tdfx.records.cost import Cost
from tdfx.records.inputs import InputSpec
from tdfx.records.latency import Measured
from tdfx.records.layer import Skipped
from tdfx.records.plan import Plan
from tdfx.records.reading import parse, read
from tdfx.tables import count, seconds, share

CAPTURED = {"fx": "by torch.fx", "export": "by torch.export", "inplace": "in place"}


@dataclass(frozen=True)
class PeakActivations:
    """Most bytes of activations that are alive at once; see ``tdfx.records.dependencies.peak_activation_bytes``.

    Attributes:
        before: in the captured graph, BatchNorm folded.
        after: in the result.
    """

    before: int
    after: int


@dataclass(frozen=True)
class Coverage:
    """How much of a model its sites are.

    Attributes:
        layers: those of sites, and those left as they are with a reason.
        compressible: layers of sites.
        factorized: layers that chains have taken the place of.
        macs: share of the model's multiply-accumulates that is in layers of sites.
    """

    layers: int
    compressible: int
    factorized: int
    macs: float

    def __str__(self) -> str:
        return (
            f"{self.compressible} of {self.layers} layers can be compressed, with {self.macs:.1%} of the FLOPs; "
            f"{self.factorized} {'was' if self.factorized == 1 else 'were'}"
        )


@dataclass(frozen=True)
class Report:
    """How a network was compressed, in figures.

    Attributes:
        plan: what was carried out.
        before: cost of the whole model as given.
        after: cost of the result, counted on the result itself.
        skipped: layers left as they are, with reasons.
        inputs: the example inputs that the costs hold for.
        tier: how the model was captured: "fx", "export" or "inplace".
        timings_s: seconds by stage.
        verification: largest relative differences found: "capture" (graph against model), "network" (result against
            the network with reconstructed weights), "chains" by layer, "full_rank" by layer and method if asked for;
            "correction": divergence from the original on inputs held out, without it and with what was kept.
        notes: what the user should know.
        versions: of tdfx, torch and Python.
        measured: the result timed in ONNX Runtime against its original, where that was asked for.
        peak_activation_bytes: for the example inputs; None where there is no graph.
        coverage: how much of the model is compressed.
    """

    plan: Plan
    before: Cost
    after: Cost
    skipped: tuple[Skipped, ...]
    inputs: tuple[InputSpec, ...]
    tier: str
    timings_s: dict[str, float]
    verification: dict[str, Any]
    notes: tuple[str, ...]
    versions: dict[str, str]
    measured: Measured | None = None
    peak_activation_bytes: PeakActivations | None = None
    coverage: Coverage | None = None

    def to_json(self) -> str:
        """All of it as indented JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Reads what ``to_json`` wrote; what the command line adds about the exported file is left out.

        Raises:
            PlanError: naming the field that is missing, unknown or of the wrong type.
        """
        values = parse(text, "the report")
        values.pop("export", None)
        return read(cls, values, "report")

    def __str__(self) -> str:
        lines = [str(self.plan), ""]
        rows = [
            ("FLOPs", self.before.flops, self.after.flops),
            ("parameters", self.before.params, self.after.params),
            ("weight bytes", self.before.weight_bytes, self.after.weight_bytes),
        ]
        peak = self.peak_activation_bytes
        if peak is not None:
            rows.append(("activation bytes", peak.before, peak.after))
        for name, old, new in rows:
            lines.append(f"{name:18}{count(old)} -> {count(new)} ({share(new, old)})")
        if self.before.latency_s is not None and self.after.latency_s is not None:
            old_s, new_s = self.before.latency_s, self.after.latency_s
            source = self.plan.latency_source
            lines.append(f"{'latency':18}{seconds(old_s)} -> {seconds(new_s)} ({share(new_s, old_s)}, {source})")
        if self.measured is not None:
            lines.append(f"{'measured':18}{self.measured}")
        if self.coverage is not None:
            lines.append(f"{'captured':18}{CAPTURED.get(self.tier, self.tier)}; {self.coverage}")
        lines += [f"skipped {entry.layer}: {entry.reason}" for entry in self.skipped]
        lines += [f"note: {note}" for note in self.notes if note not in self.plan.notes]
        return "\n".join(lines)


@dataclass(frozen=True)
class Result:
    """A compressed network.

    Attributes:
        module: plain layers in a ``torch.fx.GraphModule``; train/eval, ``.to``, state_dict, deepcopy and pickle work.
            Captured in place, a module of the model's own class.
        plan: one candidate per site.
        before: cost of the whole model as given.
        after: cost of ``module``.
        skipped: layers left as they are, with reasons.
        report: all of this and how it came about.
        original: a copy of the captured network, in eval mode, for ``tune``; None for results that were loaded.
    """

    module: nn.Module
    plan: Plan
    before: Cost
    after: Cost
    skipped: tuple[Skipped, ...]
    report: Report
    original: nn.Module | None = field(default=None, compare=False, repr=False)
