"""Finds the places where a network can be compressed, and says why each other layer is left alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn

from tdfx.passes.base import AnalysisPass, Layer, layer_at
from tdfx.passes.capture import has_stock_forward
from tdfx.passes.in_place import FIXED, InPlace
from tdfx.passes.layer_operators import arguments, attribute
from tdfx.passes.recurrent import is_recurrent
from tdfx.passes.shape_prop import Shapes
from tdfx.passes.sharing import sharers
from tdfx.passes.unpack_recurrent import obstacle
from tdfx.records.layer import ITEMSIZE, Call, Kind, LayerSpec, Lookup, Site, Skipped
from tdfx.weights import LOOKUPS, ConvTranspose, bias_of

KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.Embedding: "embedding",
    nn.EmbeddingBag: "embeddingbag",
}
TIED = (nn.Linear, *LOOKUPS)
"""Layers that may share a weight, as embedding and head of a language model do."""
TIED_REASON = "a chain for one of them would break the tie; give it a copy of its own"
PRODUCTS = frozenset({"baddbmm", "bmm", "chunk", "einsum", "matmul", "split", "tensordot"})
"""Functions that take a weight, or a part of one, times an input."""
LAYER_ADVICE = "use a layer, or a function of torch.nn.functional on the whole parameter"
DEPTHWISE_KERNEL = 5
"""In two directions: two vectors of 3 have two thirds of the elements of 3 x 3, and take a pass more."""


@dataclass(frozen=True)
class FindSites(AnalysisPass[tuple[tuple[Site, ...], tuple[Skipped, ...]]]):
    """Sites in the order of execution, and a reason for every other layer that holds a weight matrix.

    Attributes:
        shapes: what ``ShapeProp`` returned.
    """

    shapes: Shapes

    def apply(self, graph_module: fx.GraphModule) -> tuple[tuple[Site, ...], tuple[Skipped, ...]]:
        sites, skipped = [], []
        calls = {
            name: tuple(made)
            for name, made in self.shapes.calls.items()
            if has_weight_matrix(graph_module.get_submodule(name))
        }
        for name in calls:
            others = sharers(graph_module, name)
            reason = _obstacle(graph_module, name, self.shapes)
            tied = tuple(other for other in calls if other == name or other in others)
            if reason is None and others and not _is_tie(graph_module, tied, others, self.shapes):
                reason = f"it shares parameters with {', '.join(others)}; {TIED_REASON}"
            if reason is not None:
                skipped.append(Skipped(name, reason))
            elif tied[0] == name:
                first, *rest = (layer_spec(layer, layer_at(graph_module, layer), calls[layer]) for layer in tied)
                sites.append(Site(name, (first, *(replace(layer, tied=True) for layer in rest)), first.kind))
        return tuple(sites), (*skipped, *_raw_parameters(graph_module, calls))


def layer_spec(name: str, module: Layer, calls: tuple[Call, ...]) -> LayerSpec:
    """The specification of a Linear, Conv or embedding layer."""
    dtype = str(module.weight.dtype).removeprefix("torch.")
    if isinstance(module, LOOKUPS):
        rows, columns = module.weight.shape
        return LayerSpec(name, kind_of(module), rows, columns, dtype=dtype, calls=calls, lookup=_lookup(module))
    bias = module.bias is not None
    if isinstance(module, nn.Linear):
        return LayerSpec(name, "linear", module.in_features, module.out_features, bias=bias, dtype=dtype, calls=calls)
    return LayerSpec(
        name=name,
        kind=kind_of(module),
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        kernel_size=tuple(module.kernel_size),
        stride=tuple(module.stride),
        padding=module.padding if isinstance(module.padding, str) else tuple(module.padding),
        padding_mode=module.padding_mode,
        dilation=tuple(module.dilation),
        groups=module.groups,
        bias=bias,
        dtype=dtype,
        calls=calls,
        output_padding=tuple(module.output_padding) if isinstance(module, ConvTranspose) else (),
    )


def kind_of(module: nn.Module) -> Kind:
    """The kind of a Linear, Conv or embedding layer or of a subclass of one."""
    return next(kind for layer, kind in KINDS.items() if isinstance(module, layer))


def _lookup(module: nn.Embedding | nn.EmbeddingBag) -> Lookup:
    lookup = Lookup(module.padding_idx, module.scale_grad_by_freq, module.sparse)
    if isinstance(module, nn.Embedding):
        return lookup
    return replace(lookup, mode=module.mode, include_last_offset=module.include_last_offset)


def has_weight_matrix(module: nn.Module) -> bool:
    """Whether a module holds, itself or inside, a parameter of two dimensions or more."""
    return any(parameter.dim() >= 2 for parameter in module.parameters())


def _obstacle(graph_module: fx.GraphModule, name: str, shapes: Shapes) -> str | None:
    module = layer_at(graph_module, name)
    if is_recurrent(module) and isinstance(graph_module, InPlace):
        return (
            "recurrent layers are compressed in graphs; the model was captured in place: compress the submodule with "
            "it that a graph can be made of"
        )
    if is_recurrent(module):
        return obstacle(graph_module, name, shapes)
    if isinstance(module, nn.MultiheadAttention) and (module.bias_k is not None or module.add_zero_attn):
        return "attention with add_bias_kv or add_zero_attn is not compressed; without these two it is"
    if not has_stock_forward(module) and isinstance(module, tuple(KINDS)):
        return f"{type(module).__name__} has a forward of its own; use torch's layer there"
    if isinstance(graph_module, InPlace) and {"nf", "nx"} <= vars(module).keys():  # transformers' Conv1D
        name = type(module).__name__
        return f"{name} layers are compressed in graphs; the model was captured in place: use nn.Linear there"
    if not has_stock_forward(module):
        return f"{type(module).__name__} layers are not compressed; Linear, convolution and embedding layers are"
    if name in graph_module.meta.get(FIXED, {}):
        return str(graph_module.meta[FIXED][name])
    dtype = str(module.weight.dtype).removeprefix("torch.")
    if dtype not in ITEMSIZE:
        return f"its weight is {dtype}; expected one of {', '.join(ITEMSIZE)}"
    if isinstance(module, LOOKUPS):
        reason = _obstacle_to_lookup(module)
        if reason is not None:
            return reason
    elif not isinstance(module, nn.Linear) and module.groups == module.in_channels > 1 and len(module.kernel_size) > 2:
        return "depthwise convolutions are decomposed in two dimensions only"
    elif not isinstance(module, nn.Linear) and _is_small_depthwise(module):
        size = " x ".join(map(str, module.kernel_size))
        least = f"{DEPTHWISE_KERNEL} x {DEPTHWISE_KERNEL}"
        return f"a depthwise {size} convolution is cheap already; kernels of {least} and more are decomposed"
    if isinstance(module, ConvTranspose) and name in shapes.further:
        return "it is called with output_size, which a chain does not take; give the layer output_padding instead"
    return None


def _is_tie(graph_module: fx.GraphModule, layers: tuple[str, ...], others: tuple[str, ...], shapes: Shapes) -> bool:
    """Whether nobody but these linear layers and embeddings reads their weight, and they share no more than that."""
    modules = [layer_at(graph_module, name) for name in layers]
    biases = [id(bias) for module in modules if (bias := bias_of(module)) is not None]
    return (
        not isinstance(graph_module, InPlace)
        and len(layers) == 1 + len(others)
        and all(isinstance(module, TIED) and module.weight is modules[0].weight for module in modules)
        and len(set(biases)) == len(biases)
        and all(_obstacle(graph_module, name, shapes) is None for name in layers)
        and all({name, *sharers(graph_module, name)} == {*layers} for name in layers)
    )


def _obstacle_to_lookup(module: nn.Embedding | nn.EmbeddingBag) -> str | None:
    if module.max_norm is not None:
        return "it rescales its rows to max_norm as it looks them up, which no product of tables does"
    if isinstance(module, nn.EmbeddingBag) and module.mode == "max":
        return "a bag's maximum is not linear in its rows; bags of mode sum or mean are decomposed"
    return None


def _is_small_depthwise(module: nn.modules.conv._ConvNd) -> bool:
    """Whether each group has one input channel, and no two directions of the kernel are worth separating."""
    large = [size for size in module.kernel_size if size >= DEPTHWISE_KERNEL]
    return module.groups == module.in_channels > 1 and len(large) < 2


def _raw_parameters(graph_module: fx.GraphModule, layers: Iterable[str]) -> list[Skipped]:
    """Weights that the graph reads without a layer, e.g. in an einsum, or as a buffer; not those of ``layers``."""
    found = []
    held = {id(parameter) for name in layers for parameter in graph_module.get_submodule(name).parameters()}
    for node in graph_module.graph.nodes:
        value = attribute(graph_module, node) if node.op == "get_attr" else None
        if not isinstance(value, Tensor) or value.dim() < 2 or id(value) in held:
            continue
        readers = list(dict.fromkeys(_called(user) for user in node.users))
        verb = "reads" if len(readers) == 1 else "read"
        reason = f"that {' and '.join(readers)} {verb}; only"
        if isinstance(value, nn.Parameter):
            advice = f": {LAYER_ADVICE}" if {reader.partition(".")[0] for reader in readers} & PRODUCTS else ""
            found.append(Skipped(str(node.target), f"a parameter {reason} weights of layers are compressed{advice}"))
        elif any((arguments(user) or {}).get("weight") is node for user in node.users):
            found.append(Skipped(str(node.target), f"a buffer {reason} parameters are compressed: make it one"))
    return list(dict.fromkeys(found))


def _called(node: fx.Node) -> str:
    return str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target))
