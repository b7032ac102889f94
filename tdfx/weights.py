"""Weights in the one layout that methods, metrics and moments know: (out, in / groups, *kernel) as of a convolution.

Torch holds the table of an embedding as (rows, out), and the weight of a transposed convolution as (in, out / groups,
*kernel), of which the equal convolution has every kernel reversed (Dumoulin and Visin 2016, section 4.6). Both changes
of layout are their own inverses.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from tdfx.records.layer import LayerSpec

LOOKUPS = (nn.Embedding, nn.EmbeddingBag)
ConvTranspose = nn.modules.conv._ConvTransposeNd


def relaid(weight: Tensor, layer: nn.Module | LayerSpec) -> Tensor:
    """A layer's weight in the layout of ``LayerSpec.weight_shape`` from ``parameter_shape``, or the other way round."""
    if isinstance(layer, LOOKUPS) or (isinstance(layer, LayerSpec) and layer.lookup is not None):
        return weight.T
    if isinstance(layer, ConvTranspose) or (isinstance(layer, LayerSpec) and layer.is_transposed):
        return _exchanged(weight, layer.groups)
    return weight


def weight_of(layer: nn.Module) -> Tensor:
    """A layer's weight in the layout of ``LayerSpec.weight_shape``, detached; it may share the parameter's memory."""
    return relaid(cast(Tensor, layer.weight).detach(), layer)


def set_weight(layer: nn.Module, weight: Tensor) -> None:
    """Gives a layer a new parameter for its weight, from the layout of ``weight_of``."""
    layer.weight = nn.Parameter(relaid(weight, layer).contiguous())


def bias_of(layer: nn.Module) -> nn.Parameter | None:
    """A layer's bias; None for a layer without one, as every embedding is."""
    return cast("nn.Parameter | None", getattr(layer, "bias", None))


def _exchanged(weight: Tensor, groups: int) -> Tensor:
    """Within each group inputs and outputs exchanged, every kernel reversed: (groups a, b, *k) to (groups b, a, *k)."""
    apart = weight.reshape(groups, len(weight) // groups, *weight.shape[1:]).transpose(1, 2)
    return apart.flip(tuple(range(3, apart.dim()))).flatten(0, 1)
