from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import tdfx
from tdfx.decompositions import registry
from tdfx.records.layer import LayerSpec, Site

ROOT = Path(__file__).parent.parent


def code_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def run_block(code: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs a block as a module of its own, as dataclasses expect."""
    module = types.ModuleType("documented")
    monkeypatch.setitem(sys.modules, "documented", module)
    exec(compile("from __future__ import annotations\n" + code, "documented", "exec"), vars(module))
    return vars(module)


def test_documented_method_is_exact_at_full_rank_and_computes_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    method = run_block(code_blocks("CONTRIBUTING.md")[0], monkeypatch)["InputSVD"]()
    layer = LayerSpec("conv", "conv2d", 6, 8, (3, 3), (2, 1), (1, 0), "reflect", (1, 1), bias=True, dtype="float64")
    site = Site.of(layer.called_on(((2, 6, 9, 8),)))
    weight = torch.randn(layer.weight_shape, dtype=torch.float64)
    exact = method.reconstruct(method.decompose(weight, method.full_rank(site)))
    torch.testing.assert_close(exact, weight, rtol=0, atol=1e-12)
    factors, bias = method.decompose(weight, (3,)), torch.randn(8, dtype=torch.float64)
    dense = nn.Conv2d(6, 8, 3, (2, 1), (1, 0), padding_mode="reflect", dtype=torch.float64)
    dense.weight, dense.bias = nn.Parameter(method.reconstruct(factors)), nn.Parameter(bias)
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(method.build(site, (3,), factors, bias)(x), dense(x), rtol=0, atol=1e-12)
    assert method.errors(weight, [(3,)])[0] == pytest.approx(
        float(torch.linalg.vector_norm(weight - dense.weight.detach())), rel=1e-9
    )


def test_documented_pass_does_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    drop = run_block(code_blocks("CONTRIBUTING.md")[1], monkeypatch)["DropDetach"]()

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach() + 1

    traced = fx.symbolic_trace(Net())
    assert [node.op for node in drop.run(traced).graph.nodes] == ["placeholder", "call_function", "output"]
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_method", "call_function", "output"]


def test_readme_api_runs_as_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)).eval()
    mine = types.ModuleType("mine")
    mine.model, mine.example = net, torch.randn(1, 3, 16, 16)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mine", mine)
    run_block(code_blocks("README.md")[0], monkeypatch)
    assert (tmp_path / "model.onnx").is_file()
    plan = tdfx.Plan.from_json((tmp_path / "plan.json").read_text())
    assert plan.after.macs <= plan.before.macs // 2


def test_readme_lists_every_method_and_no_other() -> None:
    section = (ROOT / "README.md").read_text().partition("## Methods")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(registry())


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"])
def test_files_named_in_the_docs_exist(name: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.DOTALL)
    named = re.findall(r"`((?:tdfx|passes|tests|benchmarks|docs|examples)/[\w/.]*)`", text)
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []
