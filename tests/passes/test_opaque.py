from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import fx, nn

from tdfx.errors import InputError
from tdfx.passes.flatten_call import FlattenCall
from tdfx.passes.opaque import taken_apart


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
