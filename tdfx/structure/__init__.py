"""A graph of plain layers as JSON and back, without its weights and without running anything a file says."""

from tdfx.structure.graph import decode_graph, encode_graph, named_tensors

__all__ = ["decode_graph", "encode_graph", "named_tensors"]
