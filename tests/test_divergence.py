from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tdfx.divergence import divergence, resolve_output, variance
from tdfx.errors import InputError, OptionError


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl(reference: Tensor, found: Tensor) -> Tensor:
    """Of two vectors of logits, term by term."""
    p, q = reference.exp() / reference.exp().sum(), found.exp() / found.exp().sum()
    return sum((a * (a / b).log() for a, b in zip(p, q, strict=True)), start=torch.zeros((), dtype=p.dtype))


@pytest.mark.parametrize(("shape", "dim"), [((4, 3), 1), ((4, 5, 3), 2), ((4, 3, 2, 5), 1), ((4, 3, 2, 2, 2), 1)])
def test_logits_give_the_mean_kl_divergence(shape: tuple[int, ...], dim: int) -> None:
    reference, found = draw(*shape), draw(*shape, seed=1)
    rows = zip(*(value.movedim(dim, -1).reshape(-1, 3) for value in (reference, found)), strict=True)
    wanted = torch.stack([kl(*pair) for pair in rows]).mean()
    torch.testing.assert_close(divergence([reference], [found], "logits"), wanted, rtol=1e-12, atol=0)


def test_logits_are_those_of_the_first_float_output() -> None:
    indices, reference, found = torch.arange(4), draw(4, 3), draw(4, 3, seed=1)
    wanted = divergence([reference], [found], "logits")
    assert divergence([indices, reference, draw(4)], [indices + 1, found, draw(4, seed=2)], "logits") == wanted


def test_values_give_half_the_error_over_the_variance_as_mean_over_outputs() -> None:
    reference, found = (draw(6, 3) + 100, draw(6, 2, 2)), (draw(6, 3, seed=1) + 100, draw(6, 2, 2, seed=1))
    shares = []
    for wanted, got in zip(reference, found, strict=True):
        spread = sum(float(((row - wanted.mean(0)) ** 2).sum()) for row in wanted)
        shares.append(float(((wanted - got) ** 2).sum()) / spread)
    torch.testing.assert_close(float(divergence(reference, found, "values")), sum(shares) / 4, rtol=1e-9, atol=0)


def test_values_take_variances_from_elsewhere() -> None:
    reference, found = draw(2, 3), draw(2, 3, seed=1)
    wanted = ((reference - found) ** 2).mean() / (2 * 5.0)
    got = divergence([reference], [found], "values", [torch.tensor(5.0, dtype=torch.float64)])
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("output", ["logits", "values"])
def test_nothing_diverges_from_itself(output: str) -> None:
    assert float(divergence([draw(4, 3)], [draw(4, 3)], output)) == 0


@pytest.mark.parametrize("output", ["logits", "values"])
def test_it_is_differentiable_in_what_was_found(output: str) -> None:
    assert torch.autograd.gradcheck(
        lambda found: divergence([draw(3, 4)], [found], output), draw(3, 4, seed=1).requires_grad_()
    )


def test_half_precision_logits_are_compared_in_float32() -> None:
    found = divergence([draw(4, 3).half()], [draw(4, 3, seed=1).half()], "logits")
    assert found.dtype == torch.float32
    wanted = divergence([draw(4, 3)], [draw(4, 3, seed=1)], "logits").float()
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=0)


def test_an_output_that_does_not_vary_is_compared_as_it_is() -> None:
    assert float(variance(torch.full((4, 2), 3.0))) == 1
    assert float(divergence([torch.full((4, 2), 3.0)], [torch.full((4, 2), 5.0)], "values")) == 2


IMAGES, TOKENS = torch.zeros(2, 3, 8, 8), torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("outputs", "inputs", "wanted"),
    [
        ([torch.zeros(2, 10)], [IMAGES], "logits"),
        ([torch.zeros(2, 10)], [torch.zeros(2, 10)], "values"),  # an autoencoder
        ([torch.zeros(2, 1)], [IMAGES], "values"),
        ([torch.zeros(2)], [IMAGES], "values"),
        ([torch.zeros(2, 5, 40)], [TOKENS], "logits"),
        ([torch.zeros(2, 5, 40)], [TOKENS, torch.zeros(2, 5)], "values"),
        ([torch.zeros(2, 5, 1)], [TOKENS], "values"),
        ([torch.zeros(2, 4, 8, 8)], [IMAGES], "values"),
        ([TOKENS, torch.zeros(2, 10)], [IMAGES], "logits"),
    ],
)
def test_auto_goes_by_shapes(outputs: list[Tensor], inputs: list[Tensor], wanted: str) -> None:
    assert resolve_output("auto", outputs, inputs) == wanted


@pytest.mark.parametrize("output", ["logits", "values"])
def test_what_is_said_stands(output: str) -> None:
    assert resolve_output(output, [torch.zeros(2, 4, 8, 8)], [IMAGES]) == output


def test_unknown_output_is_refused() -> None:
    with pytest.raises(OptionError, match="output is 'probabilities'; expected auto, logits, values"):
        resolve_output("probabilities", [IMAGES], [IMAGES])


@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 1, 8, 8)])
def test_logits_of_fewer_than_two_classes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match=r"logits.*has shape.*at least 2 classes"):
        resolve_output("logits", [torch.zeros(shape)], [IMAGES])


def test_a_network_without_float_outputs_is_refused() -> None:
    with pytest.raises(InputError, match="no float tensor"):
        resolve_output("auto", [TOKENS], [IMAGES])
