"""What a picture of a network shows: layers and products as boxes, what joins values, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from tdfx.decompositions import registry
from tdfx.records.candidate import DENSE, format_rank
from tdfx.records.dependencies import Operation, operations
from tdfx.records.layer import LayerSpec
from tdfx.records.network_graph import NetworkGraph
from tdfx.tables import count, share

SKIPPED, PRODUCT, JOIN, END = "skipped", "no weights", "join", "end"
"""Kinds of boxes besides the methods: a layer left alone, a product of activations, a join, an input or output."""
LAYERS_COLORS = {DENSE: "#dde3ea", SKIPPED: "#c4c4c4", PRODUCT: "#ffffff"}
PALETTE = (
    "#8dd3c7", "#fdb462", "#b3cde3", "#f4a6a0", "#b3de69", "#fccde5", "#bc9fd0", "#ffe066", "#80b1d3", "#d9b38c",
    "#a1d8a8", "#e78ac3",
)  # fmt: skip
SYMBOLS = {"add": "+", "add_": "+", "iadd": "+", "sub": "-", "mul": "x", "imul": "x", "matmul": "@"}
LONGEST = 34


@dataclass(frozen=True)
class Box:
    """One thing that is drawn.

    Attributes:
        name: of the node.
        lines: its text.
        kind: a method's name, "dense", or one of the kinds above.
        critical: whether it lies on the critical path.
    """

    name: str
    lines: tuple[str, ...]
    kind: str
    critical: bool = False


@dataclass(frozen=True)
class Picture:
    """Boxes in the order of execution, and edges between their names.

    Attributes:
        title: of the whole.
        about: a line on it.
        boxes: by name.
        edges: pairs of names, each once.
    """

    title: str
    about: str
    boxes: dict[str, Box]
    edges: tuple[tuple[str, str], ...]


def picture(network: NetworkGraph) -> Picture:
    """Draws together what has one input and neither weights nor products (activations, reshapes) with that input."""
    path = network.critical_path
    critical = frozenset() if path is None else frozenset(path.nodes)
    stands: dict[str, str | None] = {}  # for each node the box whose value it passes on, None for constants
    boxes: dict[str, Box] = {}
    edges: dict[tuple[str, str], None] = {}
    for node, operation in operations(network.dependencies).items():
        given = (stands[source] for source in network.dependencies.predecessors(node))
        sources = list(dict.fromkeys(source for source in given if source is not None))
        box = _box(network, node, operation, len(sources), node in critical)
        if box is None:
            is_value = operation.shape is not None or bool(operation.storages)
            stands[node] = sources[0] if sources and is_value else None
            continue
        stands[node], boxes[node] = node, box
        edges |= dict.fromkeys((source, node) for source in sources)
    whole, after = network.macs, network.macs_after
    title = network.name if whole == after else f"{network.name}, {share(after, whole)} of the FLOPs"
    peak = network.peak_activation_bytes
    about = "layers in the order of their calls" if peak is None else f"{count(peak)} bytes of activations at the peak"
    if path is not None:
        about = f"dark: critical path, {share(path.latency_s, path.total_s)} of the estimated latency; {about}"
    return Picture(title, about, boxes, tuple(edges))


def color(kind: str) -> str:
    """Of a box; a method has the same in all pictures."""
    methods = list(registry())
    return PALETTE[methods.index(kind) % len(PALETTE)] if kind in methods else LAYERS_COLORS.get(kind, "#ffffff")


def _box(network: NetworkGraph, node: str, operation: Operation, sources: int, critical: bool) -> Box | None:
    if operation.op in ("placeholder", "output"):
        shape = "x".join(map(str, operation.shape or ()))
        return Box(node, (" ".join(filter(None, (operation.target, shape))),), END, critical)
    layer = network.layers.get(operation.target) if operation.op == "call_module" else None
    if layer is not None:
        choice = network.choices[layer.name]
        parts = [_sizes(layer), _shares(layer.macs, choice.cost.macs, network.macs)]
        if not choice.is_dense:
            parts.insert(1, f"{choice.method} {format_rank(choice.rank)}")
        return Box(node, (_short(layer.name), ", ".join(parts)), choice.method, critical)
    if operation.op == "call_module" and operation.target in network.skipped:
        parts = [operation.kind, *([share(operation.macs, network.macs)] if operation.macs else [])]
        return Box(node, (_short(operation.target), ", ".join(parts)), SKIPPED, critical)
    if operation.macs:
        return Box(node, (_short(operation.kind), share(operation.macs, network.macs)), PRODUCT, critical)
    return Box(node, (SYMBOLS.get(operation.kind, operation.kind),), JOIN, critical) if sources > 1 else None


def _sizes(layer: LayerSpec) -> str:
    kernel = " x ".join(map(str, layer.kernel_size))
    return f"{layer.in_channels} to {layer.out_channels}{f', {kernel}' if kernel else ''}"


def _shares(before: int, after: int, whole: int) -> str:
    return share(before, whole) if before == after else f"{share(before, whole)} to {share(after, whole)}"


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"...{name[3 - LONGEST :]}"
