"""Between capture and profile: what unlabeled inputs say of each site."""

from __future__ import annotations

import hashlib
import math
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from tdfx.cache import ListCache
from tdfx.data import fitted, is_stored
from tdfx.divergence import resolve_output
from tdfx.errors import InputError, OptionError, TdfxError
from tdfx.fisher import Loss, OutputLoss
from tdfx.inputs import run
from tdfx.leftovers import remove_leftovers
from tdfx.metrics import find_metric, needs_moments
from tdfx.moments import Moments, SiteMoments
from tdfx.passes.calibrate import Sums, covariance_shape
from tdfx.passes.shape_prop import ShapeProp, TensorMeta, bind
from tdfx.passes.sites import FindSites
from tdfx.progress import Report, reporter
from tdfx.records.capture import Capture
from tdfx.records.layer import Site, Skipped
from tdfx.records.plan import MOST_SEED
from tdfx.replay import Replay
from tdfx.sweep import Sweep

NO_GRADIENT = "no gradient comes to it"
VERSION = 3  # of what is kept in the cache
CHECKPOINT_S = 20.0  # seconds between two checkpoints; 0 for one after every batch
MOST_WRITING = 0.1  # share of the time that goes into checkpoints
MOST_BATCH = 32
MOST_ACTIVATION_BYTES = 256_000_000  # of a batch
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def calibrate(
    captured: Capture,
    data: object,
    *,
    metric: str = "loss",
    output: str = "auto",
    loss: Loss | None = None,
    samples: int | None = None,
    memory_limit: int | str = "2GB",
    seed: int = 0,
    cache_dir: str | Path | None = None,
    progress: bool | Report | None = None,
) -> Moments:
    """Takes the moments that data-aware errors and corrections are computed from.

    The data is read batch by batch, as often as the memory limit asks for. A loader or other iterable is read once:
    where its batches are needed again, or there is a cache, they are kept in files until the end.

    Args:
        captured: what ``capture`` returned.
        data: inputs, in any of the forms that ``tdfx.data.batches`` takes.
        metric: that the moments are for: "loss", or "feature" (in any form), which needs no gradients.
        output: what the network's outputs are: "logits" of classes, "values", or "auto", which tells them by their
            shapes; ``Moments.output`` says what it found.
        loss: a loss of one's own instead, called with the network's output and the batch's labels (the entry beyond the
            inputs; a tuple or dictionary if there are more). It returns one number a sample, or their sum.
        samples: how many to read at most; None for all.
        memory_limit: for the sums of one reading, in bytes or as "500MB"; sites that do not fit together are
            calibrated one reading after another.
        seed: of the drawn targets, 0 or more.
        cache_dir: folder that keeps the moments, and what an interrupted run goes on from, until nothing has been
            written to that for a week. Moments of a loss of your own are not kept.
        progress: a function, True, False, or None for a bar on terminals only.

    Returns:
        Moments of every site but those in ``skipped``.

    Raises:
        OptionError: an option is not understood, or the outputs are not what ``output`` says.
        InputError: there is no batch, or one cannot be used; names it.
    """
    module, example = captured.module, bind(captured.module, captured.args, captured.kwargs)
    kind = _checked_metric(metric)
    _check_count("seed", seed, 0, MOST_SEED)
    if samples is not None:
        _check_count("samples", samples, 1)
    ListCache(cache_dir)  # makes the folder, or refuses it
    found = _checked_output(captured, example, kind, output, loss)
    metas = ShapeProp(example).run(module)
    sites, _ = FindSites(metas).run(module)
    groups, skipped = _groups(sites, _bytes(memory_limit), gradients=found is not None)
    replay = Replay(
        data,
        [str(node.target) for node in module.graph.nodes if node.op == "placeholder"],
        batch_size=_batch_size(metas, example),
        samples=samples,
        with_labels=loss is not None,
    )
    empty = Moments({}, skipped, 0, found, (), captured.structure, captured.weights, captured.keeps_batch_norm)
    identity = _identity(captured, example, found, loss, (kind, seed, samples, str(memory_limit)))
    with _cache(cache_dir, replay, identity, len(groups)) as cache, reporter(progress) as report:
        finished = cache.finished()
        if finished is not None:
            return _with_gradients(finished)
        moments = cache.groups_done() or empty
        total = _steps(data, replay) * len(groups)
        for index, group in enumerate(groups):
            known = {*moments.sites, *(entry.layer for entry in moments.skipped)}
            layers = [layer for site in group for layer in site.layers]
            if group and known >= {layer.name for layer in layers}:
                continue
            drawn = None if found is None else OutputLoss(found, loss, seed)
            sums = {layer.name: Sums.of(layer, gradients=found is not None) for layer in layers}
            sweep = cache.resumed(Sweep(sums, drawn, seed, full=bool(moments.inputs)))
            for batch in replay.read(sweep.batches):
                sweep.add(module, fitted(batch, replay.placeholders, example))
                cache.checkpoint(sweep)
                done = index * total // len(groups) + sweep.batches
                report("calibrating", done, max(total, done))
            moments = _with_group(moments, sweep)
            cache.keep_groups(moments, is_last=index == len(groups) - 1)
        return _with_gradients(moments)


def _with_gradients(moments: Moments) -> Moments:
    """The same; an error where no layer has a gradient at all.

    Raises:
        InputError: so it is.
    """
    if moments.sites or not any(entry.reason.startswith(NO_GRADIENT) for entry in moments.skipped):
        return moments
    raise InputError(
        f"no layer gets a gradient of the loss ({moments.output}): the outputs are the same, or certain, whatever the "
        'layers do a little differently; use metric="feature", which takes no loss'
    )


def _with_group(moments: Moments, sweep: Sweep) -> Moments:
    found: dict[str, SiteMoments] = {}
    skipped: list[Skipped] = []
    for name in list(sweep.sums):
        sums = sweep.sums.pop(name)  # freed one by one
        if not sums.positions:
            skipped.append(Skipped(name, "forward does not call it on the data"))
            continue
        site = sums.moments(sweep.samples)
        if sweep.loss is not None and not sums.reached:
            what = "the loss" if sweep.loss.loss is not None else f"the {sweep.loss.output} that the loss is taken of"
            skipped.append(
                Skipped(
                    name,
                    f"{NO_GRADIENT}: {what} do not depend on it, or change by nothing that counts; "
                    'metric="feature" needs no gradient',
                )
            )
        elif all(value.isfinite().all() for value in (site.mean, site.in_cov, site.out_cov) if value is not None):
            found[name] = site
        else:
            skipped.append(Skipped(name, "its inputs or gradients on the data are NaN or Inf in the layer's dtype"))
    return replace(
        moments,
        sites={**moments.sites, **found},
        skipped=(*moments.skipped, *skipped),
        samples=sweep.samples,
        inputs=moments.inputs or sweep.inputs,
    )


class _Cache:
    """What a run finds and leaves in a folder; nothing without one."""

    def __init__(self, replay: Replay, folder: Path | None, key: str) -> None:
        self.replay, self.folder, self.key = replay, folder, key
        self._due = time.monotonic() + CHECKPOINT_S

    def finished(self) -> Moments | None:
        """The moments of an earlier run with the same model, options and data."""
        return self._load("moments")

    def groups_done(self) -> Moments | None:
        """Moments of the groups that an interrupted run finished."""
        return self._load("partial")

    def resumed(self, sweep: Sweep) -> Sweep:
        """The sweep as an interrupted run left it, if the data still begins with the batches that it met."""
        if self.folder is None:
            return sweep
        sweep.load(self._running, lambda digests: self.replay.digests(len(digests)) == digests)
        return sweep

    def checkpoint(self, sweep: Sweep) -> None:
        """Keeps a sweep, if the last time was long ago."""
        if self.folder is None or (CHECKPOINT_S and time.monotonic() < self._due):
            return
        start = time.monotonic()
        self.replay.touch()
        sweep.save(self._running, self.replay.digests(sweep.batches))
        self._due = time.monotonic() + max(CHECKPOINT_S, (time.monotonic() - start) / MOST_WRITING)

    def keep_groups(self, moments: Moments, *, is_last: bool) -> None:
        """Keeps the moments of finished groups; all of them are the result."""
        if self.folder is None:
            return
        moments.save(self._path("moments" if is_last else "partial"))
        for path in [self._running, *([self._path("partial")] if is_last else [])]:
            path.unlink(missing_ok=True)

    @property
    def _running(self) -> Path:
        assert self.folder is not None
        return self.folder / f"partial-{self.key}.safetensors"

    def _path(self, kind: str) -> Path:
        assert self.folder is not None
        whole = hashlib.sha256(" ".join(self.replay.digests()).encode()).hexdigest()[:16]
        return self.folder / f"{kind}-{self.key}-{whole}.safetensors"

    def _load(self, kind: str) -> Moments | None:
        # Only then is it worth reading all of the data before anything is computed.
        if self.folder is None or not any(self.folder.glob(f"{kind}-{self.key}-*.safetensors")):
            return None
        with suppress(TdfxError):
            return Moments.load(self._path(kind))
        return None


@contextmanager
def _cache(cache_dir: str | Path | None, replay: Replay, identity: str | None, sweeps: int) -> Iterator[_Cache]:
    """The cache, and a folder for batches that have to be read again, removed at the end."""
    if cache_dir is None or identity is None:
        with tempfile.TemporaryDirectory(prefix="tdfx-") as folder:
            if sweeps > 1:
                replay.keep_in(Path(folder))
            yield _Cache(replay, None, "")
        return
    first = " ".join(replay.digests(1))
    key = hashlib.sha256(f"{identity} {first}".encode()).hexdigest()[:32]
    remove_leftovers(Path(cache_dir), key)
    kept = Path(cache_dir) / f"batches-{uuid4().hex}"  # its own: the same run may be under way in another process
    replay.keep_in(kept)
    try:
        yield _Cache(replay, Path(cache_dir), key)
    finally:
        shutil.rmtree(kept, ignore_errors=True)


def _identity(
    captured: Capture, example: Sequence[Tensor], found: str | None, loss: Loss | None, options: tuple[object, ...]
) -> str | None:
    """Model and options as text; None with a loss of the caller's, which cannot be told from others."""
    if loss is not None:
        return None
    shapes = [(tuple(value.shape), value.dtype) for value in example]
    about = (VERSION, captured.structure, captured.weights, captured.trainable, captured.tier, shapes, found, options)
    return repr(about)


def _checked_metric(metric: str) -> str:
    """The part that decides what is computed: "feature" or "loss"."""
    if not isinstance(metric, str) or not needs_moments(find_metric(metric)):
        raise OptionError(f'metric is {metric!r}; calibration is for "feature" and "loss", "weight" needs no data')
    return metric.partition(":")[0]


def _checked_output(
    captured: Capture, example: tuple[Tensor, ...], kind: str, output: str, loss: Loss | None
) -> str | None:
    """What the loss is taken of, told by a run on the example inputs; None without a loss."""
    if loss is not None and not callable(loss):
        raise OptionError(f"loss is a {type(loss).__name__}; expected a function of the network's output and labels")
    if loss is not None and (kind != "loss" or output != "auto"):
        option = f"output={output!r}" if kind == "loss" else f"metric={kind!r}"
        raise OptionError(f'a loss of your own is for metric="loss" and output="auto"; found {option}')
    outputs = [] if loss is not None else run(captured.module, example, {})
    if loss is None and (kind == "loss" or output != "auto"):
        resolved = resolve_output(output, outputs, example)
        return resolved if kind == "loss" else None
    return None if loss is None else "labels"


def _groups(sites: Sequence[Site], limit: int, gradients: bool) -> tuple[list[list[Site]], tuple[Skipped, ...]]:
    """Sites whose sums fit together, in order; at least one group, which may be empty."""
    groups: list[list[Site]] = [[]]
    skipped, used = [], 0
    for site in sites:
        n = max(layer.in_channels * math.prod(layer.kernel_size) for layer in site.layers)
        needed = 8 * sum(
            math.prod(covariance_shape(layer, gradients)) + (layer.out_channels**2 if gradients else 0)
            for layer in site.layers
        )
        if needed > limit:
            reason = (
                f"the covariance of its {n} inputs takes {_shown(needed)}; memory_limit is {_shown(limit)}, raise it"
            )
            skipped.append(Skipped(site.name, reason))
            continue
        if used + needed > limit:
            groups.append([])
            used = 0
        groups[-1].append(site)
        used += needed
    return groups, tuple(skipped)


def _bytes(memory_limit: int | str) -> int:
    if isinstance(memory_limit, int) and not isinstance(memory_limit, bool) and memory_limit > 0:
        return memory_limit
    match = (
        re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)", memory_limit.upper()) if isinstance(memory_limit, str) else None
    )
    if match is None or not float(match[1]):
        raise OptionError(f'memory_limit is {memory_limit!r}; expected bytes, or a text as "2GB" or "500MB"')
    return int(float(match[1]) * UNITS[match[2]])


def _shown(size: int) -> str:
    unit = next((unit for unit in ("GB", "MB", "KB") if size >= UNITS[unit]), "B")
    return f"{size / UNITS[unit]:.3g} {unit}"


def _batch_size(metas: dict[str, TensorMeta], example: Sequence[Tensor]) -> int:
    """For a data set: few enough samples that a batch's activations stay small."""
    batch = next((len(value) for value in example if value.dim()), 1)
    total = sum(math.prod(meta.shape) * meta.dtype.itemsize for meta in metas.values())
    return max(1, min(MOST_BATCH, MOST_ACTIVATION_BYTES * batch // max(1, total)))


def _steps(data: object, replay: Replay) -> int:
    """Batches in all, as far as that is known beforehand."""
    if is_stored(data) and not isinstance(data, list):
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(data) if isinstance(leaf, Tensor)]
        samples = min(len(leaves[0]), replay.samples or len(leaves[0])) if leaves else 0
        return math.ceil(samples / replay.batch_size)
    with suppress(TypeError):
        return len(data)  # type: ignore[arg-type]
    return 0


def _check_count(name: str, value: object, least: int, most: int | None = None) -> None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < least or (most is not None and value > most):  # type: ignore[operator]
        to = "up" if most is None else f"to {most}"
        raise OptionError(f"{name} is {value!r}; expected a whole number from {least} {to}")
