"""Gives the layers of a compressed network back the mean and spread that their outputs had.

Least squares shrinks what it cannot explain: each compressed layer's output varies less than the original's, the next
one's input is smaller again, and in a deep network the signal fades. Layer by layer, in the order of execution and on
what the layers before it really produce now, every channel y becomes g (y - mean) + wanted mean, with
g = (wanted deviation / deviation)^power; both are absorbed by the chain's last factor and bias.

Related: Nagel et al. 2019, section 4.2 (means alone); re-estimation of BatchNorm statistics does the same where a
BatchNorm follows.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tdfx.passes.base import AnalysisPass, RewritePass, exchange, layer_at
from tdfx.passes.fold_batch_norm import BatchNorm
from tdfx.passes.layer_calls import LayerInterpreter, given
from tdfx.passes.shape_prop import interpret

MOST_GAIN = 4.0  # of a channel, and least 1 / MOST_GAIN: a channel that is nearly dead stays so


@dataclass(frozen=True)
class Moved:
    """Mean and standard deviation of each channel of a value, float64."""

    mean: Tensor
    deviation: Tensor


@dataclass(frozen=True)
class Correction:
    """What becomes of a layer's output, by channel: y * gain + shift; float64."""

    gain: Tensor
    shift: Tensor


@dataclass(frozen=True)
class OutputSpread(AnalysisPass[dict[str, Moved]]):
    """Mean and deviation of the outputs of layers that are called once.

    Attributes:
        layers: their names.
        inputs: one value per placeholder of the graph, in order.
    """

    layers: tuple[str, ...]
    inputs: tuple[Tensor, ...]

    def apply(self, graph_module: fx.GraphModule) -> dict[str, Moved]:
        observer = _Observer(graph_module, self.layers)
        interpret(observer, self.inputs)
        return {name: moved for name, moved in observer.found.items() if observer.calls[name] == 1}


@dataclass(frozen=True)
class FindCorrections(AnalysisPass[dict[str, Correction]]):
    """Corrections of layers, each found with those before it in place.

    Attributes:
        wanted: mean and deviation by layer.
        inputs: one value per placeholder of the graph, in order; those that ``wanted`` was taken on.
        power: of the ratio of deviations; 1 restores the spread, 0 corrects means alone.
    """

    wanted: Mapping[str, Moved]
    inputs: tuple[Tensor, ...]
    power: float

    def apply(self, graph_module: fx.GraphModule) -> dict[str, Correction]:
        corrector = _Corrector(graph_module, self.wanted, self.power)
        interpret(corrector, self.inputs)
        return corrector.found


@dataclass(frozen=True)
class ReestimateBatchNorm(RewritePass):
    """Every BatchNorm's running statistics are those of these inputs, with the BatchNorms before it re-estimated.

    Attributes:
        inputs: one value per placeholder of the graph, in order.
    """

    inputs: tuple[Tensor, ...]

    def rewrite(self, graph_module: fx.GraphModule) -> None:
        estimator = _Estimator(graph_module)
        interpret(estimator, self.inputs)
        for name, module in estimator.found.items():
            exchange(graph_module, name, module)


class _Observer(LayerInterpreter):
    def __init__(self, graph_module: fx.GraphModule, layers: tuple[str, ...]) -> None:
        super().__init__(graph_module)
        self.layers = layers
        self.calls: Counter[str] = Counter()
        self.found: dict[str, Moved] = {}

    def call_layer(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], forward: Any) -> Any:
        output = forward(*args, **kwargs)
        if name in self.layers:
            self.calls[name] += 1
            self.found[name] = spread(output, _channel_dim(self.module, name, output))
        return output


class _Corrector(LayerInterpreter):
    def __init__(self, graph_module: fx.GraphModule, wanted: Mapping[str, Moved], power: float) -> None:
        super().__init__(graph_module)
        self.wanted, self.power = wanted, power
        self.found: dict[str, Correction] = {}

    def call_layer(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], forward: Any) -> Any:
        output = forward(*args, **kwargs)
        if name not in self.wanted:
            return output
        dim = _channel_dim(self.module, name, output)
        wanted, now = self.wanted[name], spread(output, dim)
        alive = (now.deviation > 0) & (wanted.deviation > 0)
        ratio = torch.where(alive, wanted.deviation / now.deviation, torch.ones_like(now.deviation))
        gain = ratio.clamp(1 / MOST_GAIN, MOST_GAIN) ** self.power
        self.found[name] = Correction(gain, wanted.mean - gain * now.mean)
        shape = [-1 if d == dim else 1 for d in range(output.dim())]
        moved = (gain.reshape(shape).to(output.dtype), self.found[name].shift.reshape(shape).to(output.dtype))
        return output * moved[0] + moved[1]


class _Estimator(LayerInterpreter):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.found: dict[str, nn.Module] = {}

    def call_layer(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], forward: Any) -> Any:
        module = self.module.get_submodule(name)
        if not isinstance(module, BatchNorm) or module.running_mean is None or module.running_var is None:
            return forward(*args, **kwargs)
        if name not in self.found:
            now = spread(given(args, kwargs), 1)
            estimated = copy.deepcopy(module)
            assert estimated.running_mean is not None and estimated.running_var is not None
            estimated.running_mean.copy_(now.mean)
            estimated.running_var.copy_(now.deviation.square())
            self.found[name] = estimated
        return self.found[name](*args, **kwargs)


def spread(value: Tensor, dim: int) -> Moved:
    """Mean and standard deviation along one dimension, over all others."""
    rows = value.movedim(dim, 0).flatten(1)
    mean = rows.mean(1, dtype=torch.float64)
    centred = rows - mean.to(rows.dtype)[:, None]
    return Moved(mean, centred.square().mean(1, dtype=torch.float64).sqrt())


def _channel_dim(root: nn.Module, path: str, output: Tensor) -> int:
    layer = layer_at(root, path)
    return output.dim() - 1 if isinstance(layer, nn.Linear) else output.dim() - layer.weight.dim() + 1
