"""What every decomposition must hold to; a new method file is tested here unasked."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from layers import bias_of, dense_layer, dtype_of, factors_of, inputs
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tdfx.decompositions import find_methods, registry
from tdfx.decompositions.base import Decomposition, Factors
from tdfx.decompositions.grouped import in_groups
from tdfx.errors import OptionError
from tdfx.records.layer import LayerSpec, Lookup, Rank, Shape, Site

# torch's hint that padding="same" with an even kernel copies the input
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


def linear(
    name: str, inputs: int, outputs: int, *shapes: Shape, bias: bool = True, dtype: str = "float64"
) -> LayerSpec:
    return LayerSpec(name, "linear", inputs, outputs, bias=bias, dtype=dtype).called_on(shapes)


def conv(
    name: str,
    inputs: int,
    outputs: int,
    kernel: Shape,
    *shapes: Shape,
    stride: int | Shape = 1,
    padding: int | Shape | str = 0,
    dilation: int = 1,
    padding_mode: str = "zeros",
    groups: int = 1,
    bias: bool = True,
    dtype: str = "float64",
) -> LayerSpec:
    dims = len(kernel)
    return LayerSpec(
        name,
        f"conv{dims}d",  # type: ignore[arg-type]
        inputs,
        outputs,
        kernel,
        stride=(stride,) * dims if isinstance(stride, int) else stride,
        padding=(padding,) * dims if isinstance(padding, int) else padding,
        padding_mode=padding_mode,
        dilation=(dilation,) * dims,
        groups=groups,
        bias=bias,
        dtype=dtype,
    ).called_on(shapes or ((2, inputs, *(9, 7, 5)[:dims]),))


def transposed(
    name: str, inputs: int, outputs: int, kernel: Shape, *shapes: Shape, output_padding: int | Shape = 0, **options: Any
) -> LayerSpec:
    """As ``conv``, for inputs of a size of 4 x 3 x 5, or of as many of these as there are directions."""
    dims = len(kernel)
    forward = conv(name, inputs, outputs, kernel, (1, inputs, *[99] * dims), **options)
    more = (output_padding,) * dims if isinstance(output_padding, int) else output_padding
    layer = replace(forward, kind=f"conv_transpose{dims}d", output_padding=more)
    return layer.called_on(shapes or ((2, inputs, *(4, 3, 5)[:dims]),))


def table(name: str, rows: int, columns: int, *shapes: Shape, dtype: str = "float64", **options: Any) -> LayerSpec:
    kind = "embeddingbag" if "mode" in options else "embedding"
    spec = LayerSpec(name, kind, rows, columns, dtype=dtype, lookup=Lookup(**options))  # type: ignore[arg-type]
    return spec.called_on(shapes)


SPECS = (
    linear("linear-2d", 20, 12, (5, 20)),
    linear("linear-3d-wider", 10, 24, (2, 7, 10), bias=False),
    linear("linear-twice-float32", 16, 16, (4, 16), (2, 3, 16), dtype="float32"),
    linear("linear-bfloat16", 24, 16, (4, 24), dtype="bfloat16"),
    linear("linear-float16", 16, 24, (4, 16), dtype="float16"),
    table("embedding", 40, 12, (3, 7), padding_idx=5),
    table("embedding-few-rows-twice", 16, 24, (9,), (2, 3, 4), dtype="float32"),
    table("embedding-bag-sum", 30, 16, (4, 6), mode="sum", padding_idx=2),
    table("embedding-bag-mean", 30, 16, (4, 6), mode="mean", padding_idx=2, dtype="float32"),
    conv("1x1", 12, 20, (1, 1)),
    conv("1x1-stride2-padded", 20, 12, (1, 1), stride=2, padding=1),
    conv("1x1-stride2x1-reflect", 16, 12, (1, 1), stride=(2, 1), padding=(1, 2), padding_mode="reflect", bias=False),
    conv("1x1-1d-float32", 12, 16, (1,), padding="same", dtype="float32"),
    conv("3x3", 8, 12, (3, 3), padding=1),
    conv("3x3-narrower-no-bias", 12, 6, (3, 3), bias=False),
    conv("3x3-few-inputs", 3, 16, (3, 3), padding=1),
    conv("3x3-stride2", 8, 10, (3, 3), stride=2, padding=1, dtype="float32"),
    conv("3x3-stride2x1-padding1x2", 10, 8, (3, 3), stride=(2, 1), padding=(1, 2)),
    conv("3x3-reflect", 8, 8, (3, 3), padding=(2, 1), padding_mode="reflect"),
    conv("3x3-replicate", 8, 8, (3, 3), stride=2, padding=(1, 2), padding_mode="replicate"),
    conv("3x3-circular", 8, 8, (3, 3), padding=2, dilation=2, padding_mode="circular", dtype="float32"),
    conv("3x3-same-reflect-dilated", 8, 8, (3, 3), padding="same", dilation=2, padding_mode="reflect", bias=False),
    conv("3x3-valid-dilated", 8, 12, (3, 3), padding="valid", dilation=2),
    conv("3x3-bfloat16", 8, 12, (3, 3), padding=1, dtype="bfloat16"),
    conv("3x3-float16", 12, 8, (3, 3), padding=1, dtype="float16"),
    conv("3x3-twice", 8, 10, (3, 3), (2, 8, 9, 7), (1, 8, 4, 11), padding=1),
    conv("3x3-unbatched", 8, 10, (3, 3), (8, 6, 9), stride=2),
    conv("5x5-same", 6, 8, (5, 5), padding="same"),
    conv("2x2-even", 12, 10, (2, 2), stride=2, padding=1),
    conv("2x2-even-same", 10, 12, (2, 2), padding="same", dtype="float32"),
    conv("1x3", 10, 16, (1, 3), padding=(0, 1)),
    conv("3x1-stride2", 16, 10, (3, 1), stride=2, padding=(1, 0)),
    conv("3x5", 6, 8, (3, 5), stride=(1, 2), padding=(1, 2)),
    conv("conv1d", 12, 10, (3,), stride=2, padding=1),
    conv("conv1d-circular-dilated", 10, 12, (5,), padding=4, dilation=2, padding_mode="circular", dtype="float32"),
    conv("conv3d", 6, 8, (3, 2, 3), stride=(1, 2, 1), padding=(1, 0, 1)),
    conv("conv3d-replicate", 8, 6, (2, 2, 2), padding=1, padding_mode="replicate", bias=False),
    conv("grouped-3x3", 16, 12, (3, 3), padding=1, groups=2),
    conv("grouped-3x3-stride2-reflect", 12, 18, (3, 3), stride=(2, 1), padding=2, padding_mode="reflect", groups=3),
    conv("grouped-3x3-same-circular", 8, 8, (3, 3), padding="same", dilation=2, padding_mode="circular", groups=2),
    conv("grouped-3x3-float32", 8, 8, (3, 3), padding=1, groups=2, bias=False, dtype="float32"),
    conv("grouped-3x3-twice", 8, 16, (3, 3), (2, 8, 9, 7), (1, 8, 4, 11), padding=1, groups=2),
    conv("grouped-3x3-unbatched", 8, 12, (3, 3), (8, 6, 9), stride=2, groups=2),
    conv("1x1-stride2-grouped", 20, 12, (1, 1), stride=2, padding=1, groups=2),
    conv("grouped-conv1d", 12, 16, (5,), stride=2, padding=4, dilation=2, padding_mode="replicate", groups=2),
    conv("grouped-conv3d", 8, 8, (3, 2, 3), stride=(1, 2, 1), padding=(1, 0, 1), groups=2),
    conv("depthwise-5x5", 6, 6, (5, 5), stride=2, padding=2, groups=6),
    conv("depthwise-5x7-circular-dilated", 4, 4, (5, 7), padding=6, dilation=2, padding_mode="circular", groups=4),
    conv("depthwise-7x7-multiplied", 4, 12, (7, 7), padding="same", padding_mode="reflect", groups=4, bias=False),
    transposed("transposed-4x4-stride2", 10, 8, (4, 4), stride=2, padding=1),
    transposed("transposed-2x3-gaps-cropped", 10, 8, (2, 3), stride=(4, 2), padding=(2, 3), output_padding=(3, 1)),
    transposed(
        "transposed-3x3-dilated-twice", 8, 8, (3, 3), (2, 8, 3, 4), (8, 2, 5), padding=2, dilation=3, bias=False
    ),
    transposed("transposed-1x1", 12, 16, (1, 1), dtype="float32"),
    transposed("transposed-1x1-spread", 16, 12, (1, 1), stride=2, output_padding=1),
    transposed("transposed-1d", 12, 10, (4,), stride=2, padding=1, dtype="bfloat16"),
    transposed("transposed-3d", 6, 6, (2, 3, 2), stride=(2, 1, 2), padding=(0, 1, 1), output_padding=(1, 0, 1)),
    transposed("transposed-grouped", 12, 18, (3, 3), stride=2, padding=1, output_padding=(1, 0), groups=3),
    transposed("transposed-depthwise", 6, 6, (5, 5), stride=2, padding=2, output_padding=1, groups=6),
)
METHODS = tuple(registry().values())
SITES = [Site.of(spec) for spec in SPECS]
PLACES = [(in_groups(method, site.layer.groups), site) for method in METHODS for site in SITES]
PAIRS = [(method, site) for method, site in PLACES if method.unsupported(site) is None]
SIMPLE = (
    "linear-2d", "linear-3d-wider", "1x1", "3x3", "3x3-narrower-no-bias", "2x2-even", "1x3", "conv1d", "conv3d",
    "grouped-3x3", "depthwise-5x5", "embedding",
)  # fmt: skip


def each(pairs: Sequence[tuple[Decomposition, Site]]) -> pytest.MarkDecorator:
    names = [f"{method.name}-{site.name}" for method, site in pairs]
    return pytest.mark.parametrize(("method", "site"), pairs, ids=names)


PLAIN = [(method, site) for method, site in PAIRS if site.name in SIMPLE]
STRIDED = [(method, site) for method, site in PAIRS if site.name.startswith("1x1-stride")]


def random_weight(site: Site, seed: int = 0) -> Tensor:
    """A float64 weight whose values the site's dtype holds."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(site.layer.weight_shape, generator=generator, dtype=torch.float64)
    return weight.to(dtype_of(site)).double()


def low_rank_weight(site: Site) -> Tensor:
    """Three separable terms and a tenth of noise."""
    generator = torch.Generator().manual_seed(3)
    shape = site.layer.weight_shape
    weight = 0.1 * random_weight(site)
    for _ in range(3):
        vectors = [torch.randn(n, generator=generator, dtype=torch.float64) for n in shape]
        term = vectors[0]
        for vector in vectors[1:]:
            term = term[..., None] * vector
        weight = weight + term
    return weight


def offered(method: Decomposition, site: Site, count: int) -> list[Rank]:
    """Some of the offered ranks, evenly spaced from the least to the most."""
    ranks = method.shortlist(site, random_weight(site), method.ranks(site))
    return [ranks[i] for i in sorted({round(i * (len(ranks) - 1) / (count - 1)) for i in range(count)})]


def middle(method: Decomposition, site: Site) -> Rank:
    return offered(method, site, 3)[1]


@cache
def cached_factors(method: Decomposition, site: Site, rank: Rank) -> Factors:
    return method.decompose(random_weight(site), rank)


def relative(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


def spliced(method: Decomposition, site: Site, rank: Rank) -> nn.Sequential:
    """The chain that replaces the site with a random weight."""
    factors = [factor.clone() for factor in cached_factors(method, site, rank)]
    return method.build(site, rank, factors, bias_of(site))


def test_every_method_and_every_layer_is_tested() -> None:
    assert all(sum(m is method for m, _ in PAIRS) >= 4 for method in METHODS)
    for method in METHODS:
        assert any(m.name == method.name and site.layer.groups > 1 for m, site in PAIRS)
    assert {site.name for _, site in PAIRS} == {spec.name for spec in SPECS}


def test_no_layer_mixes_the_single_channels_of_depthwise_groups() -> None:
    of = {site.name: {m.name: m.unsupported(site) for m, s in PLACES if s is site} for site in SITES}
    taken = {name: {method for method, refusal in found.items() if refusal is None} for name, found in of.items()}
    assert taken["depthwise-5x5"] == taken["depthwise-5x7-circular-dilated"] == {"spatial_svd"}
    assert taken["depthwise-7x7-multiplied"] == {"spatial_svd", "channel_svd"}
    assert of["depthwise-5x5"]["cp"] == "cp mixes the channels of a group, and each of the 6 groups has only one"


@each(PAIRS)
def test_full_rank_reproduces_the_weight(method: Decomposition, site: Site) -> None:
    weight, rank = random_weight(site), method.full_rank(site)
    assert relative(method.reconstruct(cached_factors(method, site, rank)), weight) <= 1e-10
    factors = factors_of(spliced(method, site, rank))
    assert relative(method.reconstruct(factors), weight) <= max(1e-10, 8 * torch.finfo(dtype_of(site)).eps)


@each(PLAIN)
@pytest.mark.parametrize("make", [random_weight, low_rank_weight])
def test_the_error_falls_with_rank(method: Decomposition, site: Site, make: Callable[[Site], Tensor]) -> None:
    weight, ranks = make(site), offered(method, site, 4)
    errors = method.errors(weight, ranks)
    best = list(itertools.accumulate(errors, min))
    assert best[-1] < best[0] < float(torch.linalg.vector_norm(weight))
    for (less, error), (more, lower) in itertools.permutations(zip(ranks, errors, strict=True), 2):
        if all(a <= b for a, b in zip(less, more, strict=True)):
            assert lower < error


@each(PAIRS)
def test_declared_cost_and_shapes_are_what_the_built_chain_has(method: Decomposition, site: Site) -> None:
    for rank in (middle(method, site), method.full_rank(site)):
        specs = method.chain(site, rank)
        chain = spliced(method, site, rank)
        assert [name for name, _ in chain.named_children()] == [spec.name for spec in specs]
        for spec, layer in zip(specs, chain, strict=True):
            parameters = list(layer.parameters())
            assert {p.dtype for p in parameters} == {dtype_of(site)}
            assert spec.params == sum(p.numel() for p in parameters)
            assert spec.weight_bytes == sum(p.nbytes for p in parameters)
        values = inputs(site.layer)
        for index, (spec, layer) in enumerate(zip(specs, chain.double(), strict=True)):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                outputs = [layer(value) for value in values]
            assert counter.get_total_flops() == 2 * spec.macs, index
            assert [tuple(value.shape) for value in values] == [call.input_shape for call in spec.calls]
            assert [tuple(value.shape) for value in outputs] == [call.output_shape for call in spec.calls]
            values = outputs
        assert [tuple(value.shape) for value in values] == [call.output_shape for call in site.layer.calls]


@each(PAIRS)
def test_the_chain_is_the_layer_with_the_reconstructed_weight(method: Decomposition, site: Site) -> None:
    chain = spliced(method, site, middle(method, site)).double()
    layer = dense_layer(site, method.reconstruct(factors_of(chain)))
    for value in inputs(site.layer):
        with torch.no_grad():
            found, expected = chain(value), layer(value)
        assert found.shape == expected.shape
        assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-10


@each(PAIRS)
def test_every_factor_moves_the_output(method: Decomposition, site: Site) -> None:
    chain = spliced(method, site, middle(method, site)).double()
    value = inputs(site.layer)[0]
    with torch.no_grad():
        expected = chain(value)
        for index in range(len(chain)):
            scaled = copy.deepcopy(chain)
            scaled[index].weight.mul_(1.01)  # type: ignore[operator]
            assert relative(scaled(value), expected) > 1e-4
            assert relative(method.reconstruct(factors_of(scaled)), method.reconstruct(factors_of(chain))) > 1e-4


@each(PLAIN)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_factors_have_equal_norms(method: Decomposition, site: Site, scale: float) -> None:
    factors = method.decompose(scale * random_weight(site), offered(method, site, 4)[1])
    norms = [float(torch.linalg.vector_norm(factor)) for factor in factors]
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-10)


@each(PAIRS)
@pytest.mark.parametrize("widen", [1, 5])
def test_offered_ranks_are_worth_offering(method: Decomposition, site: Site, widen: int) -> None:
    layer = replace(
        site.layer, in_channels=widen * site.layer.in_channels, out_channels=widen * site.layer.out_channels
    )
    shapes = [list(call.input_shape) for call in layer.calls]
    for shape in shapes:
        shape[-1 - len(layer.kernel_size)] *= widen
    layer = layer.called_on(tuple(map(tuple, shapes)))
    site = Site.of(layer)
    full = method.full_rank(site)
    free, on_grid, below = method.ranks(site), method.ranks(site, 16), method.ranks_below(site, 16)
    assert free
    assert on_grid or min(layer.weight_shape[:2]) < 32
    for ranks in (free, on_grid, below):
        assert list(ranks) == sorted(set(ranks))
        assert len(ranks) <= 150
        for rank in ranks:
            chain = method.chain(site, rank)
            assert method.is_rank(site, rank)
            assert all(r <= most for r, most in zip(rank, full, strict=True))
            fewer_macs = sum(part.macs for part in chain) < layer.macs
            assert fewer_macs or sum(part.params for part in chain) < layer.params
    assert all(r % 16 == 0 for rank in on_grid for r in rank)
    assert all(r in (1, 2, 4, 8, most) for rank in below for r, most in zip(rank, full, strict=True))
    assert all(max(rank) < 16 for rank in below)
    assert method.ranks_below(site, 1) == ()


@each(PLAIN)
def test_the_shortlist_is_a_subset_of_sane_length(method: Decomposition, site: Site) -> None:
    weight = random_weight(site)
    for ranks in (method.ranks(site), method.ranks(site, 16), method.ranks_below(site, 16), ()):
        short = method.shortlist(site, weight, ranks)
        assert set(short) <= set(ranks)
        assert len(short) == len(set(short)) <= min(method.max_ranks, 32)
        assert bool(short) == bool(ranks)


@each(PAIRS)
def test_ranks_outside_of_full_rank_are_no_ranks(method: Decomposition, site: Site) -> None:
    full = method.full_rank(site)
    assert method.is_rank(site, full)
    for mode in range(len(full)):
        for wrong in (0, full[mode] + 1):
            assert not method.is_rank(site, (*full[:mode], wrong, *full[mode + 1 :]))
    assert not method.is_rank(site, (*full, 1))
    assert not method.is_rank(site, full[1:])


@each(PAIRS)
def test_clamped_ranks_are_ranks(method: Decomposition, site: Site) -> None:
    for rank in itertools.product((0, 1, 3, 10**6), repeat=len(method.full_rank(site))):
        assert method.is_rank(site, method.clamp(site, rank))
    for rank in (*offered(method, site, 3), method.full_rank(site)):
        assert method.clamp(site, rank) == rank


@each(PLAIN)
def test_unfoldings_hold_the_weight_and_those_of_each_rank_bound_the_error(method: Decomposition, site: Site) -> None:
    weight, full = low_rank_weight(site), method.full_rank(site)
    matrices = method.unfoldings(weight)
    for matrix in matrices:
        assert torch.equal(matrix.flatten().sort().values, weight.flatten().sort().values)
    if len(full) == 1 < len(matrices):
        return
    assert tuple(min(matrix.shape[-2:]) for matrix in matrices) == full
    singular = [torch.linalg.svdvals(matrix) for matrix in matrices]
    ranks = offered(method, site, 3)
    for rank, error in zip(ranks, method.errors(weight, ranks), strict=True):
        tails = [float(torch.linalg.vector_norm(values[..., r:])) for values, r in zip(singular, rank, strict=True)]
        assert max(tails) * (1 - 1e-9) <= error <= math.hypot(*tails) * (1 + 1e-9)


@each(PAIRS)
def test_errors_are_those_of_what_is_spliced_in(method: Decomposition, site: Site) -> None:
    weight, ranks = low_rank_weight(site).to(dtype_of(site)).double(), offered(method, site, 3)[:2]
    norm = float(torch.linalg.vector_norm(weight))
    for rank, error in zip(ranks, method.errors(weight, ranks), strict=True):
        factors = factors_of(method.build(site, rank, method.decompose(weight, rank), None))
        actual = float(torch.linalg.vector_norm(weight - method.reconstruct(factors)))
        assert abs(error - actual) <= 1e-6 * actual + 4 * torch.finfo(dtype_of(site)).eps * norm


@each(PLAIN)
def test_one_seed_gives_one_result_and_leaves_the_weight_alone(method: Decomposition, site: Site) -> None:
    weight, rank = random_weight(site), middle(method, site)
    before = weight.clone()
    first, second = (method.decompose(weight, rank, seed=7) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert method.errors(weight, [rank], seed=7) == method.errors(weight, [rank], seed=7)
    for factor in first:
        assert factor.dtype == torch.float64
        factor.zero_()
    assert torch.equal(weight, before)


@each(PLAIN)
@pytest.mark.parametrize("kind", ["zero", "one filter", "repeated filters", "1e-12", "1e12"])
def test_awkward_weights_give_finite_factors_and_right_errors(method: Decomposition, site: Site, kind: str) -> None:
    weight = random_weight(site)
    if kind == "zero":
        weight = torch.zeros_like(weight)
    elif kind == "one filter":
        weight[1:] = 0
    elif kind == "repeated filters":
        weight = weight[torch.arange(len(weight)) % 2]
    else:
        weight = weight * float(kind)
    norm = float(torch.linalg.vector_norm(weight))
    ranks = [middle(method, site), method.full_rank(site)]
    for rank, error in zip(ranks, method.errors(weight, ranks), strict=True):
        factors = method.decompose(weight, rank)
        assert all(factor.isfinite().all() for factor in factors)
        actual = float(torch.linalg.vector_norm(weight - method.reconstruct(factors)))
        assert math.isclose(error, actual, rel_tol=1e-6, abs_tol=1e-10 * norm)
        assert actual <= norm
    assert error <= 1e-10 * norm


@each([(method, site) for method, site in PAIRS if site.layer.is_transposed])
def test_what_has_no_extent_in_a_transposed_chain_is_a_convolution(method: Decomposition, site: Site) -> None:
    links = method.chain(site, middle(method, site))
    for link in links:
        spreads = math.prod((*link.kernel_size, *link.stride)) > 1 or any((*link.padding, *link.output_padding))
        assert link.is_transposed == spreads
        assert link.kind.endswith(site.kind[-2:])
    assert any(link.is_transposed for link in links) == (site.name != "transposed-1x1")


@each(STRIDED)
def test_the_stride_of_a_1x1_convolution_is_in_the_first_factor(method: Decomposition, site: Site) -> None:
    layer = site.layer
    first, *others = method.chain(site, middle(method, site))
    assert first.stride == layer.stride
    assert all(math.prod(other.stride) == 1 for other in others)
    assert first.macs == layer.macs // layer.out_channels * first.out_channels


def test_find_methods_names_what_is_known() -> None:
    assert find_methods(None) == METHODS
    assert [method.name for method in find_methods(["tucker2", "svd", "tucker2"])] == ["tucker2", "svd"]
    assert [method.name for method in find_methods("cp")] == ["cp"]
    with pytest.raises(
        OptionError, match=r"unknown method 'tuker2'; did you mean 'tucker2'\? known methods: channel_svd, "
    ):
        find_methods(["tuker2"])
    with pytest.raises(OptionError, match="unknown method 'xyz'; known methods: channel_svd, cp, "):
        find_methods(["xyz"])
    with pytest.raises(OptionError, match="methods is empty; name at least one of channel_svd, cp, "):
        find_methods([])
