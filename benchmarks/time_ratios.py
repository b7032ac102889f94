"""Exported networks beside the original in one interleaved run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from torch import Tensor, nn

import tdfx
from tdfx.latency import runner
from tdfx.records.latency import Runtime


def time_ratios(
    model: nn.Module, made: Mapping[str, nn.Module], example: Tensor, runtime: Runtime | None = None
) -> dict[str, float]:
    """Median over the rounds of each network's time over the model's, all in turn; one thread unless told."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{index}.onnx" for index in range(len(made) + 1)]
        for module, path in zip((model, *made.values()), paths, strict=True):
            tdfx.export_onnx(module, path, example, dynamic=None)
        before, *others = runner.network_times(list(map(str, paths)), (runtime or Runtime()).as_dict())
    found = (median(a / b for a, b in zip(after, before, strict=True)) for after in others)
    return dict(zip(made, found, strict=True))
