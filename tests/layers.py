"""Layers of torch for a ``LayerSpec``, made straight from torch's constructors: what chains are compared with."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from tdfx.decompositions.base import Factors
from tdfx.records.layer import LayerSpec, Site

LAYERS: dict[str, type[nn.Module]] = {
    "linear": nn.Linear,
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
    "embedding": nn.Embedding,
    "embeddingbag": nn.EmbeddingBag,
}


def dtype_of(site: Site) -> torch.dtype:
    return getattr(torch, site.layer.dtype)  # type: ignore[no-any-return]


def bias_of(site: Site) -> Tensor | None:
    if not site.layer.bias:
        return None
    return torch.linspace(-1, 1, site.layer.out_channels, dtype=torch.float64).to(dtype_of(site))


def dense_layer(site: Site, weight: Tensor) -> nn.Module:
    """The site's own layer in float64 with this weight and the bias of ``bias_of``."""
    spec = site.layer
    if spec.lookup is not None:
        bag = {"mode": spec.lookup.mode} if spec.lookup.mode else {}
        table = LAYERS[spec.kind](
            spec.in_channels, spec.out_channels, padding_idx=spec.lookup.padding_idx, dtype=torch.float64, **bag
        )
        table.load_state_dict({"weight": weight.T})
        return table
    options = {} if spec.kind == "linear" else {
        "kernel_size": spec.kernel_size,
        "stride": spec.stride,
        "padding": spec.padding,
        "dilation": spec.dilation,
        "groups": spec.groups,
        "padding_mode": spec.padding_mode,
    }  # fmt: skip
    if spec.is_transposed:
        options["output_padding"] = spec.output_padding
        weight = reversed_kernels(weight, spec.groups)
    layer = LAYERS[spec.kind](spec.in_channels, spec.out_channels, bias=spec.bias, dtype=torch.float64, **options)
    bias = bias_of(site)
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias.double()}))
    return layer


def reversed_kernels(weight: Tensor, groups: int) -> Tensor:
    """Group by group and kernel by kernel: inputs and outputs exchanged, the kernel's elements in reverse order."""
    outputs, inputs, *kernel = len(weight) // groups, *weight.shape[1:]
    found = torch.empty(groups * inputs, outputs, *kernel, dtype=weight.dtype)
    for group, o, i in itertools.product(range(groups), range(outputs), range(inputs)):
        elements = weight[group * outputs + o, i].flatten().tolist()[::-1]
        found[group * inputs + i, o] = torch.tensor(elements, dtype=weight.dtype).reshape(kernel)
    return found


def inputs(spec: LayerSpec) -> list[Tensor]:
    """One random float64 input, or one of random rows, per call."""
    generator = torch.Generator().manual_seed(1)
    if spec.lookup is not None:
        return [torch.randint(spec.in_channels, call.input_shape, generator=generator) for call in spec.calls]
    return [torch.randn(call.input_shape, generator=generator, dtype=torch.float64) for call in spec.calls]


def factors_of(chain: nn.Sequential) -> Factors:
    """The factors that the layers of a chain hold."""
    return tuple(_factor(layer).double() for layer in chain)


def _factor(layer: Any) -> Tensor:
    weight: Tensor = layer.weight.detach()
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        return weight.T
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return reversed_kernels(weight, layer.groups)
    return weight
