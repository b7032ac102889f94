"""Commands run in this process, on a small model in a file of its own."""

from __future__ import annotations

from typer.testing import CliRunner

from tdfx import cli

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 32, 3, padding=1)
        self.third = nn.Linear(32, 48)
        self.table = nn.Embedding(2, 48)

    def forward(self, x, ids):
        x = self.second(self.first(x).relu()).relu().mean((2, 3))
        return self.third(x) + self.table(ids).mean(1)

def make():
    torch.manual_seed(0)
    return Net()

def small(): return nn.Sequential(nn.Conv2d(4, 8, 3, bias=False))
def fail(): raise ValueError("no such width")
def interrupt(): raise KeyboardInterrupt
"""
FILES = ["model.onnx", "model.safetensors", "plan.json", "report.json", "structure.json"]
INPUTS = ["2x4x8x8", "ids=2x3:int64"]
BOTH_INPUTS = ["--input", INPUTS[0], "--input", INPUTS[1]]
BUDGET = ["--budget", "params=60%"]
METHODS = ["--methods", "spatial_svd,svd"]


def tdfx_command(*arguments: str, code: int = 0) -> tuple[str, str]:
    """Output and error text of a command run in this process."""
    result = CliRunner().invoke(cli.app, list(arguments), prog_name="tdfx")
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    return result.stdout, result.stderr
