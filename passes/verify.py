"""Checks that every chain computes its layer with the weight its factors stand for.

In float64, so that what is compared is the algebra (stride, padding, dilation, bias, order of factors) and not
rounding: the layer with the reconstructed weight and the chain must agree to 1e-9 of the largest output. On random
inputs of the shapes that the layer meets, or random rows of a table: all zeros or ones, which example inputs may be,
hide most mistakes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from tdfx.decompositions import registry
from tdfx.decompositions.base import Decomposition
from tdfx.decompositions.grouped import in_groups
from tdfx.errors import VerificationError
from tdfx.passes.base import AnalysisPass, Layer, call_chain, exchange, fork, layer_at
from tdfx.passes.factorize import Replacement
from tdfx.passes.layer_calls import LayerInterpreter, given
from tdfx.passes.shape_prop import interpret
from tdfx.records.layer import Site
from tdfx.weights import bias_of, set_weight, weight_of

CHAIN_RTOL = 1e-9
FULL_RANK_RTOL = 1e-8


@dataclass(frozen=True)
class VerifyChains(AnalysisPass[dict[str, float]]):
    """Largest relative difference between chain and layer by site name; run on the graph before it is rewritten.

    Raises (from ``run``):
        VerificationError: naming the layer, when a chain does not compute it.

    Attributes:
        inputs: one value per placeholder of the graph, in order.
        replacements: chains by layer name.
    """

    inputs: tuple[Tensor, ...]
    replacements: Mapping[str, Replacement]

    def apply(self, graph_module: fx.GraphModule) -> dict[str, float]:
        layers = {
            name: reconstructed_layer(layer_at(graph_module, name), replacement)
            for name, replacement in self.replacements.items()
        }
        chains = {name: copy.deepcopy(entry.chain).double() for name, entry in self.replacements.items()}
        return compare_layers(graph_module, self.inputs, layers, chains)


def reconstructed_layer(layer: Layer, replacement: Replacement) -> Layer:
    """The dense layer, in float64, with the weight that the factors stand for, and a chain's bias if it has its own."""
    dense = copy.deepcopy(layer).double()
    chain = [cast(Layer, factor) for factor in replacement.chain]
    factors = replacement.factors or [weight_of(factor) for factor in chain]
    rounded = [factor.to(layer.weight.dtype).double() for factor in factors]
    method = in_groups(registry()[replacement.method], getattr(layer, "groups", 1))
    set_weight(dense, method.reconstruct(rounded))
    if chain[-1].bias is not None:
        dense.bias = nn.Parameter(chain[-1].bias.detach().double())
    return dense


def with_reconstructed_weights(graph_module: fx.GraphModule, replacements: Mapping[str, Replacement]) -> fx.GraphModule:
    """The graph with dense layers that compute what the chains do, in the layers' own dtypes."""
    dense = fork(graph_module)
    for name, replacement in replacements.items():
        layer = layer_at(graph_module, name)
        exchange(dense, name, reconstructed_layer(layer, replacement).to(layer.weight.dtype))
    return dense


@dataclass(frozen=True)
class VerifyFullRank(AnalysisPass[dict[str, float]]):
    """Largest relative difference between dense layer and full-rank chain, by ``site.method``.

    Raises (from ``run``):
        VerificationError: naming layer and method, when full rank is not the identity.

    Attributes:
        inputs: one value per placeholder of the graph, in order.
        sites: the sites to check.
        methods: the methods to check where they apply.
        seed: of the decompositions.
    """

    inputs: tuple[Tensor, ...]
    sites: tuple[Site, ...]
    methods: tuple[Decomposition, ...]
    seed: int = 0

    def apply(self, graph_module: fx.GraphModule) -> dict[str, float]:
        found = {}
        for method in self.methods:
            at = {site.name: in_groups(method, site.layer.groups) for site in self.sites}
            sites = [site for site in self.sites if at[site.name].unsupported(site) is None]
            layers = {site.name: copy.deepcopy(layer_at(graph_module, site.name)).double() for site in sites}
            chains = {site.name: self._full_rank_chain(at[site.name], site, layers[site.name]) for site in sites}
            differences = compare_layers(graph_module, self.inputs, layers, chains, FULL_RANK_RTOL, method.name)
            found.update({f"{name}.{method.name}": value for name, value in differences.items()})
        return found

    def _full_rank_chain(self, method: Decomposition, site: Site, layer: Layer) -> nn.Module:
        exact = Site.of(replace(site.layer, dtype="float64"))
        factors = method.decompose(weight_of(layer), method.full_rank(exact), seed=self.seed)
        return method.build(exact, method.full_rank(exact), factors, bias_of(layer))


def compare_layers(
    graph_module: fx.GraphModule,
    inputs: Iterable[Tensor],
    layers: Mapping[str, nn.Module],
    chains: Mapping[str, nn.Module],
    rtol: float = CHAIN_RTOL,
    method: str = "",
) -> dict[str, float]:
    """Runs the graph and compares float64 layers and chains on random inputs of every shape they meet.

    Raises:
        VerificationError: the difference exceeds ``rtol`` of the layer's largest output.
    """
    comparison = _Comparison(graph_module, layers, chains)
    interpret(comparison, inputs)
    for name, (absolute, relative) in comparison.differences.items():
        if not relative <= rtol:
            what = f"{method} at full rank" if method else "its chain"
            raise VerificationError(
                f"layer {name}: {what} differs from the layer by {absolute:.3g} ({relative:.3g} of its largest "
                f"output, allowed {rtol:.0e}); exclude the layer or report the model",
                max_abs_diff=absolute,
                max_rel_diff=relative,
            )
    return {name: relative for name, (_, relative) in comparison.differences.items()}


class _Comparison(LayerInterpreter):
    def __init__(
        self, graph_module: fx.GraphModule, layers: Mapping[str, nn.Module], chains: Mapping[str, nn.Module]
    ) -> None:
        super().__init__(graph_module)
        self.layers, self.chains = layers, chains
        self.generator = torch.Generator().manual_seed(0)
        self.differences: dict[str, tuple[float, float]] = {}

    def call_layer(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], forward: Any) -> Any:
        if name in self.chains:
            layer, chain = self.layers[name], self.chains[name]
            drawn = partial(self._drawn, layer, given(args, kwargs))
            positional, named = pytree.tree_map_only(Tensor, drawn, (args, kwargs))
            found = relative_difference(layer(*positional, **named), call_chain(chain, *positional, **named))
            self.differences[name] = max(found, self.differences.get(name, (0.0, 0.0)), key=lambda pair: pair[1])
        return forward(*args, **kwargs)

    def _drawn(self, layer: nn.Module, met: Tensor, value: Tensor) -> Tensor:
        """A random value like one that the layer is called with, ``met`` the first; offsets of bags stay."""
        if value.is_floating_point():
            return torch.randn(value.shape, generator=self.generator, dtype=torch.float64).to(value.device)
        if value is not met:
            return value
        rows = weight_of(layer).shape[1]
        return torch.randint(rows, value.shape, generator=self.generator, dtype=value.dtype).to(value.device)


def relative_difference(reference: Tensor, other: Tensor) -> tuple[float, float]:
    """Largest |a - b|, and that over the largest finite |a|; infinite if shapes or infinities differ or NaN occurs."""
    if reference.shape != other.shape or reference.dtype != other.dtype:
        return math.inf, math.inf
    if reference.numel() == 0:
        return 0.0, 0.0
    if reference.is_complex():
        reference, other = torch.view_as_real(reference.resolve_conj()), torch.view_as_real(other.resolve_conj())
    a, b = reference.detach().double(), other.detach().double()
    absolute = float((a - b).abs().masked_fill(a == b, 0.0).max())  # infinities of one sign are equal
    largest = float(a.abs().masked_fill(~a.isfinite(), 0.0).max())
    if math.isnan(absolute):
        return math.inf, math.inf
    return absolute, absolute / largest if largest > 0 else (0.0 if absolute == 0 else math.inf)
