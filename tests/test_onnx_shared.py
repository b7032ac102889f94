"""Small matrices of tied layers are in a file once."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import tdfx


class Language(nn.Module):
    """Embeddings and heads with one weight. Input (batch, tokens)."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.word, self.other = nn.Embedding(rows, columns), nn.Embedding(rows, columns)
        self.head, self.last = nn.Linear(columns, rows, bias=False), nn.Linear(columns, rows, bias=False)
        self.other.weight = self.head.weight = self.last.weight = self.word.weight

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.word(tokens))) + self.last(torch.sin(self.other(tokens)))
        return found


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (60, 40)])
def test_the_file_shrinks_with_the_parameters(rows: int, columns: int, tmp_path: Path) -> None:
    model, tokens = Language(rows, columns).eval(), torch.randint(rows, (2, 9))
    result = tdfx.compress(model, tokens, budget="params=80%", methods="svd", target=None, rank_multiple=1)
    report = tdfx.export_onnx(result.module, tmp_path / "model.onnx", tokens)
    assert report.file_bytes <= result.after.weight_bytes + 5_000  # of names and operators
    matrices = [entry for entry in onnx.load(tmp_path / "model.onnx").graph.initializer if len(entry.dims) == 2]
    assert sum(entry.dims[0] * entry.dims[1] for entry in matrices) == result.after.params


def test_matrices_that_differ_stay(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False)).eval()
    with torch.no_grad():
        model[2].weight.copy_(model[0].weight)
        model[2].weight[0, 0] += 1e-6
    tdfx.export_onnx(model, tmp_path / "model.onnx", torch.randn(2, 6))
    assert len(onnx.load(tmp_path / "model.onnx").graph.initializer) == 2


class Autoencoder(nn.Module):
    """Decodes with the weight that it encodes with. Input (batch, 48)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.bias = nn.Linear(48, 24), nn.Parameter(torch.zeros(48))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(self.encoder(x)), self.encoder.weight.t(), self.bias)


def test_in_int8_a_matrix_read_in_two_ways_has_two_scales(tmp_path: Path) -> None:
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    report = tdfx.export_onnx(Autoencoder().eval(), tmp_path / "m.onnx", x[:4], quantize="int8", calibration=x)
    assert report.quantization is not None
    assert report.quantization.max_rel_diff < 0.1
