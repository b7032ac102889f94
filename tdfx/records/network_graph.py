"""A network as a graph of operators, and what became of its layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import networkx as nx

from tdfx.records.candidate import Candidate
from tdfx.records.dependencies import CriticalPath, critical_path, operations, peak_activation_bytes
from tdfx.records.layer import LayerSpec
from tdfx.tables import count, seconds, share

NO_DATA_FLOW = "not known: the model was captured in place, and its layers are shown in the order of their calls"


@dataclass(frozen=True, eq=False)
class NetworkGraph:
    """A captured network's operators, what they need of each other, and what a plan makes of the layers.

    Attributes:
        name: of the model's class.
        dependencies: the operators by node name, in the order of execution; see ``tdfx.passes.dependencies``. The
            latencies of layers are those of what the plan makes of them.
        layers: the layers that can be compressed.
        choices: what becomes of these, by name; "dense" without a plan.
        skipped: names of the layers that cannot.
        sharing: groups of layers that share parameters.
        macs: of the whole network, nothing compressed.
        has_data_flow: whether the dependencies are known; else, for a model captured in place, they are the order in
            which its layers were called.
    """

    name: str
    dependencies: nx.DiGraph
    layers: Mapping[str, LayerSpec]
    choices: Mapping[str, Candidate]
    skipped: frozenset[str]
    sharing: tuple[tuple[str, ...], ...]
    macs: int
    has_data_flow: bool = True

    @property
    def peak_activation_bytes(self) -> int | None:
        """Most bytes of activations alive at once, nothing compressed; see ``tdfx.records.dependencies``."""
        return peak_activation_bytes(self.dependencies) if self.has_data_flow else None

    @property
    def critical_path(self) -> CriticalPath | None:
        """The path of dependencies that takes longest by the estimate; None without one."""
        if not self.has_data_flow:
            return None
        path = critical_path(self.dependencies)
        return path if path.latency_s > 0 else None

    def __str__(self) -> str:
        called = [entry.target for entry in operations(self.dependencies).values() if entry.op == "call_module"]
        methods = Counter(self.choices[name].method for name in self.layers)
        known = ", ".join(f"{times} {method}" for method, times in sorted(methods.items()))
        left = sum(name in self.skipped for name in dict.fromkeys(called))
        path = self.critical_path
        peak = self.peak_activation_bytes
        alive = NO_DATA_FLOW if peak is None else f"{count(peak)} at the peak, before compression"
        lines = [
            f"{self.name}: {len(self.layers)} layers{f' ({known})' if known else ''}, {left} skipped",
            f"{'MACs':18}{count(self.macs)} -> {count(self.macs_after)} ({share(self.macs_after, self.macs)})",
            f"{'activation bytes':18}{alive}",
        ]
        if path is not None:
            part = share(path.latency_s, path.total_s)
            lines.append(f"{'critical path':18}{seconds(path.latency_s)}, {part} of {seconds(path.total_s)}")
        lines += [f"{'shared parameters':18}{', '.join(group)}" for group in self.sharing]
        return "\n".join(lines)

    @property
    def macs_after(self) -> int:
        """Multiply-accumulates of the whole network with these choices."""
        saved = sum(self.layers[name].macs - choice.cost.macs for name, choice in self.choices.items())
        return self.macs - saved

    def draw(self, path: str | Path) -> None:
        """Draws the network; layers are coloured by method, operators with one input and no weights left out.

        Args:
            path: ends in .dot for text that Graphviz reads, in .svg or .png for a picture, which takes matplotlib.

        Raises:
            InputError: another ending, matplotlib is not installed, or the path cannot be written.
        """
        from tdfx.drawing.files import draw  # reads this module's records

        draw(self, path)
