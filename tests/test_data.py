from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tdfx.data import Batch, batches, fitted, is_stored
from tdfx.errors import InputError, OptionError

X = torch.arange(14.0).reshape(7, 2)
Y = torch.arange(7)
MASK = torch.ones(7, 3, dtype=torch.bool)


def read(data: object, *placeholders: str, **options: Any) -> list[Any]:
    return list(batches(data, placeholders or ("x",), **{"batch_size": 3, **options}))


def joined(found: list[Any], number: int = 0) -> Tensor:
    return torch.cat([batch.inputs[number] for batch in found])


@pytest.mark.parametrize(
    "data",
    [X, (X,), {"x": X}, [X[:3], X[3:6], X[6:]], iter(X.split(3)), X.split(3), UserDict(x=X), DataLoader(X, 3)],  # type: ignore[no-untyped-call]
    ids=["tensor", "tuple", "dict", "list", "iterator", "chunks", "mapping", "loader"],
)
def test_unlabeled_data_in_every_form(data: object) -> None:
    if isinstance(data, tuple) and len(data) > 1:
        data = list(data)
    found = read(data)
    assert [(batch.index, batch.samples, batch.labels) for batch in found] == [(0, 3, None), (1, 3, None), (2, 1, None)]
    torch.testing.assert_close(joined(found), X, rtol=0, atol=0)


@pytest.mark.parametrize(
    "data",
    [(X, Y), {"x": X, "y": Y}, DataLoader(TensorDataset(X, Y), 3), [{"x": X, "y": Y}], [((X,), Y)], [([X, Y],)]],
    ids=["tuple", "dict", "loader", "dicts", "nested", "list"],
)
def test_what_a_batch_holds_beyond_the_inputs_is_its_label(data: object) -> None:
    found = read(data)
    torch.testing.assert_close(joined(found), X, rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([batch.labels for batch in found]), Y, rtol=0, atol=0)


@pytest.mark.parametrize("data", [(X, MASK), {"mask": MASK, "x": X}, [(X, MASK)], [{"mask": MASK, "x": X}]])
def test_inputs_come_in_the_order_of_the_graph(data: object) -> None:
    found = read(data, "x", "mask")
    torch.testing.assert_close(joined(found), X, rtol=0, atol=0)
    torch.testing.assert_close(joined(found, 1), MASK, rtol=0, atol=0)
    assert all(batch.labels is None for batch in found)


def test_several_labels_come_together() -> None:
    assert read([(X, 1, "a")])[0].labels == (1, "a")
    assert read([{"x": X, "a": 1, "b": 2}])[0].labels == {"a": 1, "b": 2}
    nested = read((((X, MASK), Y)), "x", "mask")
    assert [batch.samples for batch in nested] == [3, 3, 1]
    torch.testing.assert_close(nested[1].labels, Y[3:6], rtol=0, atol=0)


def test_batches_before_the_start_are_not_read() -> None:
    assert [batch.index for batch in read(X, start=1)] == [1, 2]
    torch.testing.assert_close(joined(read(X, start=2)), X[6:], rtol=0, atol=0)
    torch.testing.assert_close(joined(read(iter(X.split(3)), start=2)), X[6:], rtol=0, atol=0)  # type: ignore[no-untyped-call]
    assert read(X, start=3) == []
    bad = [torch.full((1, 2), torch.nan), X]
    assert [batch.index for batch in read(bad, start=1)] == [1]


def test_data_is_read_as_it_is_needed() -> None:
    def endless() -> Iterator[Tensor]:
        while True:
            yield X

    found = batches(endless(), ["x"])
    assert [next(found).index for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_none_is_reported_with_its_batch(value: float) -> None:
    data = X.clone()
    data[4, 1] = value
    with pytest.raises(InputError, match=rf"batch 1 .* x holds {'NaN' if value != value else 'Inf'}"):
        read(data)


@pytest.mark.parametrize("data", [[], iter(()), X[:0], (X[:0], Y[:0]), {}, ()])
def test_no_batch_is_an_error(data: object) -> None:
    with pytest.raises(InputError, match="no batch"):
        read(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "the data is a NoneType; expected a tensor"),
        ("images", "the data is a str"),
        ((X, Y[:3]), "of 7 and 3 samples"),
        ((X, 3), "a int that is no tensor"),
        (torch.tensor(1.0), "a Tensor that is no tensor"),
        ([X, 3], "batch 1 of the data is a int"),
        ([(3, Y)], "batch 0 .* input x is a int"),
        ([()], "batch 0 .* holds 0 tensors; the network has 1 inputs"),
        ([X, {"y": Y}], "batch 1 .* holds y; expected also x"),
        ([X, X[:0]], r"batch 1 .* input x is empty, of shape \(0, 2\)"),
    ],
)
def test_data_that_cannot_be_used(data: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(data)


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_batch_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(OptionError, match="batch_size"):
        batches(X, ["x"], batch_size=size)


def test_first_samples_of_a_batch() -> None:
    batch = read([(X, MASK, Y)], "x", "mask")[0]
    first = batch.first(2)
    assert (first.samples, len(first.inputs[1]), first.labels.tolist()) == (2, 2, [0, 1])
    assert batch.first(7) is batch
    shared = read([(X, torch.ones(3, 3))], "x", "mask")[0]
    assert not shared.is_divisible
    assert shared.first(2) is shared


def test_what_can_be_read_again() -> None:
    assert all(is_stored(data) for data in (X, (X,), [X], {"x": X}))
    assert not any(is_stored(data) for data in (iter([X]), DataLoader(TensorDataset(X))))


def test_floats_take_the_precision_of_the_example_and_integers_stay() -> None:
    given = Batch(0, (torch.ones(2, 3).double(), torch.ones(2, 3).long(), torch.ones(2).bfloat16()))
    found = fitted(given, ("a", "b", "c"), (torch.ones(1, 3), torch.ones(1, 3), torch.ones(1).double()))
    assert [value.dtype for value in found.inputs] == [torch.float32, torch.int64, torch.float64]


def test_samples_are_no_batches() -> None:
    given = Batch(4, (torch.ones(2, 3), torch.ones(3)))
    with pytest.raises(InputError, match=r"batch 4 of the data: input b has shape \(3,\), the example's is \(1, 3\)"):
        fitted(given, ("a", "b"), (torch.ones(1, 3), torch.ones(1, 3)))
