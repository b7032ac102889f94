"""An ONNX file as a module, for functions that take a network."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tdfx.timing import open_session


class OnnxModule(nn.Module):
    """Computes an ONNX file's outputs in ONNX Runtime, on the CPU and in torch's number of threads.

    ``forward`` takes tensors in the order of the file's inputs, or by their names; it returns a tensor, or a tuple of
    them where the file has several outputs.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.session = open_session(path, torch.get_num_threads())

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Runs the file."""
        names = [value.name for value in self.session.get_inputs()]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        found = self.session.run(None, {name: value.detach().cpu().numpy() for name, value in given.items()})
        outputs = tuple(torch.from_numpy(value) for value in found)
        return outputs[0] if len(outputs) == 1 else outputs
