"""The whole way in one call."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tdfx.budget import Budget
from tdfx.inputs import Inputs
from tdfx.progress import Report as ProgressReport
from tdfx.records.result import Result
from tdfx.stages.apply import carry_out, check_verify
from tdfx.stages.capture import Model, capture
from tdfx.stages.plan import plan, read_budget
from tdfx.stages.profile import profile


def compress(
    model: Model,
    example_inputs: Inputs | None = None,
    example_kwargs: Mapping[str, Tensor] | None = None,
    *,
    budget: str | Budget | None = None,
    methods: Sequence[str] | None = None,
    ranks: str | None = None,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    metric: str | None = None,
    planner: str = "knapsack",
    target: str | None = "ort-cpu",
    rank_multiple: int | None = None,
    trainable: bool = False,
    verify: str = "plan",
    seed: int = 0,
    cache_dir: str | Path | None = None,
    progress: bool | ProgressReport | None = None,
) -> Result:
    """Compresses a model to a budget, or by a rank rule: captures, profiles, plans and applies.

    Args:
        model: a trained module, an ``ExportedProgram``, or the path of a ``.pt2`` file; it is left untouched.
        example_inputs: a tensor or tuple of tensors that it takes; costs are those of these shapes. None for those that
            an exported program was made with.
        example_kwargs: keyword arguments, tensors.
        budget: "flops=50%", "macs=1.2G", "params=2M", "bytes=8MB", several joined by commas, or a ``tdfx.Budget``;
            shares are of the whole model.
        methods: names of decompositions, None for all; exactly one with ``ranks``.
        ranks: instead of a budget, a rule for the rank of every layer: "vbmf", "energy=0.95", "ratio=0.33" or
            "compression=75%"; see ``profile``.
        include: globs over qualified layer names; only these are compressed.
        exclude: globs; these are not.
        overrides: ``{glob: {"methods": [...], "rank": r, "skip": True}}``.
        metric: "weight:absolute", "weight:relative" (None) or "weight:scaled".
        planner: name of a planner.
        target: runtime the result is meant for, so that chains estimated slower than dense are not offered; None for no
            estimate.
        rank_multiple: None for the target's grid, or free ranks with ``ranks``; 1 for free ranks.
        trainable: keep BatchNorm and Dropout for fine-tuning.
        verify: "plan", or "full" to check every method at full rank too.
        seed: of the decompositions; same inputs and seed give the same result on the same machine.
        cache_dir: folder that keeps errors between runs.
        progress: a function, True, False, or None for a bar on terminals only.

    Returns:
        Module, plan, costs before and after, skips and report.

    Raises:
        BudgetError: neither a budget nor ranks, a budget not understood, or not reachable.
        InputError, OptionError, CaptureError, WeightError, VerificationError: see the stages.

    Warns:
        UserWarning: the budget was reachable only, or the rule gave, choices that are otherwise not offered.
    """
    parsed = read_budget(budget, ranks, planner)  # options of the last stages, before the slow ones
    check_verify(verify)
    started = time.perf_counter()
    captured = capture(model, example_inputs, example_kwargs, trainable=trainable)
    captured_s = time.perf_counter() - started
    started = time.perf_counter()
    profiled = profile(
        captured,
        methods=methods,
        ranks=ranks,
        include=include,
        exclude=exclude,
        overrides=overrides,
        metric=metric,
        target=target,
        rank_multiple=rank_multiple,
        seed=seed,
        cache_dir=cache_dir,
        progress=progress,
    )
    profiled_s = time.perf_counter() - started
    started = time.perf_counter()
    chosen = plan(profiled, parsed, planner=planner)
    planned_s = time.perf_counter() - started
    for note in chosen.notes:
        warnings.warn(note, stacklevel=2)
    result = carry_out(captured, chosen, verify=verify)
    timings = {"capture": captured_s, "profile": profiled_s, "plan": planned_s, **result.report.timings_s}
    return replace(result, report=replace(result.report, timings_s=timings))
