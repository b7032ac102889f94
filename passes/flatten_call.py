"""Takes back what ``RestoreCall`` did: the graph takes tensors alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from tdfx.errors import InputError
from tdfx.passes.base import RewritePass
from tdfx.passes.capture import LayerTracer


@dataclass(frozen=True)
class FlattenCall(RewritePass):
    """Tensors in arguments become inputs of their own; a graph that takes just these stays as it is.

    Raises (from ``run``):
        InputError: the graph has no values of these names.

    Attributes:
        names: of the tensors.
    """

    names: tuple[str, ...]

    def rewrite(self, graph_module: fx.GraphModule) -> None:
        arguments = {str(node.target): node for node in graph_module.graph.find_nodes(op="placeholder")}
        if arguments.keys() == set(self.names):
            return
        named = {node.name: node for node in graph_module.graph.nodes} | arguments
        missing = [name for name in self.names if name not in named]
        if missing:
            raise InputError(
                f"the network has no inputs {', '.join(missing)}; give the result as it was returned or loaded, not "
                "one that went through pickle"
            )
        graph = fx.Graph(tracer_cls=LayerTracer)
        found: dict[fx.Node, fx.Node | None] = {named[name]: graph.placeholder(name) for name in self.names}
        opened = set(arguments.values()) - found.keys()
        for node in graph_module.graph.nodes:
            if node not in found and node.all_input_nodes and opened.issuperset(node.all_input_nodes):
                opened.add(node)
        # What reads containers has no place in the new graph.
        output = graph.graph_copy(graph_module.graph, found | dict.fromkeys(opened))  # type: ignore[arg-type]
        graph.output(output)
        graph_module.graph = graph
