"""Which node of a graph needs which, what memory its value takes and how long it is estimated to run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch import Tensor, fx

from tdfx.inputs import tensors
from tdfx.layouts import strided_parts
from tdfx.passes.base import AnalysisPass
from tdfx.passes.count import counting
from tdfx.passes.shape_prop import interpret
from tdfx.records.dependencies import OPERATION, Operation, Storage
from tdfx.targets import Target


@dataclass(frozen=True)
class Dependencies(AnalysisPass[nx.DiGraph]):
    """A directed graph of node names in the order of execution, an edge from each node to every user of its value.

    Nodes have an ``Operation`` under the key ``OPERATION``. The graph is run once, which shows what lies in the memory
    of what: views, reshapes that copy nothing, and in-place operators return the storage that they were given.

    Attributes:
        inputs: one value per placeholder of the graph, in order.
        target: runtime whose latency is estimated, or None.
    """

    inputs: tuple[Tensor, ...]
    target: Target | None = None

    def apply(self, graph_module: fx.GraphModule) -> nx.DiGraph:
        recorder = _Recorder(graph_module, self.target)
        interpret(recorder, self.inputs)
        return recorder.found


class _Recorder(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule, target: Target | None) -> None:
        super().__init__(graph_module)
        self.found = nx.DiGraph()
        self._target = target
        self._count = 0
        # Addresses tell storages apart only while these are alive: compared with are the inputs of the node that runs.
        self._storages: dict[fx.Node, dict[int, Storage]] = {}
        self._kept = _addresses([*graph_module.parameters(), *graph_module.buffers()])

    def run_node(self, n: fx.Node) -> Any:
        with counting() as workloads:
            value = super().run_node(n)
        if n.op == "get_attr":
            self._kept |= _addresses(tensors(value))
        self._storages[n] = self._storages_of(n, value)
        operation = Operation(
            op=n.op,
            target=n.target if isinstance(n.target, str) else _name(n.target),
            kind=self._kind(n),
            shape=tuple(value.shape) if isinstance(value, Tensor) else None,
            storages=tuple(self._storages[n].values()),
            macs=sum(workload.macs for workload in workloads),
            latency_s=0.0 if self._target is None else sum(map(self._target.latency, workloads)),
        )
        self.found.add_node(n.name, **{OPERATION: operation})
        self.found.add_edges_from((source.name, n.name) for source in n.all_input_nodes)
        return value

    def _storages_of(self, n: fx.Node, value: Any) -> dict[int, Storage]:
        """By address."""
        known = {address: entry for source in n.all_input_nodes for address, entry in self._storages[source].items()}
        held = {}
        for part in (part for tensor in tensors(value) for part in strided_parts(tensor)):
            storage = part.untyped_storage()
            address = storage.data_ptr()
            if storage.nbytes() == 0 or address in self._kept:
                continue
            if address not in known:
                known[address] = Storage(self._count, storage.nbytes())
                self._count += 1
            held[address] = known[address]
        return held

    def _kind(self, n: fx.Node) -> str:
        if n.op == "call_module":
            return type(self.fetch_attr(str(n.target))).__name__
        if n.op == "call_method":
            return str(n.target)
        return _name(n.target) if n.op == "call_function" else n.op


def _addresses(values: Iterable[Tensor]) -> set[int]:
    return {part.untyped_storage().data_ptr() for value in values for part in strided_parts(value)}


def _name(function: Any) -> str:
    """As it is called in source: ``add`` of operator.add and of aten.add.Tensor alike."""
    name = str(getattr(function, "__name__", function))
    return name.partition(".")[0]
