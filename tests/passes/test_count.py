"""Counting against torch's flop counter, written formulas, and the state it must leave alone."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, Block, LanguageModel, Siamese, VideoNet, build
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

from tdfx.errors import InputError
from tdfx.passes.count import FORMULAS, count, network_cost
from tdfx.passes.sites import layer_spec
from tdfx.records.cost import Workload
from tdfx.records.layer import Call, LayerSpec

aten = torch.ops.aten


class Apply(nn.Module):
    """A function as a network."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(parts)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, *self.parts, **kwargs)


def macs(function: Callable[..., Any], *args: Tensor, **kwargs: Tensor) -> int:
    """MACs that ``count`` finds in a network or function."""
    module = function if isinstance(function, nn.Module) else Apply(function)
    return sum(workload.macs for workload in count(module, args, kwargs))


def reference_flops(module: nn.Module, args: tuple[Tensor, ...]) -> int:
    """torch's counter, in modes where torch takes attention and (in float64) recurrent layers apart for it to see."""
    module = copy.deepcopy(module).double().eval()
    args = tuple(x.double() if x.is_floating_point() else x for x in args)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            module(*args)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", NETWORKS)
def test_architectures_match_torchs_flop_counter(name: str) -> None:
    module, args = build(name)
    cost = network_cost(module, args, {}, None)
    assert cost.macs > 0
    assert cost.flops == 2 * cost.macs == reference_flops(module, args)


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "strided": (nn.Conv2d(3, 4, 3, stride=2), (2, 3, 9, 9)),
    "unbatched": (nn.Conv2d(3, 4, 3), (3, 9, 9)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2, dilation=2), (2, 6, 9, 9)),
    "reflected": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 9, 9)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), (2, 3, 9, 9)),
    "transposed grouped": (nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 9)),
    "transposed 3-d": (nn.ConvTranspose3d(2, 3, (1, 2, 3)), (2, 2, 4, 5, 6)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_match_torchs_flop_counter(name: str) -> None:
    module, shape = CONVOLUTIONS[name]
    x = torch.randn(shape)
    assert 2 * macs(module, x) == reference_flops(module, (x,)) > 0


def test_a_convolution_is_described_as_its_layer_describes_itself() -> None:
    module = nn.Conv2d(6, 4, (3, 1), stride=2, groups=2, bias=False).double()
    spec = LayerSpec("", "conv2d", 6, 4, (3, 1), groups=2, dtype="float64", calls=(Call((2, 6, 9, 9), (2, 4, 4, 5)),))
    assert count(module, (torch.randn(2, 6, 9, 9).double(),), {}) == spec.workloads


def test_a_transposed_convolution_is_described_as_its_layer_describes_itself() -> None:
    module = nn.ConvTranspose2d(6, 4, (3, 1), 2, output_padding=1, groups=2)
    spec = layer_spec("", module, ()).called_on(((2, 6, 5, 4),))
    assert count(module, (torch.randn(2, 6, 5, 4),), {}) == spec.workloads


def test_a_transposed_convolution_multiplies_once_per_input_position() -> None:
    (workload,) = count(nn.ConvTranspose2d(4, 6, (3, 2), groups=2), (torch.randn(2, 4, 5, 7),), {})
    assert workload == Workload(
        2 * 5 * 7, 4, 6, kernel=6, groups=2, inputs=2 * 4 * 5 * 7, itemsize=4, conv=True, scattered=2 * 6 * 7 * 8
    )
    assert workload.outputs == 2 * 6 * 7 * 8
    assert workload.macs == 2 * 5 * 7 * 4 * (6 // 2) * (3 * 2)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 3, 4)])
def test_a_linear_layer_runs_once_per_row_of_every_leading_dimension(lead: tuple[int, ...]) -> None:
    rows = math.prod(lead)
    expected = Workload(rows, 6, 5, inputs=rows * 6, itemsize=8)
    assert count(nn.Linear(6, 5).double(), (torch.randn(*lead, 6).double(),), {}) == (expected,)


PRODUCTS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...], int]] = {
    "mm": (torch.mm, ((3, 4), (4, 5)), 3 * 4 * 5),
    "bmm": (torch.bmm, ((2, 3, 4), (2, 4, 5)), 2 * 3 * 4 * 5),
    "mv": (torch.mv, ((3, 4), (4,)), 3 * 4),
    "dot": (torch.dot, ((4,), (4,)), 4),
    "vdot": (torch.vdot, ((4,), (4,)), 4),
    "addmm": (torch.addmm, ((3, 5), (3, 4), (4, 5)), 3 * 4 * 5),
    "addmv": (torch.addmv, ((3,), (3, 4), (4,)), 3 * 4),
    "addbmm": (torch.addbmm, ((3, 5), (2, 3, 4), (2, 4, 5)), 2 * 3 * 4 * 5),
    "baddbmm": (torch.baddbmm, ((2, 3, 5), (2, 3, 4), (2, 4, 5)), 2 * 3 * 4 * 5),
    "addmm and activation": (aten._addmm_activation, ((5,), (3, 4), (4, 5)), 3 * 4 * 5),
    "broadcast matmul": (torch.matmul, ((7, 1, 3, 4), (2, 4, 5)), 7 * 2 * 3 * 4 * 5),
    "vector and matrix": (torch.matmul, ((4,), (4, 5)), 4 * 5),
    "einsum": (lambda a, b: torch.einsum("bij,bkj->bik", a, b), ((2, 3, 4), (2, 5, 4)), 2 * 3 * 4 * 5),
    "tensordot": (torch.tensordot, ((2, 3, 4), (3, 4, 5)), 2 * 12 * 5),
    "chain": (lambda a, b: torch.linalg.multi_dot([a, b, b]), ((2, 4), (4, 4)), 2 * (2 * 4 * 4)),
    "int8": (lambda a, b: aten._int_mm(a.char(), b.char()), ((32, 16), (16, 8)), 32 * 16 * 8),
    "float8": (
        lambda a, b, one: aten._scaled_mm(a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t(), one, one),
        ((32, 16), (16, 16), ()),
        32 * 16 * 16,
    ),
    "element-wise": (lambda a, b: (a * b + a).exp().sum(), ((3, 4), (3, 4)), 0),
    "normalization": (lambda x: F.layer_norm(F.instance_norm(x), (4,)), ((2, 3, 4),), 0),
    "embedding": (lambda x: F.embedding(torch.tensor([0, 2]), x), ((3, 4),), 0),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_match_written_formulas(name: str) -> None:
    function, shapes, expected = PRODUCTS[name]
    assert macs(function, *(torch.randn(shape) for shape in shapes)) == expected


def test_a_batched_product_reads_every_element_of_its_left_operand() -> None:
    (workload,) = count(Apply(torch.bmm), (torch.randn(2, 3, 4), torch.randn(2, 4, 5)), {})
    assert workload == Workload(2 * 3, 4, 5, inputs=2 * 3 * 4, itemsize=4)


@pytest.mark.parametrize(
    ("left", "right", "ends", "expected"),
    [
        ((6, 16), (2, 16, 8), [2, 6], 6 * 16 * 8),
        ((2, 6, 16), (16, 8), [4, 8], 6 * 16 * 8),
        ((6, 16), (16, 8), [8, 16], 6 * 16 * 8),
        ((2, 6, 16), (2, 16, 8), None, 2 * 6 * 16 * 8),
    ],
    ids=["rows", "columns", "inner", "batch"],
)
def test_grouped_products_use_each_element_in_one_group(
    left: tuple[int, ...], right: tuple[int, ...], ends: list[int] | None, expected: int
) -> None:
    offsets = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    operands = torch.randn(left).bfloat16(), torch.randn(right).bfloat16()
    assert macs(lambda a, b: aten._grouped_mm(a, b, offsets), *operands) == expected


def test_operators_of_other_libraries_are_known_by_name() -> None:
    with torch.library._scoped_library("transformers", "FRAGMENT") as library:
        library.define("grouped_mm_fallback(Tensor input, Tensor weight, Tensor offs) -> Tensor")
        library.impl("grouped_mm_fallback", lambda x, w, offs: x.new_empty(len(x), w.shape[2]), "CPU")
        library.impl("grouped_mm_fallback", lambda x, w, offs: x.new_empty(len(x), w.shape[2]), "Meta")
        grouped = torch.ops.transformers.grouped_mm_fallback
        assert macs(lambda a, b: grouped(a, b, torch.tensor([2, 5])), torch.randn(5, 6), torch.randn(2, 6, 7)) == 210


KERNELS: dict[Any, tuple[int, list[Any]]] = {
    aten._convolution: (2, [None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, False, False, False, False]),
    aten.mkldnn_convolution: (2, [None, [0, 0], [1, 1], [1, 1], 1]),
    aten._slow_conv2d_forward: (2, [[3, 3], None, [1, 1], [0, 0]]),
    aten.slow_conv3d_forward: (3, [[3, 3, 3], None, [1, 1, 1], [0, 0, 0]]),
    aten.slow_conv_dilated2d: (2, [[3, 3]]),
    aten.slow_conv_dilated3d: (3, [[3, 3, 3]]),
}


@pytest.mark.parametrize("operator", KERNELS, ids=str)
def test_convolution_kernels_called_directly_match_the_written_formula(operator: Any) -> None:
    dims, options = KERNELS[operator]
    operands = torch.randn(2, 4, *[7] * dims), torch.randn(6, 4, *[3] * dims)
    assert macs(lambda x, weight: operator(x, weight, *options), *operands) == 2 * 5**dims * 4 * 6 * 3**dims


@pytest.mark.parametrize(("dims", "operator"), [(2, aten.slow_conv_transpose2d), (3, aten.slow_conv_transpose3d)])
def test_transposed_kernels_called_directly_match_the_written_formula(dims: int, operator: Any) -> None:
    operands = torch.randn(2, 4, *[5] * dims), torch.randn(4, 6, *[3] * dims)
    assert macs(lambda x, weight: operator(x, weight, [3] * dims), *operands) == 2 * 5**dims * 4 * 6 * 3**dims


@pytest.mark.parametrize(
    ("operator", "transposed"),
    [
        (aten.convolution_overrideable, False),
        (aten.convolution_overrideable, True),
        (aten.cudnn_convolution, False),
        (aten.cudnn_convolution_transpose, True),
    ],
    ids=str,
)
def test_formulas_of_convolutions_on_other_devices(operator: Any, transposed: bool) -> None:
    x, weight = torch.empty(2, 4, 7), torch.empty((4, 3, 3) if transposed else (6, 2, 3))
    output = torch.empty(2, 6, 9 if transposed else 5)
    workloads = FORMULAS[operator]((x, weight, None, [1], [0], [1], transposed, [0], 2), output)
    assert sum(w.macs for w in workloads) == 2 * (7 if transposed else 5) * (4 * 6 // 2) * 3


def test_time_batch_channel_convolution_matches_the_written_formula() -> None:
    operands = torch.randn(7, 2, 3), torch.randn(4, 3, 5), torch.randn(5)
    (workload,) = count(Apply(torch.conv_tbc), operands, {})
    assert workload == Workload((7 - 3) * 2, 3, 5, kernel=4, inputs=7 * 2 * 3, itemsize=4)


ATTENTION: dict[Any, tuple[Any, ...]] = {
    F.scaled_dot_product_attention: (),
    aten._scaled_dot_product_flash_attention_for_cpu: (),
    aten._scaled_dot_product_flash_attention: (),
    aten._scaled_dot_product_efficient_attention: (None, False),
    aten._scaled_dot_product_cudnn_attention: (None, False),
    aten._scaled_dot_product_fused_attention_overrideable: (),
}


@pytest.mark.parametrize("operator", ATTENTION, ids=str)
def test_attention_counts_both_of_its_products(operator: Any) -> None:
    batch, heads, length, channels = 2, 4, 16, 8
    qkv = torch.randn(3, batch, heads, length, channels).unbind()
    found = macs(lambda q, k, v: operator(q, k, v, *ATTENTION[operator]), *qkv)
    assert found == 2 * batch * heads * length * length * channels > 0


def test_attention_over_other_lengths_channels_and_shared_heads() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    operands = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
    assert macs(attention, *operands) == (2 * 4 * 5 * 7 * 8) + (2 * 4 * 5 * 7 * 6)


def encoder_layer_macs(batch: int, length: int, channels: int, hidden: int) -> int:
    projections = batch * length * (4 * channels * channels + 2 * channels * hidden)
    return projections + 2 * batch * length * length * channels


def test_attention_layers_count_though_torch_would_fuse_them() -> None:
    layer = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, batch_first=True)
    x = torch.randn(2, 5, 8)
    assert macs(layer, x) == encoder_layer_macs(2, 5, 8, 16)
    assert macs(lambda x: layer.self_attn(x, x, x), x) == encoder_layer_macs(2, 5, 8, 0)


def test_fused_layers_called_directly_count_as_taken_apart() -> None:
    layer = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, batch_first=True).eval()
    qkv, projection = layer.self_attn.in_proj_weight, layer.self_attn.out_proj.weight

    def fused(x: Tensor) -> Any:
        biases = torch.zeros(24), torch.zeros(8)
        return aten._native_multi_head_attention(x, x, x, 8, 2, qkv, biases[0], projection, biases[1])

    def fused_layer(x: Tensor) -> Any:
        attention = layer.self_attn.in_proj_bias, projection, layer.self_attn.out_proj.bias
        norms = layer.norm1.weight, layer.norm1.bias, layer.norm2.weight, layer.norm2.bias
        mlp = layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias
        return aten._transformer_encoder_layer_fwd(x, 8, 2, qkv, *attention, False, False, 1e-5, *norms, *mlp)

    x = torch.randn(2, 5, 8)
    assert macs(fused_layer, x) == encoder_layer_macs(2, 5, 8, 16)
    assert macs(fused, x) == encoder_layer_macs(2, 5, 8, 0)


def test_padding_costs_what_it_costs_an_exported_network() -> None:
    layer = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, batch_first=True)
    module = nn.TransformerEncoder(layer, num_layers=1)
    padding = torch.tensor([[False] * 5, [False, False, True, True, True]])
    assert macs(module, torch.randn(2, 5, 8), src_key_padding_mask=padding) == encoder_layer_macs(2, 5, 8, 16)


RECURRENT: dict[str, tuple[nn.Module, int]] = {
    "LSTM": (nn.LSTM(3, 5), 4 * 5 * (3 + 5)),
    "LSTM in float64": (nn.LSTM(3, 5).double(), 4 * 5 * (3 + 5)),
    "deep LSTM": (nn.LSTM(3, 5, num_layers=2, bidirectional=True), 2 * (4 * 5 * (3 + 5) + 4 * 5 * (10 + 5))),
    "LSTM with projection": (nn.LSTM(3, 5, proj_size=2), 4 * 5 * (3 + 2) + 5 * 2),
    "GRU": (nn.GRU(3, 5), 3 * 5 * (3 + 5)),
    "RNN": (nn.RNN(3, 5, nonlinearity="relu"), 5 * (3 + 5)),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_match_written_formulas(name: str) -> None:
    module, per_step = RECURRENT[name]
    steps, batch = 7, 2
    x = torch.randn(steps, batch, 3, dtype=next(module.parameters()).dtype)
    assert macs(module, x) == steps * batch * per_step


def test_a_recurrent_cell_matches_the_written_formula() -> None:
    assert macs(nn.LSTMCell(3, 5), torch.randn(2, 3)) == 2 * 4 * 5 * (3 + 5)


def test_packed_sequences_count_their_real_steps() -> None:
    def run(x: Tensor, lstm: nn.Module) -> Any:
        return lstm(pack_padded_sequence(x, torch.tensor([6, 2]), batch_first=True))

    assert macs(Apply(run, nn.LSTM(3, 5)), torch.randn(2, 6, 3)) == (6 + 2) * 4 * 5 * (3 + 5)


def test_recurrent_layers_on_other_devices_match_written_formulas() -> None:
    weights = [torch.randn(20, 3), torch.randn(20, 2), torch.randn(20), torch.randn(20), torch.randn(2, 5)]

    def run(x: Tensor) -> Any:
        states = torch.zeros(1, 2, 2), torch.zeros(1, 2, 5)
        return aten._cudnn_rnn(x, weights, 5, None, *states, 2, 5, 2, 1, False, 0.0, False, False, [], None)

    assert macs(run, torch.randn(7, 2, 3)) == 7 * 2 * (4 * 5 * (3 + 2) + 5 * 2)


@pytest.mark.parametrize("lead", [(2,), (2, 7)])
def test_bilinear_counts_left_times_weight_and_then_times_right(lead: tuple[int, ...]) -> None:
    rows, out, left, right = math.prod(lead), 5, 3, 4
    found = macs(nn.Bilinear(left, right, out), torch.randn(*lead, left), torch.randn(*lead, right))
    by_einsum = Apply(lambda x, weight, y: torch.einsum("ni,oij,nj->no", x, weight, y))
    operands = torch.randn(rows, left), torch.randn(out, left, right), torch.randn(rows, right)
    assert found == rows * out * (left * right + right)
    assert 2 * found == reference_flops(by_einsum, operands)


def test_composite_operators_count_in_inference_mode() -> None:
    @torch.inference_mode()
    def run(x: Tensor, conv: nn.Module, linear: nn.Module) -> Any:
        return linear(conv(x))

    module = Apply(run, nn.Conv2d(3, 4, 3), nn.Linear(6, 5))
    assert macs(module, torch.randn(2, 3, 8, 8)) == 2 * 36 * 3 * 4 * 9 + 2 * 4 * 6 * 6 * 5


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_traced_network_counts_as_in_eager_mode() -> None:
    module, (x,) = build("vgg")
    traced: nn.Module = torch.jit.trace(module, x)  # type: ignore[no-untyped-call]
    assert macs(traced, x) == macs(module, x)


def test_a_shared_module_counts_per_call_and_its_parameters_once() -> None:
    module = Siamese()
    left, right = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 8)
    cost = network_cost(module, (left, right), {}, None)
    trunk = 3 * 16 * 9 + 16 * 16 * 9
    assert cost.macs == 2 * (16 * 16 + 8 * 8) * trunk + 2 * (2 * 16 * 8)
    assert cost.params == (trunk + 2 * 16) + (16 * 8 + 8)


def test_tied_weights_are_parameters_once() -> None:
    module = LanguageModel()
    cost = network_cost(module, (torch.zeros(2, 8, dtype=torch.long),), {}, None)
    block = sum(parameter.numel() for parameter in Block(16, 2).parameters())
    assert cost.params == 40 * 16 + block
    assert cost.weight_bytes == 4 * cost.params


def test_bytes_follow_each_parameters_dtype() -> None:
    module = Apply(lambda x, a, b: b(a(x).double()), nn.Linear(3, 4), nn.Linear(4, 5).double())
    cost = network_cost(module, (torch.randn(2, 3),), {}, None)
    assert cost.weight_bytes == 4 * (3 * 4 + 4) + 8 * (4 * 5 + 5)


class Stopwatch:
    """A target whose latency is a plain function of the workload."""

    def latency(self, workload: Workload) -> float:
        return 1.0 + workload.macs


def test_latency_sums_the_targets_over_every_operator() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))
    x = torch.randn(2, 3)
    target: Any = Stopwatch()
    assert network_cost(module, (x,), {}, None).latency_s is None
    assert network_cost(module, (x,), {}, target).latency_s == 2 * 1.0 + 2 * (3 * 4 + 4 * 5)


def test_a_network_without_products_costs_nothing() -> None:
    cost = network_cost(nn.ReLU(), (torch.randn(2, 3),), {}, None)
    assert (cost.params, cost.macs, cost.weight_bytes, cost.latency_s) == (0, 0, 0, None)


def test_inputs_by_keyword_are_passed_on() -> None:
    weight = torch.randn(5, 3, requires_grad=True) * 2
    assert macs(lambda x, *, weight: F.linear(x, weight), torch.randn(2, 3), weight=weight) == 2 * 3 * 5


class Restless(nn.Module):
    """Changes whatever a forward can reach: buffers, attributes, its input, the random state."""

    counter: Tensor

    def __init__(self, looks_at_values: bool) -> None:
        super().__init__()
        self.looks_at_values = looks_at_values
        self.norm = nn.BatchNorm1d(3, momentum=0.5)
        self.linear = nn.Linear(3, 4)
        self.calls = 0
        self.cache: list[Tensor] = []
        self.register_buffer("counter", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        x.add_(torch.rand_like(x)).add_(torch.randn(3))
        self.calls += 1
        self.counter += 1
        y = self.linear(self.norm(x))
        self.cache.append(y)
        if self.looks_at_values and y.sum() > 1e9:
            return y + self.linear(x)
        torch.manual_seed(1)
        return y


@pytest.mark.parametrize("looks_at_values", [False, True])
def test_state_inputs_and_random_numbers_are_left_alone(looks_at_values: bool) -> None:
    module = Restless(looks_at_values).train()
    module.linear.eval()
    x = torch.randn(2, 3)
    before, given = copy.deepcopy(module.state_dict()), x.clone()
    attributes = {key: id(value) for key, value in vars(module).items()}
    modes = [part.training for part in module.modules()]
    random = torch.get_rng_state()
    gradients = torch.is_grad_enabled()

    assert macs(module, x) == 2 * 3 * 4

    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert {key: id(value) for key, value in vars(module).items()} == attributes
    assert (module.calls, module.cache) == (0, [])
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled() is gradients
    assert all(type(parameter) is nn.Parameter for parameter in module.parameters())


def test_the_network_runs_in_eval_mode_without_gradients() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.auxiliary = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Any:
            learning = self.training or torch.is_grad_enabled()
            return (self.head(x), self.auxiliary(x)) if learning else self.head(x)

    assert macs(Auxiliary().train(), torch.randn(2, 3)) == 2 * 3 * 4


def test_networks_that_look_at_values_take_the_branch_they_take() -> None:
    def run(x: Tensor, small: nn.Module, large: nn.Module) -> Any:
        return large(x) if x.sum() > 0 else small(x)

    module = Apply(run, nn.Linear(3, 4), nn.Linear(3, 40))
    assert macs(module, torch.ones(2, 3)) == 2 * 3 * 40
    assert macs(module, -torch.ones(2, 3)) == 2 * 3 * 4


def test_nothing_is_computed_where_shapes_suffice() -> None:
    computed: list[bool] = []

    def run(x: Tensor) -> Tensor:
        product = x.to("cpu") @ table @ torch.eye(4, device=x.device)
        computed.append(not isinstance(product, FakeTensor))
        return product

    table = torch.randn(3, 4)  # a tensor that no module holds
    assert macs(run, torch.randn(2, 3)) == 2 * 3 * 4 + 2 * 4 * 4
    assert computed == [False]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("looks_at_values", [False, True])
def test_tensors_that_deepcopy_refuses_are_counted_with(looks_at_values: bool) -> None:
    def run(x: Tensor, layer: nn.Module) -> Any:
        return layer(x if not looks_at_values or x.sum() > -1e9 else -x)

    module = Apply(run, nn.utils.weight_norm(nn.Linear(3, 4)))
    x = torch.randn(2, 3, requires_grad=True) * 2
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(module)
    assert macs(module, x) == 2 * 3 * 4


def test_inputs_that_do_not_fit_are_refused_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), pytest.raises(InputError, match=r"example inputs .*2x3 and 4x5.*shapes"):
        count(nn.Linear(4, 5), (torch.randn(2, 3),), {})
    assert not caplog.records
    assert not logging.getLogger("torch._subclasses.fake_tensor").filters


def test_a_new_operator_is_one_new_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMULAS, aten.relu, lambda args, output: [Workload(output.numel(), 1, 1)])
    assert macs(torch.relu, torch.randn(2, 3)) == 6


def test_order_is_that_of_execution() -> None:
    module, args = VideoNet(), (torch.randn(1, 3, 4, 16, 16),)
    assert [workload.out_channels for workload in count(module, args, {})] == [8, 16, 5]
