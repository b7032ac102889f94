from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from tdfx.errors import InputError
from tdfx.passes.flatten_call import FlattenCall
from tdfx.passes.opaque import taken_apart
from tdfx.stages.capture import capture


class Holder:
    def __init__(self, held: Any) -> None:
        self.first, self.held = torch.ones(2), held


class Module(nn.Linear):
    """Not of torch."""


def test_what_cannot_be_taken_apart_stays_whole() -> None:
    assert taken_apart(Holder(3)) is not None
    for value in (Holder(threading.Lock()), Module(2, 2), 3, "text"):
        assert taken_apart(value) is None


def test_a_graph_without_the_names_of_the_tensors_is_refused() -> None:
    with pytest.raises(InputError, match=r"no inputs other, more; give the result as it was returned"):
        FlattenCall(("other", "more")).run(fx.symbolic_trace(nn.Sequential(nn.ReLU())))


class Sized(nn.Module):
    """Returns an object with a size in it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Holder:
        holder = Holder(x.shape[0])
        holder.first = self.linear(x)
        return holder


def test_a_size_in_an_object_fixes_it() -> None:
    (note,) = capture(Sized(), torch.ones(2, 6)).notes
    assert "CaptureError: an output holds sizes of the inputs in an object that is no container of tensors" in note
