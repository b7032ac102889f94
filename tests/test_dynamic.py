from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tdfx.dynamic import free_axes, other_sizes, resized
from tdfx.errors import InputError, OptionError

INPUTS = {
    "ids": torch.zeros(2, 8),
    "mask": torch.ones(2, 8, 8),
    "table": torch.zeros(5, 3),
    "number": torch.tensor(1.0),
}


def test_the_batch_is_dimension_0_of_inputs_of_its_size() -> None:
    assert free_axes("batch", INPUTS) == {"ids": {0: "batch"}, "mask": {0: "batch"}}
    assert free_axes(None, INPUTS) == {}


def test_names_come_beside_the_batch_and_None_takes_out() -> None:
    found = free_axes({"ids": {1: "n"}, "mask": {0: None, 1: "n", -1: "n"}}, INPUTS)
    assert found == {"ids": {0: "batch", 1: "n"}, "mask": {1: "n", 2: "n"}}


@pytest.mark.parametrize(
    "dynamic", ["Batch", 3, {"ids": 1}, {"ids": {"1": "n"}}, {"ids": {1: "no name"}}, {1: {1: "n"}}]
)
def test_what_is_not_understood_is_shown(dynamic: Any) -> None:
    with pytest.raises(OptionError, match=r"dynamic.*expected"):
        free_axes(dynamic, INPUTS)


@pytest.mark.parametrize(
    ("dynamic", "words"),
    [
        ({"x": {1: "n"}}, "'x'; the inputs are ids, mask, table, number"),
        ({"ids": {2: "n"}}, r"dimension 2 of ids, which has shape \(2, 8\)"),
        ({"ids": {-3: "n"}}, r"dimension -3 of ids, which has shape \(2, 8\)"),
        ({"ids": {1: "n"}, "table": {1: "n"}}, "n is 8 and, as dimension 1 of table, 3"),
    ],
)
def test_what_is_not_there_is_named(dynamic: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        free_axes(dynamic, INPUTS)


def test_further_entries_differ_and_stay_in_range() -> None:
    inputs = {"x": torch.tensor([[1.0, -1.0]]), "ids": torch.tensor([[6, 0]])}
    found = resized({"x": {0: "batch"}, "ids": {0: "batch", 1: "n"}}, inputs, {"batch": 3, "n": 1})
    expected = torch.tensor([[1.0, -1.0], [63 / 64, -63 / 64], [62 / 64, -62 / 64]])
    torch.testing.assert_close(found["x"], expected, rtol=0, atol=0)
    torch.testing.assert_close(found["ids"], torch.tensor([[6]] * 3), rtol=0, atol=0)


def test_other_sizes_are_those_that_run_together() -> None:
    def runs(values: dict[str, Tensor]) -> None:
        if values["ids"].shape[1] > 8 or len(values["table"]) % 2:
            raise ValueError("8 at most")

    axes = {"ids": {0: "batch", 1: "n"}, "mask": {1: "n"}}
    assert other_sizes(axes, INPUTS, lambda values: runs({**values, "table": values["ids"]})) == {"n": 4}
    with pytest.raises(InputError, match=r"n = 8, but not with 16 \(ValueError: 8 at most\)"):
        other_sizes(axes, INPUTS, runs)


def test_no_size_that_is_tried_is_empty() -> None:
    tried: list[int] = []

    def runs(values: dict[str, Tensor]) -> None:
        tried.append(values["x"].shape[1])
        raise ValueError("never")

    with pytest.raises(InputError, match="n = 1, but not with 2"):
        other_sizes({"x": {1: "n"}}, {"x": torch.zeros(2, 1)}, runs)
    assert tried == [2]
