"""Shapes and dtypes of every value in a graph, from one run on example inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tdfx.passes.base import AnalysisPass
from tdfx.passes.in_place import InPlace
from tdfx.passes.layer_calls import LayerInterpreter, given
from tdfx.records.layer import Call, Shape


@dataclass(frozen=True)
class TensorMeta:
    """Shape and dtype of one value."""

    shape: Shape
    dtype: torch.dtype


class Shapes(dict[str, TensorMeta]):
    """Shape and dtype by node name, for nodes whose value is a tensor; and for outputs of layers inside Python code.

    Attributes:
        calls: of each layer that ran, by qualified name, those on one tensor that returned one.
        further: names of layers that were called with more than a tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[Call]] = {}
        self.further: set[str] = set()


@dataclass(frozen=True)
class ShapeProp(AnalysisPass[Shapes]):
    """Shape and dtype of every value, and calls of every layer.

    Attributes:
        inputs: one value per placeholder of the graph, in order.
    """

    inputs: tuple[Tensor, ...]

    def apply(self, graph_module: fx.GraphModule) -> Shapes:
        recorder = _Recorder(graph_module)
        interpret(recorder, self.inputs)
        return recorder.shapes


def interpret(interpreter: fx.Interpreter, inputs: Iterable[Tensor]) -> None:
    """Runs a graph on copies of these inputs; without gradients, the caller's random state kept."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        interpreter.run(*(value.clone() for value in inputs))


class _Recorder(LayerInterpreter):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.shapes = Shapes()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n.name] = _meta(value)
        return value

    def call_layer(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], forward: Any) -> Any:
        calls = self.shapes.calls.setdefault(name, [])
        if sum(value is not None for value in (*args, *kwargs.values())) > 1:
            self.shapes.further.add(name)
        value = forward(*args, **kwargs)
        if isinstance(given(args, kwargs), Tensor) and isinstance(value, Tensor):
            calls.append(Call(tuple(given(args, kwargs).shape), tuple(value.shape)))
            if isinstance(self.module, InPlace):  # which has no node for it
                self.shapes[f"{name}[{len(calls) - 1}]"] = _meta(value)
        return value


def _meta(value: Tensor) -> TensorMeta:
    return TensorMeta(tuple(value.shape), value.dtype)


def bind(graph_module: fx.GraphModule, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Positional and keyword inputs in the order of the graph's placeholders."""
    names = [node.target for node in graph_module.graph.nodes if node.op == "placeholder"]
    return (*args, *(kwargs[name] for name in names[len(args) :]))
