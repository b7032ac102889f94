"""The matrix that a table is multiplied with gives the layer's output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdfx.lookups import one_hot

GENERATOR = torch.Generator().manual_seed(0)
PAIRS = torch.randint(9, (4, 5), generator=GENERATOR)
FLAT = torch.randint(9, (7,), generator=GENERATOR)
WEIGHTS = torch.randn(4, 5, generator=GENERATOR)
CASES: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {
    "embedding": (nn.Embedding(9, 3, padding_idx=2), (PAIRS,)),
    "embedding of int32": (nn.Embedding(9, 3), (PAIRS.int(),)),
    "sum": (nn.EmbeddingBag(9, 3, mode="sum", padding_idx=2), (PAIRS,)),
    "mean": (nn.EmbeddingBag(9, 3, padding_idx=2), (PAIRS,)),
    "weighted": (nn.EmbeddingBag(9, 3, mode="sum"), (PAIRS, None, WEIGHTS)),
    "offsets": (nn.EmbeddingBag(9, 3), (FLAT, torch.tensor([0, 3, 3, 4]))),
    "last offset": (nn.EmbeddingBag(9, 3, mode="sum", include_last_offset=True), (FLAT, torch.tensor([0, 2, 7]))),
}


@pytest.mark.parametrize("name", CASES)
def test_times_the_table_it_is_the_output(name: str) -> None:
    layer, arguments = CASES[name]
    with torch.no_grad():
        expected: Tensor = layer.double()(*(v.double() if v is WEIGHTS else v for v in arguments)).flatten(0, -2)
        found = one_hot(layer, *arguments) @ layer.weight  # type: ignore[arg-type, operator]
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_equal_rows_of_a_bag_count_as_one() -> None:
    found = one_hot(nn.EmbeddingBag(4, 2, mode="sum"), torch.tensor([[1, 1, 3]]))
    torch.testing.assert_close(found.to_dense(), torch.tensor([[0.0, 2.0, 0.0, 1.0]]).double(), rtol=0, atol=0)
