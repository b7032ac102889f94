"""Counting: every convolution and matrix product that one run of a network performs.

A copy of the network runs once beneath a dispatch mode, which sees each operator that is executed, whether a layer, a
functional call or an expression on raw parameters asked for it. The run is on fake tensors (shapes without data), or on
real ones where the network's control flow looks at values. ``FORMULAS`` gives each operator's work from shapes alone;
operators without a formula (element-wise ones, normalization, pooling) count 0.
"""

from __future__ import annotations

import copy
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tdfx.errors import InputError
from tdfx.records.cost import Cost, Workload

if TYPE_CHECKING:
    from tdfx.targets import Target

aten = torch.ops.aten

Formula = Callable[[Sequence[Any], Any], Iterable[Workload]]
"""Workloads of one operator, from its positional arguments and its output."""


def count(module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> tuple[Workload, ...]:
    """Count what ``module(*args, **kwargs)`` performs in eval mode, one workload per product in order of execution.

    The module, its inputs and torch's random state are left as they are. Attention counts as computed without torch's
    fused transformer layers, so that padding costs what it costs an exported network.

    Args:
        module: the network.
        args: positional example inputs.
        kwargs: example inputs by keyword.

    Returns:
        A workload for every convolution and matrix product; their ``macs`` add up to the network's.

    Raises:
        InputError: if the network does not run on these inputs.
    """
    # A failure may be the fake tensors' alone (values asked for, operators without a shape rule): the real run decides.
    with suppress(Exception), _no_log_of_failed_shape_rules():
        return _run(module, args, kwargs, FakeTensorMode(allow_non_fake_inputs=True))
    try:
        return _run(module, args, kwargs)
    except Exception as error:
        raise InputError(
            f"The network cannot be counted: a run on its example inputs failed with {type(error).__name__}: {error}. "
            "Expected inputs on which model.eval() runs; check their number, shapes and dtypes."
        ) from error


def network_cost(
    module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], target: Target | None
) -> Cost:
    """Cost of a network as given, for these example inputs.

    Args:
        module: the network.
        args: positional example inputs.
        kwargs: example inputs by keyword.
        target: runtime whose latency model is summed over the workloads; None leaves the latency None.

    Returns:
        Parameters and their bytes (shared ones counted once), multiply-accumulates and seconds of one run.

    Raises:
        InputError: if the network does not run on these inputs.
    """
    return total_cost(count(module, args, kwargs), module, target)


def total_cost(workloads: Iterable[Workload], module: nn.Module, target: Target | None) -> Cost:
    """Cost of a network that performs these workloads and holds this module's parameters."""
    workloads, parameters = tuple(workloads), tuple(module.parameters())
    return Cost(
        params=sum(parameter.numel() for parameter in parameters),
        macs=sum(workload.macs for workload in workloads),
        weight_bytes=sum(parameter.nbytes for parameter in parameters),
        latency_s=None if target is None else sum(target.latency(workload) for workload in workloads),
    )


def _run(
    module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], mode: FakeTensorMode | None = None
) -> tuple[Workload, ...]:
    held = [mapping for part in module.modules() for mapping in (vars(part), part._parameters, part._buffers)]
    tensors = [value for mapping in (*held, kwargs) for value in mapping.values() if isinstance(value, Tensor)]
    tensors += [value for value in args if isinstance(value, Tensor)]
    # Detached where needed: nothing copies the weight that weight_norm recomputes, which is no leaf of autograd.
    duplicate = copy.deepcopy if mode is None else partial(mode.from_tensor, static_shapes=True)
    memo: dict[int, Any] = {id(t): duplicate(t if t.is_leaf else t.detach()) for t in tensors}
    module, args, kwargs = copy.deepcopy((module, args, dict(kwargs)), memo)

    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    with torch.random.fork_rng(devices=devices), torch.no_grad(), mode or nullcontext():
        module.eval()
        with counting() as workloads:
            module(*args, **kwargs)
    return tuple(workloads)


@contextmanager
def counting() -> Iterator[list[Workload]]:
    """Gives the list that the workloads of all operators executed in the block are added to."""
    counter = _Counter()
    with _PlainLayers(), counter:
        yield counter.workloads


@contextmanager
def _no_log_of_failed_shape_rules() -> Iterator[None]:
    """Keeps torch from logging a traceback of what the real run will repair, or report once and in full."""
    thread = threading.get_ident()

    def elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger = logging.getLogger(FakeTensorMode.__module__)
    logger.addFilter(elsewhere)
    try:
        yield
    finally:
        logger.removeFilter(elsewhere)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the workloads of every operator executed beneath it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.workloads: list[Workload] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = FORMULAS.get(func.overloadpacket) or BY_NAME.get(func._schema.name)
        if formula is None and func.namespace != "prim":
            # Under inference_mode, composite operators arrive whole: look inside. (prim operators cannot be asked.)
            with self:
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        # What a forward that takes gradients of its own spends on these is no layer's.
        if formula is not None and torch._C._current_autograd_node() is None:
            self.workloads.extend(formula(args, output))
        return output


class _PlainLayers(TorchFunctionMode):
    """Keeps nn.MultiheadAttention and nn.TransformerEncoder off their fused and nested-tensor paths.

    They leave these paths whenever a function mode is active, which, unlike the switch in torch.backends.mha,
    concerns this thread alone.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


def _matrix_product(rows: int, inner: int, columns: int, dtype: torch.dtype) -> Workload:
    """``(rows, inner) @ (inner, columns)``."""
    return Workload(rows, inner, columns, inputs=rows * inner, itemsize=dtype.itemsize)


def _product_at(index: int) -> Formula:
    """(..., m, k) @ (..., k, n) or @ (k,) of the arguments at ``index`` and after it."""

    def formula(args: Sequence[Any], output: Any) -> Iterable[Workload]:
        left, right = args[index], args[index + 1]
        columns = right.shape[-1] if right.ndim > 1 else 1
        yield _matrix_product(math.prod(left.shape[:-1]), left.shape[-1], columns, left.dtype)

    return formula


def _grouped_product(args: Sequence[Any], output: Any) -> Iterable[Workload]:
    """Groups of rows, columns or inner elements, each times its own matrix: every element is used by one group."""
    left, right = args[:2]
    rows = left.shape[-2] if right.ndim == 2 else math.prod(left.shape[:-1])
    yield _matrix_product(rows, left.shape[-1], right.shape[-1], left.dtype)


def _convolution(args: Sequence[Any], output: Any, transposed: bool = False) -> Iterable[Workload]:
    """Weights are (out, in / groups, *kernel), or (in, out / groups, *kernel) where transposed."""
    source, weight = args[:2]
    # A kernel is placed at every output position, or at every input position where transposed.
    placed, grouped = (source, output) if transposed else (output, source)
    yield Workload(
        positions=placed.shape[0] * math.prod(placed.shape[2:]),
        in_channels=source.shape[1],
        out_channels=output.shape[1],
        kernel=math.prod(weight.shape[2:]),
        groups=grouped.shape[1] // weight.shape[1],
        inputs=source.numel(),
        itemsize=source.dtype.itemsize,
        conv=weight.dim() == 4,
        scattered=output.numel() if transposed else 0,
    )


def _any_convolution(args: Sequence[Any], output: Any) -> Iterable[Workload]:
    """(input, weight, bias, stride, padding, dilation, transposed, ...)."""
    return _convolution(args, output, transposed=args[6])


def _time_batch_channel_convolution(args: Sequence[Any], output: Any) -> Iterable[Workload]:
    """Input (time, batch, in), weight (kernel, in, out)."""
    source, weight = args[:2]
    kernel, in_channels, out_channels = weight.shape
    positions = math.prod(output.shape[:2])
    yield Workload(positions, in_channels, out_channels, kernel, 1, source.numel(), source.dtype.itemsize)


def _attention(query: Sequence[int], keys: int, values: int, dtype: torch.dtype) -> Iterable[Workload]:
    """Query (..., length, channels) times transposed keys, then scores times values; masks save nothing."""
    rows = math.prod(query[:-1])
    yield _matrix_product(rows, query[-1], keys, dtype)
    yield _matrix_product(rows, keys, values, dtype)


def _scaled_dot_product_attention(args: Sequence[Any], output: Any) -> Iterable[Workload]:
    query, key, value = args[:3]
    return _attention(query.shape, key.shape[-2], value.shape[-1], query.dtype)


def _linears(source: Tensor, weights: Iterable[Tensor]) -> Iterable[Workload]:
    """Matrices (out, in), each applied once per row of the source (..., features)."""
    rows = math.prod(source.shape[:-1])
    return (_matrix_product(rows, in_, out, source.dtype) for out, in_ in (weight.shape for weight in weights))


def _self_attention(source: Tensor, heads: int, weights: Iterable[Tensor]) -> Iterable[Workload]:
    """A fused layer on (batch, length, channels) with these projections."""
    batch, length, channels = source.shape
    yield from _linears(source, weights)
    yield from _attention((batch, heads, length, channels // heads), length, channels // heads, source.dtype)


def _fused_attention(args: Sequence[Any], output: Any) -> Iterable[Workload]:
    """(query, key, value, channels, heads, qkv weight, qkv bias, out weight, ...); torch fuses self-attention alone."""
    return _self_attention(args[0], args[4], (args[5], args[7]))


def _fused_encoder_layer(args: Sequence[Any], output: Any) -> Iterable[Workload]:
    """(source, channels, heads, qkv weight and bias, out weight and bias, ..., two feed-forward weights and biases)."""
    return _self_attention(args[0], args[2], (args[3], args[5], args[14], args[16]))


def _recurrent_layer(args: Sequence[Any], output: Any) -> Iterable[Workload]:
    """(source, input weight, hidden weight, biases, ...): one layer in one direction, gates stacked in the rows."""
    return _linears(args[0], args[1:3])


def _recurrent_stack(args: Sequence[Any], output: Any) -> Iterable[Workload]:
    """(source, weights and biases of all layers, directions and projections, ...)."""
    return _linears(args[0], (weight for weight in args[1] if weight.ndim == 2))


def _lookup(args: Sequence[Any], output: Any) -> Iterable[Workload]:
    """Table (rows, columns) and indices, then what says how rows are put into bags; nothing is multiplied."""
    table, indices = args[:2]
    found = output if isinstance(output, Tensor) else output[0]
    positions = math.prod(found.shape[:-1])
    yield Workload(positions, 0, table.shape[1], inputs=indices.numel(), itemsize=table.dtype.itemsize)


def _bilinear(args: Sequence[Any], output: Any) -> Iterable[Workload]:
    """Left (rows, i), weight (out, i, j), right (rows, j): left times the weight, then times right row by row."""
    left, weight = args[:2]
    out, i, j = weight.shape
    yield _matrix_product(left.shape[0], i, out * j, left.dtype)
    yield _matrix_product(left.shape[0] * out, j, 1, left.dtype)


BY_NAME: dict[str, Formula] = {"transformers::grouped_mm_fallback": _grouped_product}
"""Of operators that other libraries define, which hide the products in them."""

FORMULAS: dict[Any, Formula] = {
    aten.mm: _product_at(0),
    aten.bmm: _product_at(0),
    aten.mv: _product_at(0),
    aten.dot: _product_at(0),
    aten.vdot: _product_at(0),
    aten._int_mm: _product_at(0),
    aten._scaled_mm: _product_at(0),
    aten.addmm: _product_at(1),
    aten.addmv: _product_at(1),
    aten.addbmm: _product_at(1),
    aten.baddbmm: _product_at(1),
    aten._addmm_activation: _product_at(1),
    aten._grouped_mm: _grouped_product,
    aten.convolution: _any_convolution,
    aten._convolution: _any_convolution,
    aten.convolution_overrideable: _any_convolution,
    aten.mkldnn_convolution: _convolution,
    aten.cudnn_convolution: _convolution,
    aten.cudnn_convolution_transpose: partial(_convolution, transposed=True),
    aten._slow_conv2d_forward: _convolution,
    aten.slow_conv3d_forward: _convolution,
    aten.slow_conv_dilated2d: _convolution,
    aten.slow_conv_dilated3d: _convolution,
    aten.slow_conv_transpose2d: partial(_convolution, transposed=True),
    aten.slow_conv_transpose3d: partial(_convolution, transposed=True),
    aten.conv_tbc: _time_batch_channel_convolution,
    aten._scaled_dot_product_flash_attention_for_cpu: _scaled_dot_product_attention,
    aten._scaled_dot_product_flash_attention: _scaled_dot_product_attention,
    aten._scaled_dot_product_efficient_attention: _scaled_dot_product_attention,
    aten._scaled_dot_product_cudnn_attention: _scaled_dot_product_attention,
    aten._scaled_dot_product_fused_attention_overrideable: _scaled_dot_product_attention,
    aten._native_multi_head_attention: _fused_attention,
    aten._transformer_encoder_layer_fwd: _fused_encoder_layer,
    aten.mkldnn_rnn_layer: _recurrent_layer,
    aten._cudnn_rnn: _recurrent_stack,
    aten._trilinear: _bilinear,
    aten.embedding: _lookup,
    aten._embedding_bag: _lookup,
    aten._embedding_bag_forward_only: _lookup,
}
"""One formula per operator, for all its overloads; a new operator is one new entry."""
