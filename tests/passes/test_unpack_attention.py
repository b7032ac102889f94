"""Unpacked attention against torch's own with its fast path off, over all of its options."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdfx.contained import plain_attention
from tdfx.passes.count import counting
from tdfx.passes.unpack_attention import Attention, unpack_attention

HEADS, WIDTH, QUERIES, KEYS, BATCH = 2, 8, 4, 5, 3


@pytest.fixture(autouse=True)
def _plain_attention() -> Iterator[None]:
    with plain_attention():
        yield


def packed(**options: Any) -> nn.MultiheadAttention:
    """With biases that are not zero, as they are when new."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.MultiheadAttention(WIDTH, HEADS, **options).double()
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
    return module.eval()


def unpacked(module: nn.Module, **options: Any) -> nn.Module:
    return unpack_attention(nn.Sequential(module), **options).get_submodule("0")


def inputs(module: nn.MultiheadAttention, batched: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((QUERIES, WIDTH), (KEYS, module.kdim), (KEYS, module.vdim))
    q, k, v = (torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    if not batched:
        return q[0], k[0], v[0]
    return (q, k, v) if module.batch_first else (q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))


def padding(kind: str, batched: bool = True) -> Tensor | None:
    mask = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    mask[0, 3:] = mask[2, 4:] = True
    mask = mask if batched else mask[0]
    return as_kind(mask, kind)


def attention_mask(kind: str, dims: int, batched: bool = True) -> Tensor | None:
    generator = torch.Generator().manual_seed(2)
    heads = HEADS * (BATCH if batched else 1)
    mask = torch.rand(*([heads] if dims == 3 else []), QUERIES, KEYS, generator=generator) < 0.3
    mask[..., 0] = False  # no row may be left without a key
    return as_kind(mask, kind)


def as_kind(mask: Tensor, kind: str) -> Tensor | None:
    if kind == "none":
        return None
    return mask if kind == "bool" else torch.where(mask, -torch.inf, 0.25 * mask.double().cumsum(-1))


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


LAYOUTS = [
    {},
    {"batch_first": True},
    {"kdim": 6, "vdim": 7},
    {"kdim": 6, "batch_first": True, "bias": False},
    {"bias": False},
]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_it_computes_what_the_packed_module_does_for_every_layout(
    options: dict[str, Any], batched: bool, need_weights: bool
) -> None:
    module = packed(**options)
    given = inputs(module, batched)
    for average in (True, False):
        chosen = {"need_weights": need_weights, "average_attn_weights": average}
        with counting() as work:
            found, weights = unpacked(module)(*given, **chosen)
        with counting() as wanted:
            same((found, weights), module(*given, **chosen))
        assert (weights is not None) == need_weights
        assert sum(part.macs for part in work) == sum(part.macs for part in wanted)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
@pytest.mark.parametrize(
    ("key_kind", "mask_kind", "dims"),
    [
        *itertools.product(["none", "bool", "float"], ["bool", "float"], [2, 3]),
        ("bool", "none", 2),
        ("float", "none", 2),
    ],
)
@pytest.mark.parametrize("batched", [True, False])
def test_masks_of_every_kind(key_kind: str, mask_kind: str, dims: int, batched: bool) -> None:
    module = packed(batch_first=True)
    given = inputs(module, batched)
    masks = {
        "key_padding_mask": padding(key_kind, batched),
        "attn_mask": attention_mask(mask_kind, dims, batched),
    }
    expected = module(*given, **masks)
    same(unpacked(module)(*given, **masks), expected)
    same(unpacked(module)(*given, **masks, need_weights=False)[0], expected[0])
    assert not torch.allclose(expected[0], module(*given)[0])


def test_masks_on_torchs_default_layout_and_by_position() -> None:
    module = packed()
    given = (*inputs(module), padding("bool"), True, attention_mask("bool", 3), False)
    same(unpacked(module)(*given), module(*given))


def test_a_causal_mask_with_its_hint() -> None:
    module = packed(batch_first=True)
    query = inputs(module)[0]
    mask = nn.Transformer.generate_square_subsequent_mask(QUERIES, dtype=torch.float64)
    options = {"attn_mask": mask, "is_causal": True, "need_weights": False}
    same(unpacked(module)(query, query, query, **options)[0], module(query, query, query, **options)[0])


# What is unpacked


class OwnForward(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)[0]


class Renamed(nn.MultiheadAttention):
    """A subclass with torch's forward."""


@pytest.mark.parametrize(
    "module",
    [
        packed(add_bias_kv=True),
        packed(add_zero_attn=True),
        OwnForward(WIDTH, HEADS),
        nn.Linear(WIDTH, WIDTH),
    ],
    ids=["add_bias_kv", "add_zero_attn", "own forward", "no attention"],
)
def test_what_stays_as_it_is(module: nn.Module) -> None:
    model = nn.Sequential(module)
    assert unpack_attention(model) is model


def test_subclasses_with_torchs_forward_and_roots_are_unpacked() -> None:
    model = Renamed(WIDTH, HEADS).eval()
    found = unpack_attention(model)
    assert type(found) is Attention
    x = torch.randn(QUERIES, BATCH, WIDTH)
    torch.testing.assert_close(found(x, x, x), model(x, x, x), rtol=1e-5, atol=1e-6)


def test_layers_are_named_and_hold_the_packed_weights() -> None:
    module = packed(kdim=6)
    found = unpacked(module)
    assert [name for name, _ in found.named_children()] == ["q_proj", "k_proj", "v_proj", "out_proj", "dropout"][:4]
    assert all(type(layer) is nn.Linear for layer in found.children())
    same(found.get_parameter("k_proj.weight"), module.k_proj_weight)
    same(found.get_parameter("v_proj.bias"), module.in_proj_bias[2 * WIDTH :])
    same(found.get_parameter("out_proj.weight"), module.out_proj.weight)
    assert sum(p.numel() for p in found.parameters()) == sum(p.numel() for p in module.parameters())


def test_frozen_attention_stays_frozen() -> None:
    module = packed()
    module.in_proj_weight.requires_grad_(False)
    learns = {name: parameter.requires_grad for name, parameter in unpacked(module).named_parameters()}
    assert learns == {name: name.endswith("bias") or name == "out_proj.weight" for name in learns}


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.attention = packed(batch_first=True)


def test_the_model_given_is_untouched_and_other_parameters_are_shared() -> None:
    model = Around().eval()
    state, modules = copy.deepcopy(model.state_dict()), [id(part) for part in model.modules()]
    found = unpack_attention(model)
    assert found is not model
    assert [id(part) for part in model.modules()] == modules
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert found.get_parameter("before.weight") is model.before.weight
    assert found.get_buffer("norm.running_mean") is model.norm.running_mean
    assert found.get_parameter("attention.out_proj.weight") is model.attention.out_proj.weight
    with torch.no_grad():
        for part in "qkv":
            for parameter in found.get_submodule(f"attention.{part}_proj").parameters():
                parameter.zero_()
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(training: bool) -> None:
    assert all(part.training == training for part in unpacked(packed().train(training)).modules())


# Dropout of the weights


def test_trainable_keeps_the_dropout_of_weights() -> None:
    module = packed(dropout=0.5, batch_first=True)
    given = inputs(module)
    found = unpacked(module, trainable=True)
    dropout = found.get_submodule("dropout")
    assert isinstance(dropout, nn.Dropout)
    assert dropout.p == 0.5
    same(found(*given), module(*given))
    torch.manual_seed(0)
    output = found.train()(*given)
    torch.manual_seed(0)
    same(output, module.train()(*given))
    assert not torch.allclose(output[0], module.eval()(*given)[0])


@pytest.mark.parametrize(("dropout", "trainable"), [(0.5, False), (0.0, True)])
def test_no_dropout_is_kept_where_none_is_wanted(dropout: float, trainable: bool) -> None:
    found = unpacked(packed(dropout=dropout), trainable=trainable)
    assert not any(isinstance(part, nn.Dropout) for part in found.modules())


# Inside torch's transformers


@pytest.mark.parametrize("nested", [True, False])
def test_an_encoder_runs_with_torchs_fast_path_allowed(nested: bool) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    x, mask = torch.randn(BATCH, KEYS, WIDTH), padding("bool")
    expected = model(x, src_key_padding_mask=mask)
    torch.backends.mha.set_fastpath_enabled(True)
    with torch.no_grad():
        found = unpack_attention(model)(x, src_key_padding_mask=mask)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert model.use_nested_tensor == nested


class Twice(nn.Module):
    """One attention under two names, or two with one packed weight. Input (batch, length, 8)."""

    def __init__(self, tied: str) -> None:
        super().__init__()
        self.one = nn.MultiheadAttention(8, 2, batch_first=True)
        self.other = self.one if tied == "module" else nn.MultiheadAttention(8, 2, batch_first=True)
        self.other.in_proj_weight = self.one.in_proj_weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x, x, x)[0]
        result: Tensor = self.other(x, x, x)[0]
        return result


@pytest.mark.parametrize("tied", ["module", "weight"])
def test_what_is_shared_stays_shared(tied: str) -> None:
    model, x = Twice(tied).eval(), torch.randn(2, 5, 8)
    unpacked = unpack_attention(model)
    assert isinstance(unpacked, Twice)
    assert (unpacked.one is unpacked.other) == (tied == "module")
    assert unpacked.one.q_proj.weight is unpacked.other.q_proj.weight
    assert sum(p.numel() for p in unpacked.parameters()) == sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(unpacked(x), model(x), rtol=1e-5, atol=1e-6)
