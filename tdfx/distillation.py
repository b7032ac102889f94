"""A network in training to give recorded outputs for recorded inputs, and the best state of it.

Distillation (Hinton, Vinyals and Dean 2015, section 2, at temperature 1) with AdamW (Loshchilov and Hutter 2019,
algorithm 2) on a one-cycle schedule (Smith and Topin 2018).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

from tdfx.contained import reason
from tdfx.divergence import divergence, variance
from tdfx.errors import InputError
from tdfx.features import mismatch, observed
from tdfx.files import replacing
from tdfx.inputs import run, tensors
from tdfx.precision import at_least_float32, in_float32, is_half
from tdfx.records.plan import MOST_SEED

Found = TypeVar("Found")

WARM_UP, LEAST_SHARE = 0.1, 0.04
"""Share of the steps in which the learning rate rises, and share of its peak that it starts from."""

HIGHEST_RATE, STEPS_OF_HIGHEST, LEAST_RATE_SHARE = 1e-3, 1000, 0.3
"""Peak learning rate, the steps from which a run has it, and the share of it that the shortest runs have."""

WEIGHT_DECAY = 0.01
FEATURES = 1000.0  # weight of the mismatch inside, beside the divergence of the outputs
LARGEST_GRADIENT = 1.0

MOST_KEPT = 2 * 2**30
"""Bytes of values inside the original that are kept in memory."""

KEPT_AS = torch.bfloat16  # The range of float32, and rounding far below any mismatch.


@dataclass(frozen=True, eq=False)
class Task:
    """What is to be learnt, and from which samples.

    Attributes:
        inputs: one tensor for each input of the network, all samples.
        wanted: outputs for them, floats (float32 at least) with a row for each sample.
        chosen: which of the network's outputs these are.
        output: "logits" or "values", as ``divergence`` takes it.
        trained: indices of the samples to train on.
        held: of those held out.
        variances: of each output in ``wanted``.
    """

    inputs: tuple[Tensor, ...]
    wanted: tuple[Tensor, ...]
    chosen: tuple[int, ...]
    output: str
    trained: Tensor
    held: Tensor
    variances: tuple[Tensor, ...]

    @classmethod
    def split(
        cls,
        inputs: tuple[Tensor, ...],
        wanted: tuple[Tensor, ...],
        chosen: tuple[int, ...],
        output: str,
        held_out: float,
        seed: int,
    ) -> Task:
        """Holds a share of the samples out, at least one, and leaves at least one."""
        order = torch.randperm(len(inputs[0]), generator=torch.Generator().manual_seed(seed))
        held = min(max(1, round(held_out * len(order))), len(order) - 1)
        return cls(inputs, wanted, chosen, output, order[held:], order[:held], tuple(map(variance, wanted)))

    def outputs(self, network: nn.Module, rows: Tensor) -> list[Tensor]:
        """All outputs of a network for these samples."""
        return list(tensors(network(*(value[rows] for value in self.inputs))))

    def found(self, network: nn.Module, rows: Tensor) -> list[Tensor]:
        """The chosen outputs of a network for these samples."""
        outputs = self.outputs(network, rows)
        return [outputs[index] for index in self.chosen]

    def divergence(self, found: Sequence[Tensor], rows: Tensor) -> Tensor:
        """How far these outputs for these samples are from those wanted."""
        return divergence([value[rows] for value in self.wanted], found, self.output, self.variances)

    def shuffled(self, size: int, seed: int) -> Iterator[Tensor]:
        """Whole batches of the samples to train on without end, in a new order every epoch."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = self.trained[torch.randperm(len(self.trained), generator=generator)]
            for first in range(0, len(order) - size + 1, size):
                yield order[first : first + size]


class Guide:
    """Values inside the original that the network in training is to have as well.

    They are kept, in bfloat16, where those for all samples take no more than ``MOST_KEPT`` bytes and have a row for
    each; else the original runs again at every step.

    Attributes:
        original: network whose output has these values after it, in eval mode.
        names: of the nodes of the network in training that are to have them.
        variances: of the values, as ``variance`` finds them for the first samples.
        orders: of the dimensions of each value, samples first, as they follow each other in memory.
        kept: the values for all samples with their dimensions in that order, or None.

    Args:
        first: the first samples of each input.
        count: of all samples.
    """

    def __init__(self, original: fx.GraphModule, names: Sequence[str], first: Sequence[Tensor], count: int) -> None:
        self.original = original
        self.names = tuple(names)
        values = self._values(first)
        self.variances = [variance(at_least_float32(value)) for value in values]
        self.orders = [_memory_order(value) for value in values]
        shapes = [(count, *v.permute(order).shape[1:]) for v, order in zip(values, self.orders, strict=True)]
        is_small = KEPT_AS.itemsize * sum(map(math.prod, shapes)) <= MOST_KEPT
        is_kept = is_small and self._has_rows(first, values)
        self.kept = [torch.empty(shape, dtype=KEPT_AS) for shape in shapes] if is_kept else None

    def _has_rows(self, inputs: Sequence[Tensor], values: Sequence[Tensor]) -> bool:
        """Whether all values have one row less for one sample less."""
        try:
            fewer = self._values([value[1:] for value in inputs])
        except Exception:  # a network of one batch size
            return False
        return all(len(value) - 1 == len(other) for value, other in zip(values, fewer, strict=True))

    def _values(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return run(self.original, tuple(inputs), {})[-len(self.names) :]

    def keep(self, first: int, values: Sequence[Tensor]) -> None:
        """Takes in the values for the samples from this one on."""
        if self.kept is not None:
            for kept, value, order in zip(self.kept, values, self.orders, strict=True):
                kept[first : first + len(value)] = value.permute(order)

    def mismatch(self, found: Sequence[Tensor], inputs: Sequence[Tensor], rows: Tensor) -> Tensor:
        """Of what was found for these samples, rows of the inputs."""
        if self.kept is None:
            return mismatch(self._values([value[rows] for value in inputs]), found, self.variances)
        found = [value.permute(order) for value, order in zip(found, self.orders, strict=True)]
        wanted = [value.index_select(0, rows).to(got.dtype) for value, got in zip(self.kept, found, strict=True)]
        return mismatch(wanted, found, self.variances)


def _memory_order(value: Tensor) -> list[int]:
    strides = value.stride()
    return sorted(range(value.dim()), key=lambda dim: (dim > 0, -strides[dim]))


class Student:
    """A copy of a network in training; what was given stays as it is.

    A network in float16 or bfloat16 trains in float32, since most steps are too small for its weights. What counts is
    its divergence with weights rounded to its own precision, computed in that.

    Attributes:
        returned: the network in its own precision.
        network: that in training; the same one, but for networks in float16 or bfloat16.
        step: steps taken.
        total: steps of the schedule; to be set before the first one.
        before: divergence on the held-out samples at the start.
        least: the least one so far, infinite until there is a finite one.
        best: parameters and buffers that had it.
        seconds: kept for the caller, as a part of what ``save`` writes.

    Raises:
        InputError: the network does not run on the samples.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        task: Task,
        *,
        learning_rate: float | None,
        batch_size: int,
        seed: int,
        train_mode: bool,
        guide: Guide | None = None,
    ) -> None:
        self.task = task
        self.guide = guide
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.seed = seed
        self.train_mode = train_mode
        self.returned = observed(copy.deepcopy(module), () if guide is None else guide.names)
        self.network = in_float32(self.returned) if is_half(self.returned) else self.returned
        self.weights = [weight for weight in self.network.parameters() if weight.is_floating_point()]
        for weight in self.weights:
            weight.requires_grad_(True)
        self.best = _snapshot(self.returned)
        self.total = 0
        self.seconds = 0.0
        self.restart()
        self.before = self._first_divergence()
        self.least = self.before if math.isfinite(self.before) else math.inf

    def restart(self) -> None:
        """Back to the best state, as if no step had been taken."""
        set_state(self.network, self.best)
        self.optimizer = torch.optim.AdamW(self.weights, weight_decay=WEIGHT_DECAY, fused=True)
        self.step = 0

    def advance(self, rows: Tensor) -> bool:
        """One step on these samples; False, and no step, where the loss is no number."""
        self.network.train(self.train_mode and len(rows) > 1)  # one sample has no variance for BatchNorm
        torch.manual_seed((self.seed + self.step) % MOST_SEED)  # Dropout draws the same after an interruption
        outputs = self.task.outputs(self.network, rows)
        loss = self.task.divergence([outputs[index] for index in self.task.chosen], rows)
        if self.guide is not None:
            inside = outputs[-len(self.guide.names) :]
            loss = loss + FEATURES * self.guide.mismatch(inside, self.task.inputs, rows)
        if not math.isfinite(loss.item()):
            return False
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.weights, LARGEST_GRADIENT)
        peak = peak_learning_rate(self.total) if self.learning_rate is None else self.learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = peak * one_cycle(self.step / self.total)
        self.optimizer.step()
        self.step += 1
        return True

    def evaluate(self) -> float:
        """Divergence of the network to be returned, on the held-out samples."""
        if self.returned is not self.network:
            set_state(self.returned, dict(_state(self.network)))
        return self._divergence(self.returned)

    def _divergence(self, network: fx.GraphModule) -> float:
        network.eval()
        with torch.no_grad():
            parts = [self.task.found(network, rows) for rows in torch.split(self.task.held, self.batch_size)]
            found = [torch.cat(part) for part in zip(*parts, strict=True)]
            return self.task.divergence(found, self.task.held).item()

    def keep_if_better(self) -> None:
        """Makes this state the best one if it is on the held-out samples."""
        found = self.evaluate()
        if found < self.least:
            self.least, self.best = found, _snapshot(self.returned)

    def save(self, path: Path) -> None:
        """Writes all that ``resume`` needs to go on as if nothing had happened; whole or not at all."""
        state = {name: getattr(self, name) for name in ("best", "step", "total", "seconds", "before", "least")}
        state |= {"network": _snapshot(self.network), "optimizer": self.optimizer.state_dict()}
        with replacing(path) as staged:
            torch.save(state, staged)

    def resume(self, path: Path) -> bool:
        """Goes on from what ``save`` wrote; a file that cannot be read counts as missing."""
        try:
            state = torch.load(path, weights_only=True)
        except Exception:
            return False
        set_state(self.network, state.pop("network"))
        self.optimizer.load_state_dict(state.pop("optimizer"))
        vars(self).update(state)
        return True

    def _first_divergence(self) -> float:
        try:
            found = in_fastest_layout(self.network, lambda: self._divergence(self.network))
            return found if self.returned is self.network else self.evaluate()
        except Exception as error:
            raise InputError(
                f"the compressed network does not run on {self.batch_size} samples of the data at once: "
                f"{reason(error)}; check their shapes, or choose the batch_size of the example inputs"
            ) from error


def in_fastest_layout(network: nn.Module, attempt: Callable[[], Found]) -> Found:
    """What the attempt returns with the network's convolutions channels last, where it does not fail so.

    Networks run and train up to twice as fast so on CPUs, those with depthwise convolutions above all.
    """
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    _set_layout(convolutions, torch.channels_last)
    try:
        return attempt()
    except RuntimeError:  # Tensor.view refuses some of what comes out of them
        _set_layout(convolutions, torch.contiguous_format)
    return attempt()


def peak_learning_rate(steps: int) -> float:
    """The peak for a run of so many steps: few of them cannot make good what large ones undo.

    At 1e-3 a CIFAR ResNet-56 is worse after 30 steps than before; at 3e-4 it has most of what 160 steps gain.
    """
    return HIGHEST_RATE * min(max(math.sqrt(steps / STEPS_OF_HIGHEST), LEAST_RATE_SHARE), 1.0)


def one_cycle(done: float) -> float:
    """Share of the peak learning rate when this share of a run is done: half a cosine up, half a cosine down to 0."""
    if done < WARM_UP:
        return 1 + (LEAST_SHARE - 1) * (1 + math.cos(math.pi * done / WARM_UP)) / 2
    return (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))) / 2


def set_state(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Writes these values into a module's parameters and buffers, in place."""
    with torch.no_grad():
        for name, tensor in _state(module):
            tensor.copy_(values[name])


def _snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _state(module)}


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())


def _set_layout(layers: Sequence[nn.Module], layout: torch.memory_format) -> None:
    for layer in layers:
        layer.to(memory_format=layout)  # type: ignore[call-overload]
