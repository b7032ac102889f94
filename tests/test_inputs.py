from __future__ import annotations

from collections import UserDict

import pytest
import torch
from torch import Tensor, nn

from tdfx.errors import InputError
from tdfx.inputs import as_args, as_call, as_kwargs, run

X = torch.arange(3.0)


@pytest.mark.parametrize("inputs", [X, (X,), [X]])
def test_one_input(inputs: object) -> None:
    (value,) = as_args(inputs)
    assert value is X


def test_no_positional_input_is_fine() -> None:
    assert as_args(()) == ()


def test_containers_and_constants_are_arguments() -> None:
    given = ({"x": X, "scale": 2.0}, [X, (True, None)], "mode", 3)
    assert as_args(given) == given


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": X}, r"example_inputs is a dict; expected a tensor or a tuple of arguments.*example_kwargs"),
        (None, "example_inputs is a NoneType"),
        ([X.numpy()], r"example_inputs\[0\] is a ndarray; expected a tensor, a number"),
        (((X, {"y": X.numpy()}),), r"example_inputs\[0\]\[1\]\['y'\] is a ndarray; expected a tensor"),
    ],
)
def test_what_is_no_argument_is_named(inputs: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_args(inputs)


def test_keyword_inputs() -> None:
    assert as_kwargs(None) == {}
    given = {"x": X, "scale": 2.0}
    found = as_kwargs(given)
    assert found is not given and found["x"] is X and found["scale"] == 2.0
    assert type(as_kwargs(UserDict(given))) is dict


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ([X], "example_kwargs is a list; expected a dictionary of arguments"),
        ({"x": X, "scale": slice(2)}, r"example_kwargs\['scale'\] is a slice; expected a tensor"),
    ],
)
def test_what_is_no_argument_by_keyword_is_named(kwargs: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_kwargs(kwargs)


class Greedy(nn.Module):
    """Writes into its inputs, draws random numbers and returns a nest of things."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, object]:
        x += 1
        y.mul_(2)
        return {"sum": [x * self.weight, (y, None)], "noise": torch.randn(2), "name": "greedy"}


def test_outputs_are_the_tensors_of_any_nest() -> None:
    outputs = run(Greedy(), (X,), {"y": X})
    assert [tuple(output.shape) for output in outputs] == [(3,), (3,), (2,)]
    assert not any(output.requires_grad for output in outputs)


def test_inputs_stay_as_they_are() -> None:
    x, y = X.clone(), X.clone()
    run(Greedy(), (x,), {"y": y})
    assert torch.equal(x, X) and torch.equal(y, X)


def test_runs_are_alike_and_leave_random_numbers_alone() -> None:
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        runs.append(run(Greedy(), (X,), {"y": X}))
        assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_keyword_arguments_alone_are_a_call() -> None:
    x = torch.ones(2)
    assert as_call(None, {"x": x}) == ((), {"x": x})
    with pytest.raises(InputError, match="example_inputs is a NoneType"):
        as_call(None, {})
