"""Second moments of the inputs of layers, and of the loss's gradients at their outputs, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tdfx.im2col import chunks, output_rows
from tdfx.lookups import one_hot
from tdfx.moments import SiteMoments
from tdfx.passes.base import AnalysisPass, Layer, layer_at
from tdfx.passes.layer_calls import LayerInterpreter, given
from tdfx.records.layer import LayerSpec, Shape
from tdfx.weights import LOOKUPS

BLOCK = 512  # columns of one product; of a symmetric matrix only the upper blocks are computed


def covariance_shape(layer: LayerSpec, gradients: bool) -> Shape:
    """Of what is kept of the covariance of a layer's n inputs: (n, n), (groups, n / groups, n / groups) or (n,).

    What lies between two groups counts together with gradients only; of depthwise layers, whose n is out of all
    proportion to their cost, it is left out. Of a table's rows, no two of which are looked up at once, the diagonal is
    all there is; of bags, what two different rows do together is left out.
    """
    n, groups = layer.in_channels * math.prod(layer.kernel_size), layer.groups
    if layer.lookup is not None:
        return (n,)
    if groups > 1 and (not gradients or groups == layer.in_channels):
        return groups, n // groups, n // groups
    return n, n


@dataclass
class Sums:
    """Sums over positions for one site, to which calls of its layer add; float64, on the CPU.

    Attributes:
        total: (n,), of the inputs about the shift.
        gram: of ``covariance_shape``, of their products; blocks below the diagonal of a matrix stay zero. Of lookups
            of the one-hot inputs' squares, about zero.
        out_gram: (out, out), of the products of gradients; likewise. None without a loss.
        shift: (n,), about the mean of the inputs; None before the first call, and for lookups. Products of what is
            left are small where the mean is large, so that they can be computed in the inputs' own precision.
        positions: rows that were added.
        overlap: in how many rows of one sample an input value stands; of a transposed convolution see ``_overlap``.
        reached: whether a gradient other than 0 has come to the layer.
    """

    total: Tensor
    gram: Tensor
    out_gram: Tensor | None
    shift: Tensor | None = None
    positions: int = 0
    overlap: int = 1
    reached: bool = False

    @classmethod
    def of(cls, layer: LayerSpec, gradients: bool) -> Sums:
        """Zeros for a layer."""
        shape, out = covariance_shape(layer, gradients), layer.out_channels
        n = layer.in_channels * math.prod(layer.kernel_size)
        zeros = torch.zeros(out, out, dtype=torch.float64) if gradients else None
        sums = torch.zeros(n, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        return cls(*sums, zeros, overlap=_overlap(layer))

    def add_input(self, value: Tensor, layer: Layer) -> None:
        """Adds the input of one call."""
        value = _at_least_float32(value)
        if self.shift is None:
            self.shift = _mean(value, layer)
        shift = self.shift.to(value)
        for rows in chunks(value, layer):
            rows = rows - shift
            self.total += _column_sums(rows)
            (_add_products if self.gram.dim() == 2 else _add_blocks)(self.gram, rows)
            self.positions += len(rows)

    def add_lookups(self, inputs: Tensor) -> None:
        """Adds the lookups of one call, as ``one_hot`` gives them."""
        _, rows = inputs.indices()
        self.total.index_add_(0, rows, inputs.values())
        self.gram.index_add_(0, rows, inputs.values().square())
        self.positions += len(inputs)

    def add_gradient(self, gradient: Tensor, layer: Layer) -> None:
        """Adds the gradient at the output of one call."""
        assert self.out_gram is not None
        self.reached |= bool(gradient.any())
        _add_products(self.out_gram, output_rows(_at_least_float32(gradient), layer))

    def moments(self, samples: int) -> SiteMoments:
        """Mean and centred second moment by position, second moment of the gradients by sample; uses the sums up.

        Of lookups the second moment is not centred.
        """
        apart = self.total / self.positions
        in_cov = (_whole(self.gram) if self.gram.dim() == 2 else self.gram).div_(self.positions)
        if self.gram.dim() > 1:
            means = apart.reshape(*in_cov.shape[:-2], -1)
            in_cov = in_cov.sub_(means[..., :, None] * means[..., None, :])
        out_cov = None if self.out_gram is None else _whole(self.out_gram).div_(samples).float()
        observations = max(self.positions // self.overlap, samples)
        self.reached &= out_cov is None or bool(out_cov.any())  # squares of tiny gradients are 0
        mean = apart if self.shift is None else self.shift.double() + apart
        return SiteMoments(mean.float(), in_cov.float(), out_cov, observations)


@dataclass(frozen=True)
class AccumulateMoments(AnalysisPass[None]):
    """Runs one batch through the graph and adds to the sums of sites, all calls of a layer to the same.

    The inputs are copied; parameters get no gradients. Random numbers that the graph draws are seeded and the caller's
    random state is kept.

    Attributes:
        inputs: one value per placeholder of the graph, in order.
        sums: by name of the layer; they change.
        loss: of the graph's output, a scalar whose gradients are wanted; None for inputs alone.
        seed: of the graph's own random numbers.
    """

    inputs: tuple[Tensor, ...]
    sums: Mapping[str, Sums]
    loss: Callable[[Any], Tensor] | None = None
    seed: int = 0

    def apply(self, graph_module: fx.GraphModule) -> None:
        observer = _Observer(graph_module, self.sums, gradients=self.loss is not None)
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(self.loss is not None):
            torch.manual_seed(self.seed)
            output = observer.run(*(value.detach().clone() for value in self.inputs))
            loss = None if self.loss is None else self.loss(output)
        if loss is None or not observer.offsets or not loss.requires_grad:
            return
        del output
        layers, offsets = zip(*observer.offsets, strict=True)
        for name, gradient in zip(layers, torch.autograd.grad(loss, offsets, allow_unused=True), strict=True):
            if gradient is not None:
                self.sums[name].add_gradient(gradient, layer_at(graph_module, name))


class _Observer(LayerInterpreter):
    def __init__(self, graph_module: fx.GraphModule, sums: Mapping[str, Sums], gradients: bool) -> None:
        super().__init__(graph_module)
        self.sums, self.gradients = sums, gradients
        self.offsets: list[tuple[str, Tensor]] = []

    def call_layer(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], forward: Any) -> Any:
        if name not in self.sums:
            return forward(*args, **kwargs)
        with torch.no_grad():
            layer = self.module.get_submodule(name)
            if isinstance(layer, LOOKUPS):
                self.sums[name].add_lookups(one_hot(layer, *args, **kwargs))
            else:
                self.sums[name].add_input(given(args, kwargs).detach(), layer_at(self.module, name))
        value = forward(*args, **kwargs)
        if not self.gradients:
            return value
        # A leaf of zeros: gradients reach it whether or not parameters want any, and whatever is done to the sum in
        # place. It is one number, expanded.
        offset = torch.zeros((), dtype=value.dtype, device=value.device).expand(value.shape).requires_grad_()
        self.offsets.append((name, offset))
        return value + offset


def _overlap(layer: LayerSpec) -> int:
    """Rows of a sample for each that is independent of the others.

    Rows of a transposed convolution at positions that differ modulo the stride see other columns each, and nothing at
    all where the stride is larger than the kernel: those do not count.
    """
    pairs = tuple(zip(layer.kernel_size, layer.stride, strict=True))
    overlap = math.prod(math.ceil(size / step) for size, step in pairs)
    return overlap * math.prod(math.ceil(step / size) for size, step in pairs) if layer.is_transposed else overlap


def _at_least_float32(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def _mean(value: Tensor, layer: Layer) -> Tensor:
    sums, count = torch.zeros(()), 0
    for rows in chunks(value, layer):
        sums, count = sums + _column_sums(rows), count + len(rows)
    return (sums / count).to(value.dtype)


def _column_sums(rows: Tensor) -> Tensor:
    return (rows.T @ rows.new_ones(len(rows))).double().cpu()  # several times as fast as a sum


def _add_products(total: Tensor, rows: Tensor) -> None:
    """Adds rows^T rows to the upper blocks of a symmetric matrix."""
    parts = torch.split(rows, BLOCK, 1)
    for i, left in enumerate(parts):
        for j, right in enumerate(parts[i:], i):
            block = total[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
            block += (left.T @ right).to(block.device)


def _add_blocks(total: Tensor, rows: Tensor) -> None:
    """Adds the diagonal blocks (groups, n / groups, n / groups) of rows^T rows."""
    parts = rows.T.reshape(*total.shape[:2], -1)
    products = parts @ parts.mT
    total += ((products + products.mT) / 2).to(total.device)


def _whole(total: Tensor) -> Tensor:
    """The symmetric matrix of these upper blocks, in place."""
    for first in range(0, len(total), BLOCK):
        last = first + BLOCK
        total[last:, first:last] = total[first:last, last:].T
        block = total[first:last, first:last]
        block.copy_((block + block.T) / 2)
    return total
