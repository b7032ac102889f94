"""After ``apply``: trains a compressed network to give the original's outputs; takes inputs, no labels."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from tdfx.cache import ListCache
from tdfx.contained import plain_attention, reason
from tdfx.data import batches, fitted
from tdfx.distillation import Guide, Student, Task, in_fastest_layout, set_state
from tdfx.divergence import OUTPUTS, resolve_output
from tdfx.errors import InputError, OptionError
from tdfx.features import observed, paired_nodes
from tdfx.fingerprint import tensor_digest, weights_fingerprint
from tdfx.inputs import run
from tdfx.leftovers import remove_leftovers
from tdfx.passes.capture import isolate
from tdfx.passes.flatten_call import FlattenCall
from tdfx.passes.in_place import InPlace
from tdfx.precision import at_least_float32
from tdfx.progress import Report as ProgressReport
from tdfx.progress import reporter
from tdfx.records.inputs import InputSpec
from tdfx.records.plan import MOST_SEED
from tdfx.records.result import Report, Result
from tdfx.version import VERSION

EVALUATIONS = 8
"""How often the held-out samples are looked at after the start."""

MOST_EPOCHS = 50
"""Of a run that only minutes limit; with more of them, small networks learn the samples by heart."""

ORIGINAL_SHARE = 0.25
"""Of the minutes, that the original may take for its outputs on all samples."""

TRIAL_STEPS, TRIAL_S = 3, 2.0
SAVE_S = 20.0


def tune(
    result: Result,
    data: object,
    *,
    original: nn.Module | None = None,
    output: str = "auto",
    epochs: int | None = None,
    minutes: float | None = 3.0,
    learning_rate: float | None = None,
    batch_size: int = 32,
    held_out: float = 0.125,
    features: bool = True,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    progress: bool | ProgressReport | None = None,
) -> Result:
    """Trains all weights of a compressed network on what the original gives for the same inputs.

    A part of the samples is held out. The weights returned are those, of the ones put in and of a few states on the
    way, whose outputs diverge least from the original's there: on the held-out part they are never worse than what was
    put in. A network with BatchNorm and Dropout (``trainable=True``) trains in train mode, any other in eval mode. One
    in float16 or bfloat16 trains in float32; its weights are returned, and judged, in its own precision.

    Args:
        result: what ``compress`` or ``apply`` returned; it stays as it is.
        data: inputs as for ``calibrate``; labels in it are not looked at. Kept in memory, with the original's outputs
            and, where they take at most 2 GiB, the values inside it that ``features`` matches.
        original: the network to learn from; None for ``result.original``.
        output: "logits" (KL divergence), "values" (squared error over variance) or "auto", which goes by shapes.
        epochs: how often every sample is seen; with it, the run depends on nothing but inputs and options.
        minutes: without ``epochs``, about how long it takes: as many steps as fit by the time that the first ones
            take on this machine; where there is time for an epoch, whole epochs of them, 50 at most. Where the original
            would take over a quarter of it for all samples, they are a part, drawn by the seed.
        learning_rate: peak of the one-cycle schedule; None for 1e-3, and less for runs of less than 1,000 steps.
        batch_size: samples a step.
        held_out: share of the samples that are held out.
        features: match what the original's blocks hand on inside, besides the outputs; only with ``result.original``,
            whose layers are known. With it, training is mostly by these values.
        seed: of the split, the order of the samples and Dropout.
        cache_dir: folder for the state of the run, from which an interrupted one goes on; the state is removed at its
            end, or once it is a week old.
        progress: a function, True, False, or None for a bar on terminals only.

    Returns:
        The result with the tuned module, a note on what was gained and ``timings_s["tune"]``. Errors in the plan stay
        those of the factors before.

    Raises:
        OptionError: an option is not understood; names it.
        InputError: there is no original, there are fewer than 2 samples or such of different shapes, or a network does
            not run on them.
    """
    settings = _Settings(output, epochs, minutes, learning_rate, batch_size, held_out, features, seed)
    folder = ListCache(cache_dir).folder
    started = time.perf_counter()
    teacher = _teacher(result, original)
    task, guide = _lesson(result, teacher, data, settings, matches_inside=features and original is None)
    path = None
    if folder is not None:
        digests = (*map(weights_fingerprint, (result.module, teacher)), *map(tensor_digest, task.inputs))
        key = repr((VERSION, digests, task.output, settings))
        digest = hashlib.sha256(key.encode()).hexdigest()[:32]
        remove_leftovers(folder, digest)
        path = folder / f"tune-{digest}.pt"
    with reporter(progress) as report, torch.enable_grad(), torch.random.fork_rng(devices=[]):
        student = Student(
            _graph(result),
            task,
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
            train_mode=result.plan.trainable,
            guide=guide,
        )
        _train(student, settings, path, report, started)
    tuned = copy.deepcopy(result.module)
    set_state(tuned, student.best)
    if path is not None:
        path.unlink(missing_ok=True)
    return replace(result, module=tuned, report=_noted(result, student))


@dataclass(frozen=True)
class _Settings:
    """The options that decide what comes out, checked."""

    output: str
    epochs: int | None
    minutes: float | None
    learning_rate: float | None
    batch_size: int
    held_out: float
    features: bool
    seed: int

    def __post_init__(self) -> None:
        if not isinstance(self.features, bool):
            raise OptionError(f"features is {self.features!r}; expected True or False")
        if self.output not in OUTPUTS:
            raise OptionError(f"output is {self.output!r}; expected {', '.join(OUTPUTS)}")
        if self.epochs is None and self.minutes is None:
            raise OptionError("epochs and minutes are both None; expected one of them, to know when to stop")
        for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if not _is_number(value, int, least, MOST_SEED) and (name, value) != ("epochs", None):
                raise OptionError(f"{name} is {value!r}; expected a whole number from {least} to {MOST_SEED}")
        for name, most in (("minutes", math.inf), ("learning_rate", math.inf), ("held_out", 1.0)):
            value = getattr(self, name)
            is_inside = _is_number(value, int | float, 0.0, most) and value not in (0.0, most)
            if not is_inside and (name, value) not in (("minutes", None), ("learning_rate", None)):
                raise OptionError(f"{name} is {value!r}; expected a number between 0 and {most}, neither included")


def _teacher(result: Result, original: nn.Module | None) -> nn.Module:
    if original is not None:
        return isolate(original)[0]
    if result.original is None:
        raise InputError("the result does not hold the network it was made from; pass that as original")
    return result.original


def _graph(result: Result) -> fx.GraphModule:
    """The result as what takes tensors alone."""
    names = [spec.name for spec in result.report.inputs]
    named = [name for name in names if name is not None]
    if not isinstance(result.module, fx.GraphModule):
        return InPlace.of(result.module, names.count(None), named)
    return result.module if len(named) < len(names) else FlattenCall(tuple(named)).run(result.module)


def _lesson(
    result: Result, teacher: nn.Module, data: object, settings: _Settings, *, matches_inside: bool
) -> tuple[Task, Guide | None]:
    """All samples with the original's outputs, those that are floats with a row a sample; and the values inside."""
    names = [str(node.target) for node in _graph(result).graph.nodes if node.op == "placeholder"]
    inputs = _read(data, names, result.report.inputs, settings.batch_size)
    positional = sum(spec.name is None for spec in result.report.inputs)

    def outputs(batch: Sequence[Tensor], network: nn.Module) -> list[Tensor]:
        kwargs = dict(zip(names[positional:], batch[positional:], strict=True))
        with plain_attention():
            return run(network, tuple(batch[:positional]), kwargs)

    network = copy.deepcopy(teacher)  # its layout changes
    size = settings.batch_size
    parts: list[list[Tensor]] = []
    chosen: set[int] | None = None
    try:
        first = [value[:size] for value in inputs]
        in_fastest_layout(network, lambda: outputs(first, network))
        inputs = _affordable(inputs, settings, lambda: outputs(first, network))
        with plain_attention():
            guide = _guide(result, network, first, len(inputs[0])) if matches_inside else None
        for start in range(0, len(inputs[0]), size):
            batch = [value[start : start + size] for value in inputs]
            found = outputs(batch, network if guide is None else guide.original)
            if guide is not None:
                guide.keep(start, found[-len(guide.names) :])
                del found[-len(guide.names) :]
            rows = {i for i, v in enumerate(found) if v.is_floating_point() and v.shape[:1] == (len(batch[0]),)}
            chosen = rows if chosen is None else chosen & rows
            parts.append(found)
    except Exception as error:
        raise InputError(f"the original does not run on the data: {reason(error)}") from error
    kept = tuple(sorted(chosen or ()))
    wanted = tuple(at_least_float32(torch.cat([part[index] for part in parts])) for index in kept)
    output = resolve_output(settings.output, wanted, inputs)
    return Task.split(inputs, wanted, kept, output, settings.held_out, settings.seed), guide


def _affordable(inputs: tuple[Tensor, ...], settings: _Settings, run_batch: Callable[[], object]) -> tuple[Tensor, ...]:
    """The samples, or drawn ones of them, that the original runs on in its share of the minutes."""
    if settings.epochs is not None or settings.minutes is None:
        return inputs
    started = time.perf_counter()
    run_batch()
    batches = int(ORIGINAL_SHARE * 60 * settings.minutes / (time.perf_counter() - started))
    most, count = max(batches, 2) * settings.batch_size, len(inputs[0])
    if most >= count:
        return inputs
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed))[:most]
    return tuple(value[drawn] for value in inputs)


def _guide(result: Result, original: nn.Module, first: Sequence[Tensor], count: int) -> Guide | None:
    """What the original hands on inside; None where no such value is known in both networks."""
    if not isinstance(original, fx.GraphModule):
        return None
    wanted, found = paired_nodes(original, _graph(result), result.plan, first)
    return Guide(observed(original, wanted), found, first, count) if found else None


def _read(data: object, names: Sequence[str], specs: Sequence[InputSpec], batch_size: int) -> tuple[Tensor, ...]:
    """All samples, one tensor for each placeholder."""
    example = [torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta") for spec in specs]
    found = [fitted(batch, names, example).inputs for batch in batches(data, names, batch_size=batch_size)]
    for index, batch in enumerate(found):
        for name, value, first in zip(names, batch, found[0], strict=True):
            if value.shape[1:] != first.shape[1:] or value.shape[:1] != batch[0].shape[:1]:
                raise InputError(
                    f"batch {index} of the data: input {name} has shape {tuple(value.shape)}, in batch 0 it is "
                    f"{tuple(first.shape)}; expected samples of one shape, as many in each input"
                )
    inputs = tuple(torch.cat(parts) for parts in zip(*found, strict=True))
    if len(inputs[0]) < 2:
        raise InputError("the data holds 1 sample; expected at least 2, to train on and to hold out")
    return inputs


def _train(student: Student, settings: _Settings, path: Path | None, report: ProgressReport, started: float) -> None:
    size = min(settings.batch_size, len(student.task.trained))
    per_epoch = len(student.task.trained) // size
    if path is not None and student.resume(path):
        started = time.perf_counter() - student.seconds
    elif settings.epochs is not None:
        student.total = settings.epochs * per_epoch
    else:
        assert settings.minutes is not None
        student.total = _steps_until(started + 60 * settings.minutes, student, size, per_epoch)
    saved = time.perf_counter()
    for rows in islice(student.task.shuffled(size, settings.seed), student.step, student.total):
        if not student.advance(rows):
            break
        is_due = student.step * EVALUATIONS % student.total < EVALUATIONS
        if is_due:
            student.keep_if_better()
        now = time.perf_counter()
        student.seconds = now - started
        if path is not None and (is_due or now - saved > SAVE_S):
            student.save(path)
            saved = now
        report("tune", student.step, student.total)


def _steps_until(end: float, student: Student, size: int, per_epoch: int) -> int:
    """How many steps, and evaluations on the way, fit until then by the time that a few of them take."""
    begin = time.perf_counter()
    student.evaluate()
    evaluated = time.perf_counter()
    student.total = MOST_SEED  # the steps of the trial are as small as the first one
    for trial, rows in enumerate(student.task.shuffled(size, student.seed), 1):
        is_finite = student.advance(rows)
        now = time.perf_counter()
        if not is_finite or (trial >= TRIAL_STEPS and now - evaluated > TRIAL_S):
            break
    student.restart()
    steps = int((end - now - EVALUATIONS * (evaluated - begin)) * trial / (now - evaluated))
    if steps < per_epoch:
        return max(steps, 1)
    return min(steps // per_epoch, MOST_EPOCHS) * per_epoch


def _noted(result: Result, student: Student) -> Report:
    task = student.task
    note = (
        f"tuned on {len(task.trained)} samples without labels ({task.output}): divergence on {len(task.held)} held-out "
        f"samples {student.before:.4g} -> {student.least:.4g} in {student.step} steps, {student.seconds:.0f} s"
    )
    if student.step < student.total:
        note += f"; the loss of step {student.step + 1} of {student.total} was no number: lower learning_rate"
    report = result.report
    timings = {**report.timings_s, "tune": student.seconds}
    return replace(report, notes=(*report.notes, note), timings_s=timings)


def _is_number(value: object, kind: Any, least: float, most: float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and bool(least <= value <= most)
