"""What hypothesis draws: layers, their weights and ranks; descriptions of small networks.

``TDFX_FUZZ`` sets how many layers are drawn (``make fuzz``); the draws are the same in every run.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import pytest
import torch
from drawn_networks import Description, Kind, Stage
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from layers import dtype_of
from torch import Tensor

from tdfx.budget import LATENCY, RESOURCES
from tdfx.decompositions import als
from tdfx.decompositions.base import Decomposition
from tdfx.records.layer import ITEMSIZE, LayerSpec, Rank, Shape, Site

LAYER_COUNT = int(os.environ.get("TDFX_FUZZ", "100"))
NETWORK_COUNT = 10

MOST_WEIGHTS = {1: 40 * 40 * 7, 2: 40 * 40 * 7 * 7, 3: 16 * 16 * 7 * 7}  # by directions; bounds the channels
MOST_ALS_RANK = 24  # ranks between this and full rank cost CP much time and meet no other code
MOST_CHANNELS_BUILT = 200  # full ranks beyond are decomposed, but not built and run

Stress = Literal["noise", "low rank", "one filter", "repeated filters", "constant", "zero", "tiny", "huge"]
STRESSES: tuple[Stress, ...] = get_args(Stress)


def reproducible(examples: int) -> settings:
    """Settings for this many examples: the same ones in every run, nothing written to disk, no clock."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=[HealthCheck.too_slow],
    )


@contextmanager
def short_als() -> Iterator[None]:
    """Few sweeps: what is checked here holds however near alternating least squares has come."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(als, "SWEEPS", 6)
        yield


def layers() -> st.SearchStrategy[LayerSpec]:
    """A layer of any kind, one in four a transposed convolution."""
    return st.integers(0, 3).flatmap(lambda kind: transposed_convolutions() if kind == 3 else others())


@st.composite
def transposed_convolutions(draw: st.DrawFn) -> LayerSpec:
    """A transposed convolution, a third of these in groups, with one or two calls that torch accepts."""
    dims = draw(st.sampled_from((2, 2, 1, 3)))
    kernel, stride, dilation = (draw(along(dims, most)) for most in (5, 4, 3 if dims < 3 else 2))
    padding = draw(along(dims, 6, least=0))
    more = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    most = min(40, max(1, math.isqrt(MOST_WEIGHTS[dims] // math.prod(kernel))))
    groups = draw(st.sampled_from((1, 1, 1, 1, 2, 3)))
    inputs, outputs = (groups * draw(channels(max(1, most // groups))) for _ in range(2))
    # The least sizes of which something is left: (size - 1) s - 2 p + d (k - 1) + 1 + more is 1 or more.
    options = zip(kernel, stride, dilation, padding, more, strict=True)
    least = tuple(max(1, 1 - (d * (k - 1) + o - 2 * p) // s) for k, s, d, p, o in options)
    shapes = []
    for _ in range(draw(st.integers(1, 2))):
        lead = draw(st.sampled_from(((1,), (2,), (3,), ())))
        sizes = (size + draw(st.integers(0, 3 if dims < 3 else 1)) for size in least)
        shapes.append((*lead, inputs, *sizes))
    return LayerSpec(
        "layer",
        f"conv_transpose{dims}d",  # type: ignore[arg-type]
        inputs,
        outputs,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(tuple(ITEMSIZE))),
        output_padding=more,
    ).called_on(tuple(shapes))


@st.composite
def others(draw: st.DrawFn) -> LayerSpec:
    """A linear layer or convolution, a third of these in groups, with one or two calls that torch accepts."""
    dims = draw(st.sampled_from((2, 2, 1, 3, 0)))
    bias, dtype = draw(st.booleans()), draw(st.sampled_from(tuple(ITEMSIZE)))
    if dims == 0:
        inputs, outputs = draw(channels()), draw(channels())
        leads = draw(st.lists(st.lists(st.integers(1, 3), max_size=3).map(tuple), min_size=1, max_size=2))
        return LayerSpec("layer", "linear", inputs, outputs, bias=bias, dtype=dtype).called_on(
            tuple((*lead, inputs) for lead in leads)
        )
    kernel, stride, dilation = (draw(along(dims, most)) for most in (7, 3, 3 if dims < 3 else 2))
    padding = draw(st.one_of(along(dims, 4, least=0), st.sampled_from(("same", "valid"))))
    if padding == "same":
        stride = (1,) * dims  # torch takes no other
    mode = draw(st.sampled_from(("zeros", "zeros", "reflect", "replicate", "circular")))
    most = min(40, max(1, math.isqrt(MOST_WEIGHTS[dims] // math.prod(kernel))))
    groups = draw(st.sampled_from((1, 1, 1, 1, 2, 3)))
    inputs, outputs = (groups * draw(channels(max(1, most // groups))) for _ in range(2))
    least = tuple(
        least_size(k, d, padding if isinstance(padding, str) else padding[i], mode)
        for i, (k, d) in enumerate(zip(kernel, dilation, strict=True))
    )
    shapes = []
    for _ in range(draw(st.integers(1, 2))):
        lead = draw(st.sampled_from(((1,), (2,), (3,), ())))
        sizes = (size + draw(st.integers(0, 5 if dims < 3 else 2)) for size in least)
        shapes.append((*lead, inputs, *sizes))
    return LayerSpec(
        "layer",
        f"conv{dims}d",  # type: ignore[arg-type]
        inputs,
        outputs,
        kernel,
        stride=stride,
        padding=padding,
        padding_mode=mode,
        dilation=dilation,
        groups=groups,
        bias=bias,
        dtype=dtype,
    ).called_on(tuple(shapes))


def channels(most: int = 40) -> st.SearchStrategy[int]:
    return st.one_of(st.integers(1, min(most, 6)), st.integers(1, most))


def along(dims: int, most: int, *, least: int = 1) -> st.SearchStrategy[Shape]:
    """One number per direction, equal ones half of the time."""
    number = st.integers(least, most)
    return st.one_of(number.map(lambda n: (n,) * dims), st.tuples(*[number] * dims))


def least_size(kernel: int, dilation: int, padding: int | str, mode: str) -> int:
    """Least extent of an input that torch accepts in one direction: often smaller than the kernel."""
    reach = dilation * (kernel - 1)
    if padding == "same":
        longest, covered = (reach + 1) // 2, 1
    else:
        longest = 0 if isinstance(padding, str) else padding
        covered = reach + 1 - 2 * longest
    # Reflection needs one element more than it mirrors; a circle must not be run through twice.
    return max(1, covered, {"reflect": longest + 1, "circular": longest}.get(mode, 1))


def weight_of(site: Site, stress: Stress, seed: int) -> Tensor:
    """A float64 weight, finite and exact in the site's dtype."""
    generator = torch.Generator().manual_seed(seed)
    shape, dtype = site.layer.weight_shape, dtype_of(site)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    weight = normal(*shape)
    if stress == "low rank":
        weight = torch.zeros(shape, dtype=torch.float64)
        for _ in range(2):
            term = normal(shape[0])
            for size in shape[1:]:
                term = term[..., None] * normal(size)
            weight += term
    elif stress == "one filter":
        weight[1:] = 0
    elif stress == "repeated filters":
        weight = weight[torch.arange(len(weight)) % 2]
    elif stress == "constant":
        weight = torch.full(shape, float(normal(1)), dtype=torch.float64)
    elif stress == "zero":
        weight = torch.zeros(shape, dtype=torch.float64)
    elif stress == "tiny":
        weight *= 1e-30
    elif stress == "huge":
        weight *= 1e20
    most = torch.finfo(dtype).max / 2
    return weight.clamp(-most, most).to(dtype).double()


def draw_rank(method: Decomposition, site: Site, offered: Sequence[Rank], choice: random.Random) -> Rank:
    """A rank that the method takes: an offered one, full rank, or a low one of any shape."""
    full = method.full_rank(site)
    low = method.clamp(site, tuple(choice.randint(1, min(most, MOST_ALS_RANK)) for most in full))
    built = [rank for rank in offered if max(rank) <= MOST_ALS_RANK]
    whole = [full] if max(full) <= MOST_CHANNELS_BUILT else []
    return choice.choice([low, choice.choice(built or [low]), *whole])


# Networks come from drawn seeds: of the few that a run can afford, hypothesis would make many alike.


def draw_network(choice: random.Random) -> Description:
    """One to four stages of any kind, mostly 2-d."""
    dims = choice.choice((2, 2, 2, 1, 3))

    def stage() -> Stage:
        return Stage(
            kind=choice.choice(get_args(Kind)),
            channels=choice.randint(3, 40 if dims < 3 else 16),
            kernel=choice.choice((3, 1, 5) if dims < 3 else (3, 1)),
            stride=choice.randint(1, 2),
            norm=choice.random() < 0.7,
            bias=choice.random() < 0.5,
            pool=choice.random() < 0.3,
        )

    return Description(
        stages=tuple(stage() for _ in range(choice.randint(1, 4))),
        size=tuple(choice.randint(4, 12 if dims < 3 else 5) for _ in range(dims)),
        hidden=choice.randint(2, 48),
        tied=choice.random() < 0.5,
        training=choice.random() < 0.5,
        dtype=choice.choice((torch.float32, torch.float64)),
    )


def draw_budget(choice: random.Random) -> str:
    """Shares of one or two resources that are counted."""
    resources = choice.sample(sorted({*RESOURCES} - {LATENCY}), choice.randint(1, 2))
    return ",".join(f"{resource}={choice.randint(25, 100)}%" for resource in resources)


def draw_options(choice: random.Random) -> dict[str, Any]:
    """Of ``compress``, all but the budget."""
    methods = (["svd", "channel_svd", "tucker2"], ["spatial_svd", "svd", "tt"], ["cp", "svd"], ["cp4", "svd"], None)
    return {
        "methods": choice.choice(methods),
        "rank_multiple": choice.choice((4, 5, 16)),
        "target": choice.choice(("ort-cpu", None)),
        "metric": choice.choice(("weight:relative", "weight:absolute", "weight:scaled")),
        "trainable": choice.random() < 0.3,
        "verify": "full" if choice.random() < 0.2 else "plan",
    }
