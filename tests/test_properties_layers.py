"""Every method on drawn layers, weights and ranks: exact at full rank, costs as counted, chain equal to layer.

``make fuzz`` draws 10,000 layers; a run of the tests a hundred.
"""

from __future__ import annotations

import copy
import itertools
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import bias_of, dense_layer, dtype_of, factors_of, inputs
from strategies import LAYER_COUNT, STRESSES, Stress, draw_rank, layers, reproducible, short_als, weight_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tdfx.decompositions import registry
from tdfx.decompositions.base import Decomposition, Factors
from tdfx.decompositions.grouped import in_groups
from tdfx.records.layer import LayerSpec, Rank, Site

# torch's hint that padding="same" with an even kernel copies the input
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

checked: list[LayerSpec] = []
METHODS = tuple(registry().values())


@pytest.fixture(scope="module", autouse=True)
def summary() -> Iterator[None]:
    with short_als():
        yield
    if "TDFX_FUZZ" in os.environ:
        print(f"\n{len(checked)} layer configurations checked, {len(set(checked))} of them different")


@given(layers(), st.sampled_from(STRESSES), st.integers(0, 2**32))
@reproducible(LAYER_COUNT)
def test_every_method_on_drawn_layers(layer: LayerSpec, stress: Stress, seed: int) -> None:
    site, choice = Site.of(layer), random.Random(seed)
    weight = weight_of(site, stress, seed)
    methods = [in_groups(method, layer.groups) for method in METHODS]
    refusals = [method.unsupported(site) for method in methods]
    assert None in refusals or layer.groups == layer.in_channels > 1
    assert all(refusal is None or len(refusal.split()) > 3 for refusal in refusals)
    for method, refusal in zip(methods, refusals, strict=True):
        if refusal is None:
            check_full_rank(method, site, weight)
            rank = draw_rank(method, site, check_offered_ranks(method, site, choice.choice((1, 4, 16))), choice)
            assert method.is_rank(site, rank)
            factors = method.decompose(weight, rank)
            check_error(method, weight, rank, factors)
            check_scale(method, weight, rank, factors, 2.0 ** choice.randint(-40, 40))
            check_chain(method, site, rank, factors)
    checked.append(layer)


def norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def check_full_rank(method: Decomposition, site: Site, weight: Tensor) -> None:
    full = method.full_rank(site)
    factors = method.decompose(weight, full)
    assert all(factor.isfinite().all() for factor in factors)
    assert norm(method.reconstruct(factors) - weight) <= 1e-9 * norm(weight)
    assert method.errors(weight, [full])[0] <= 1e-9 * norm(weight)


def check_offered_ranks(method: Decomposition, site: Site, grid: int) -> tuple[Rank, ...]:
    layer, full = site.layer, method.full_rank(site)
    on_grid, below = method.ranks(site, grid), method.ranks_below(site, grid)
    assert all(r % grid == 0 for rank in on_grid for r in rank)
    assert all(r in {1, 2, 4, 8, most} and r < grid for rank in below for r, most in zip(rank, full, strict=True))
    for ranks in (on_grid, below):
        assert list(ranks) == sorted(set(ranks))
        for rank in ranks[:: 1 + len(ranks) // 24]:
            chain = method.chain(site, rank)
            assert method.is_rank(site, rank)
            assert all(1 <= r <= most for r, most in zip(rank, full, strict=True))
            fewer_macs = sum(part.macs for part in chain) < layer.macs
            assert fewer_macs or sum(part.params for part in chain) < layer.params
    return (*on_grid, *below)


def check_error(method: Decomposition, weight: Tensor, rank: Rank, factors: Factors) -> None:
    assert all(factor.isfinite().all() for factor in factors)
    actual, (declared,) = norm(weight - method.reconstruct(factors)), method.errors(weight, [rank])
    assert abs(declared - actual) <= 1e-6 * actual + 1e-10 * norm(weight)
    assert actual <= (1 + 1e-9) * norm(weight)


def check_scale(method: Decomposition, weight: Tensor, rank: Rank, factors: Factors, scale: float) -> None:
    """A power of two changes exponents alone, so that all iterations take the same way; balancing rounds anew."""
    found, expected = method.reconstruct(method.decompose(scale * weight, rank)), method.reconstruct(factors)
    assert norm(found / scale - expected) <= 1e-12 * norm(weight)


def check_chain(method: Decomposition, site: Site, rank: Rank, factors: Factors) -> None:
    """Costs and shapes against torch's; outputs in float64 and in the layer's dtype against the dense layer."""
    specs, dtype = method.chain(site, rank), dtype_of(site)
    chain = method.build(site, rank, factors, bias_of(site))
    for spec, part in zip(specs, chain, strict=True):
        assert {p.dtype for p in part.parameters()} == {dtype}
        assert spec.params == sum(p.numel() for p in part.parameters())
        assert spec.weight_bytes == sum(p.nbytes for p in part.parameters())
    double = copy.deepcopy(chain).double()
    dense = dense_layer(site, method.reconstruct(factors_of(double)))
    absolute = copy.deepcopy(double)
    for parameter in absolute.parameters():
        parameter.data.abs_()
    counted = 0
    for call, value in enumerate(inputs(site.layer)):
        value = value.to(dtype).double()
        with torch.no_grad():
            with FlopCounterMode(display=False) as counter:
                outputs = list(itertools.accumulate(double, lambda x, part: part(x), initial=value))
            expected = dense(value)
            with trusted_kernels(dtype):
                rounded = chain(value.to(dtype)).double()
            # The reference, and the reconstruction of its weight, round as often as the chain does.
            allowed = 3 * rounding(absolute, value, torch.float64)
            allowed_rounded = allowed + rounding(absolute, value, dtype)
        counted += counter.get_total_flops()
        shapes = [tuple(output.shape) for output in outputs]
        assert shapes[:-1] == [spec.calls[call].input_shape for spec in specs]
        assert shapes[1:] == [spec.calls[call].output_shape for spec in specs]
        assert shapes[-1] == tuple(expected.shape) == site.layer.calls[call].output_shape
        assert bool(((outputs[-1] - expected).abs() <= allowed).all())
        assert bool(((rounded - expected).abs().le(allowed_rounded) | allowed_rounded.isinf()).all())
    assert counted == 2 * sum(spec.macs for spec in specs)


@contextmanager
def trusted_kernels(dtype: torch.dtype) -> Iterator[None]:
    """Without oneDNN in bfloat16, where it leaves zeros in the output of some 1 x 1 convolutions.

    Seen with torch 2.13 on an AVX-512 Xeon without any tdfx: 8 channels to 100 or more, 5 output positions.
    """
    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.bfloat16:
            patch.setattr(torch.backends.mkldnn, "enabled", False)
        yield


def rounding(absolute: nn.Sequential, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Bound, element by element, of the rounding error of a chain run in a dtype, from its absolute weights in float64.

    A sum of n products in any order has an error of at most n u sum |w| |x| (Higham 2002, section 3.1, to first order
    in u, the unit roundoff of the type it is accumulated in: float32 for the 16-bit types). Rounding the sum to the
    dtype adds u' of its size. What a layer gets wrong passes through the absolute weights of those after it. Infinite
    where a layer may overflow; what is below the smallest normal number may be flushed to zero.
    """
    info, accumulated = torch.finfo(dtype), torch.finfo(torch.promote_types(dtype, torch.float32))
    magnitude, error = value.abs(), torch.zeros_like(value)
    for part in absolute:
        length = part.weight[0].numel() + 1  # type: ignore[union-attr,operator]
        share = 1.1 * (length * accumulated.eps / 2 + info.eps / 2)  # a tenth for the higher orders
        magnitude, reached = part(magnitude), part(magnitude + error)
        error = (reached - magnitude) + share * reached + length * info.tiny
        error = error.masked_fill(~(reached <= info.max / 2), torch.inf)  # NaN is an infinite error times 0
    return error
