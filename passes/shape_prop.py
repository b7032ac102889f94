"""Shapes and dtypes of every value in a graph, from one run on example inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tdfx.passes.base import AnalysisPass
from tdfx.records.layer import Shape


@dataclass(frozen=True)
class TensorMeta:
    """Shape and dtype of one value."""

    shape: Shape
    dtype: torch.dtype


@dataclass(frozen=True)
class ShapeProp(AnalysisPass[dict[str, TensorMeta]]):
    """Shape and dtype by node name, for nodes whose value is a tensor.

    Attributes:
        inputs: one value per placeholder of the graph, in order.
    """

    inputs: tuple[Tensor, ...]

    def apply(self, graph_module: fx.GraphModule) -> dict[str, TensorMeta]:
        recorder = _Recorder(graph_module)
        interpret(recorder, self.inputs)
        return recorder.metas


def interpret(interpreter: fx.Interpreter, inputs: Iterable[Tensor]) -> None:
    """Runs a graph on copies of these inputs; without gradients, the caller's random state kept."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        interpreter.run(*(value.clone() for value in inputs))


class _Recorder(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.metas: dict[str, TensorMeta] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.metas[n.name] = TensorMeta(tuple(value.shape), value.dtype)
        return value


def bind(graph_module: fx.GraphModule, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Positional and keyword inputs in the order of the graph's placeholders."""
    names = [node.target for node in graph_module.graph.nodes if node.op == "placeholder"]
    return (*args, *(kwargs[name] for name in names[len(args) :]))
