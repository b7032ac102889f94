"""Writes each matrix of an ONNX file once: the exporter makes constants of what a tied weight is read as.

An embedding and a head that share a factor read it as it is and transposed. The exporter computes a small transposed
matrix beforehand and writes both.
"""

from __future__ import annotations

from itertools import count

import onnx_ir as ir

MOST_ELEMENTS = 65_536
"""Of a matrix that is looked at; the exporter computes constants of a few thousand elements only."""


def share_matrices(model: ir.Model) -> None:
    """Of equal matrices among the initializers one stays; one that is another's transpose becomes a Transpose of it."""
    graph = model.graph
    taken = {value.name for node in graph.all_nodes() for value in node.outputs} | graph.initializers.keys()
    kept: dict[tuple[object, ...], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or len(tensor.shape) != 2 or tensor.size > MOST_ELEMENTS:
            continue
        if value.is_graph_output() or not value.uses():
            continue
        matrix = tensor.numpy()
        key, flipped = ((tensor.dtype, part.shape, part.tobytes()) for part in (matrix, matrix.T))
        if key in kept:
            value.replace_all_uses_with(kept[key])
        elif flipped in kept:
            node = ir.node("Transpose", [kept[flipped]], {"perm": [1, 0]})
            graph.insert_before(graph[0], node)
            (transposed,) = node.outputs
            transposed.name = next(free for i in count(1) if (free := f"{name}_transposed_{i}") not in taken)
            transposed.dtype, transposed.shape = tensor.dtype, value.shape
            value.replace_all_uses_with(transposed)
        else:
            kept[key] = value
            continue
        del graph.initializers[name]
