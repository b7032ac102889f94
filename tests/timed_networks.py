"""A small network, its profile, and a clock that counts its multiply-accumulates."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import tdfx
from tdfx.latency import runner
from tdfx.records.latency import LatencyTable
from tdfx.records.profile import Profile
from tdfx.records.result import Result
from tdfx.stages.latency import (
    measure_latency,
)

INTERLEAVED = runner.interleaved  # which tests may have replaced when they ask for times
INPUT = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@cache
def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3)
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(3200, 10)).eval()


@cache
def captured() -> tdfx.Capture:
    return tdfx.capture(network(), INPUT)


@cache
def profiled() -> Profile:
    return tdfx.profile(captured(), methods=["svd", "spatial_svd", "tucker2"], rank_multiple=4)


def macs_of(model: bytes | str) -> int:
    """Multiply-accumulates of a model's convolutions and matrix products, as a clock of these tests counts them."""
    loaded = onnx.load(model) if isinstance(model, str) else onnx.load_from_string(model)
    graph = onnx.shape_inference.infer_shapes(loaded).graph
    values = (*graph.input, *graph.output, *graph.value_info)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    shapes |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "ConstantOfShape":
            (sizes,) = (onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name == node.input[0])
            shapes[node.output[0]] = sizes.tolist()
    total = 0
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            weight, output = shapes[node.input[1]], shapes[node.output[0]]
            positions = torch.Size(output).numel() // weight[0]
            total += positions * torch.Size(weight).numel()
    return total


def simulate(monkeypatch: pytest.MonkeyPatch) -> list[bytes | str]:
    """A machine that takes a microsecond for 1,000 multiply-accumulates and 2 for every model; what it has run."""
    ran: list[bytes | str] = []
    now = [0.0]

    def session_run(model: bytes | str, runtime: Any, feed: Any = None) -> runner.Run:
        seconds = 2e-6 + 1e-9 * macs_of(model)

        def call() -> None:
            now[0] += seconds

        ran.append(model)
        return call

    monkeypatch.setattr(runner, "session_run", session_run)
    monkeypatch.setattr(runner, "waiting", lambda since: 0.0)
    monkeypatch.setattr(
        runner, "interleaved", lambda runs, **given: INTERLEAVED(runs, **{**given, "clock": lambda: now[0]})
    )
    return ran


@cache
def measured_once() -> LatencyTable:
    with pytest.MonkeyPatch.context() as patch:
        simulate(patch)
        return measure_latency(captured(), profiled())


def compress(budget: str, **options: Any) -> Result:
    return tdfx.compress(
        network(), INPUT, budget=budget, methods=["svd", "spatial_svd", "tucker2"], rank_multiple=4, **options
    )


@dataclass
class Machine:
    """How a machine differs from that of the table; how many networks it has timed."""

    pace: float = 1.0
    chain: float = 1.0
    plans: int = 0
