from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from tdfx.precision import HALVES, in_float32, is_half


class Casting(nn.Module):
    """Names its precision in functions, methods and keywords, and has constants and a tied weight."""

    offset: Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.first, self.last = nn.Linear(6, 6, dtype=dtype), nn.Linear(6, 6, dtype=dtype)
        self.last.weight = self.first.weight
        self.register_buffer("offset", torch.full((6,), 0.1, dtype=dtype))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        y = (self.first(x) + self.offset).float().tanh().to(self.dtype)
        y = y + torch.ones(6, dtype=self.dtype)
        y = self.first(y.double().half() if self.dtype == torch.float16 else y.double().bfloat16())
        found: Tensor = self.last(y.to(dtype=self.dtype)) + index[:, None]
        return found


def drawn(dtype: torch.dtype) -> tuple[fx.GraphModule, tuple[Tensor, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return fx.symbolic_trace(Casting(dtype)), (torch.randn(5, 6).to(dtype), torch.arange(5))


@pytest.mark.parametrize("dtype", HALVES)
def test_it_computes_what_a_network_in_double_precision_does(dtype: torch.dtype) -> None:
    module, inputs = drawn(dtype)
    reference = Casting(torch.float64)
    reference.load_state_dict(module.state_dict(), strict=False)  # the constant becomes a buffer

    def to_double(x: Tensor, index: Tensor) -> Tensor:
        y = torch.tanh(reference.first(x.double()) + reference.offset) + 1
        found: Tensor = reference.last(reference.first(y)) + index[:, None]
        return found

    found = in_float32(module)(*inputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, to_double(*inputs).float(), rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError):  # a difference that rounding makes would show
        torch.testing.assert_close(module(*inputs).float(), to_double(*inputs).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
def test_weights_keep_names_and_ties_and_the_given_network_its_precision(dtype: torch.dtype) -> None:
    module, inputs = drawn(dtype)
    before = module(*inputs)
    wide = in_float32(module)
    assert [name for name, _ in wide.named_parameters()] == [name for name, _ in module.named_parameters()]
    assert wide.get_submodule("last").weight is wide.get_submodule("first").weight
    assert {value.dtype for value in wide.state_dict().values()} == {torch.float32}
    assert {value.dtype for value in module.state_dict().values()} == {dtype}
    assert torch.equal(module(*inputs), before)


def test_which_networks_are_half() -> None:
    wide = nn.Linear(3, 2)
    assert not is_half(wide) and not is_half(nn.Linear(3, 2).double()) and not is_half(nn.ReLU())
    assert is_half(nn.Sequential(wide, nn.Linear(2, 2).half())) and is_half(nn.Linear(3, 2).bfloat16())
