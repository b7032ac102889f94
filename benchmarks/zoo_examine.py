"""What tdfx makes of one network: what it sees, what it computes at full rank, what is left at half the FLOPs."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo_models.case import Case

import tdfx
from tdfx.contained import plain_attention, quiet, reason
from tdfx.decompositions import method_for
from tdfx.inputs import run
from tdfx.passes.verify import relative_difference
from tdfx.stages.apply import carry_out

METHODS = ("svd", "spatial_svd", "tucker2")
SHARE = 0.5
SCALE = 1.01
LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
COUNTED = (torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm)
"""What convolutions and linear layers are to torch's counter; products inside attention are bmm."""


@dataclass(frozen=True)
class Row:
    """One architecture; None where the run did not come so far.

    Attributes:
        tier: what captured it.
        seen: Linear and convolution layers in the captured graph, transposed ones included.
        compressible: layers that are offered another form.
        factorized: of these, those that the plan gives one.
        left: everything else that has a reason to be left alone, as "name: reason".
        coverage: share of the FLOPs of convolutions and matrix products with weights that falls on layers seen.
        compressible_share: that on compressible layers.
        captured: difference of the captured graph's outputs from the model's, relative to the largest.
        larger_batch: the same at another batch size; infinite where the graph does not run.
        full_rank: difference of the model's outputs with every compressible layer factorized at full rank.
        unmoved: of these layers, those where scaling a factor moves the outputs by no more than ``full_rank``.
        flops: share of the model's FLOPs, half or the least that can be reached.
        parity: difference of ONNX Runtime's outputs from those of the network at ``flops``.
        fixed_batch: whether it is exported for one batch size, as it cannot be for any.
        dense_export: where the network at ``flops`` is not exported, what keeps torch from exporting the model as
            given; "" if nothing does.
        failed: what failed, e.g. "capture: CaptureError: ..."; "" if nothing did.
        seconds: of processor time, for all of this.
    """

    name: str
    tier: str = ""
    seen: int | None = None
    compressible: int | None = None
    factorized: int | None = None
    left: tuple[str, ...] = ()
    coverage: float | None = None
    compressible_share: float | None = None
    captured: float | None = None
    larger_batch: float | None = None
    full_rank: float | None = None
    unmoved: tuple[str, ...] = ()
    flops: float | None = None
    parity: float | None = None
    fixed_batch: bool = False
    dense_export: str | None = None
    failed: str = ""
    seconds: float = 0.0


def examine(name: str, make: Callable[[], Case]) -> Row:
    """The row of one architecture; a step that fails is named in it, and those that do not need it go on."""
    started = time.process_time()
    row, failures = Row(name), []

    def step(what: str, work: Callable[..., dict[str, Any]], *args: Any) -> bool:
        nonlocal row
        try:
            with quiet():
                row = replace(row, **work(*args))
        except Exception as error:
            failures.append(f"{what}: {reason(error)}")
            return False
        return True

    held: dict[str, Any] = {}
    if step("build", _build, held, make) and step("capture", _capture, held):
        step("count", _coverage, held)
        step("full rank", _full_rank, held)
        if step("half the FLOPs", _half, held):
            step("export", _export, held)
    if "case" in held and row.parity is None:
        step("dense export", _dense_export, held)
    return replace(row, failed="; ".join(failures), seconds=time.process_time() - started)


# --- the steps: each returns fields of the row, and holds what later ones need ---


def _build(held: dict[str, Any], make: Callable[[], Case]) -> dict[str, Any]:
    held["case"] = make()
    return {}


def _capture(held: dict[str, Any]) -> dict[str, Any]:
    case: Case = held["case"]
    captured = held["captured"] = tdfx.capture(case.model, case.args, case.kwargs)
    profiled = held["profiled"] = tdfx.profile(captured, methods=METHODS, progress=False)
    modules = dict(captured.module.named_modules())
    layers = [layer.name for site in profiled.sites for layer in site.layers]
    held["sites"] = layers
    names = [*layers, *(entry.layer for entry in profiled.skipped)]
    held["seen"] = [name for name in names if isinstance(modules.get(name), LAYERS)]
    return {
        "tier": captured.tier,
        "seen": len(held["seen"]),
        "compressible": len(profiled.sites),
        "left": tuple(f"{entry.layer}: {entry.reason}" for entry in profiled.skipped),
        "captured": captured.max_rel_diff,
        "larger_batch": _larger_batch(case, captured.module),
    }


def _coverage(held: dict[str, Any]) -> dict[str, Any]:
    case, module = held["case"], held["captured"].plain
    # Of the graph, not of the model: torch's own attention multiplies by its packed weights in ways without a name.
    by_layer = {name: sum(counts.values()) for name, counts in _flops(module, case).items()}
    whole = by_layer[""]
    seen = sum(by_layer.get(name, 0) for name in held["seen"])
    sites = sum(by_layer.get(name, 0) for name in held["sites"])
    return {"coverage": seen / whole if whole else 1.0, "compressible_share": sites / whole if whole else 1.0}


def _full_rank(held: dict[str, Any]) -> dict[str, Any]:
    case, captured, profiled = held["case"], held["captured"], held["profiled"]
    plan = replace(
        tdfx.plan(profiled, "flops=100%"),
        candidates=tuple(_at_full_rank(profiled, site) for site in profiled.sites),
    )
    module = carry_out(captured, plan).module
    wanted, found = outputs(case.model, case), outputs(module, case)
    difference = _worst(wanted, found)
    unmoved = []
    for site in profiled.sites:
        if not _moves(module, site.name, case, found, max(difference, torch.finfo(torch.float32).eps)):
            unmoved.append(site.name)
    return {"full_rank": difference, "unmoved": tuple(unmoved)}


def _half(held: dict[str, Any]) -> dict[str, Any]:
    captured, profiled = held["captured"], held["profiled"]
    try:
        plan = tdfx.plan(profiled, f"flops={SHARE:.0%}")
    except tdfx.BudgetError as error:
        plan = tdfx.plan(profiled, f"flops={error.least['flops']}")
    result = held["result"] = carry_out(captured, plan)
    return {
        "factorized": sum(not candidate.is_dense for candidate in plan.candidates),
        "flops": result.after.flops / result.before.flops if result.before.flops else 1.0,
    }


def _export(held: dict[str, Any]) -> dict[str, Any]:
    case, module = held["case"], held["result"].module
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with suppress(tdfx.ExportError):
            report = tdfx.export_onnx(module, path, case.args, case.kwargs)
            return {"parity": report.max_rel_diff}
        report = tdfx.export_onnx(module, path, case.args, case.kwargs, dynamic=None)
        return {"parity": report.max_rel_diff, "fixed_batch": True}


def _dense_export(held: dict[str, Any]) -> dict[str, Any]:
    case: Case = held["case"]
    try:
        with plain_attention():
            torch.onnx.export(
                copy.deepcopy(case.model), case.args, kwargs=dict(case.kwargs), dynamo=True, verbose=False
            )
    except Exception as error:
        return {"dense_export": reason(error)}
    return {"dense_export": ""}


# --- leaves ---


def outputs(module: nn.Module, case: Case) -> list[Tensor]:
    """Output tensors on the example inputs."""
    with plain_attention():
        return run(module, case.args, case.kwargs)


def _worst(wanted: list[Tensor], found: list[Tensor]) -> float:
    return max(relative_difference(a, b)[1] for a, b in zip(wanted, found, strict=True))


def _larger_batch(case: Case, module: nn.Module) -> float:
    """Difference of a captured graph from the model with the first row once more."""

    def grown(value: Tensor) -> Tensor:
        return torch.cat([value, value[:1]])

    more = Case(case.model, tuple(map(grown, case.args)), {name: grown(value) for name, value in case.kwargs.items()})
    wanted = outputs(case.model, more)
    try:
        return _worst(wanted, outputs(module, more))
    except Exception:
        return math.inf


def _at_full_rank(profiled: tdfx.Profile, site: tdfx.Site) -> tdfx.Candidate:
    """The method with the fewest MACs at full rank, among those that apply."""
    methods = [method for method in (method_for(site, name) for name in METHODS) if method.unsupported(site) is None]

    def macs(method: Any) -> int:
        return sum(layer.macs for layer in method.chain(site, method.full_rank(site)))

    method = min(methods, key=macs)
    dense = next(candidate for candidate in profiled.of_site(site.name))
    return replace(dense, method=method.name, rank=method.full_rank(site), caveat="")


def _moves(module: nn.Module, name: str, case: Case, reference: list[Tensor], noise: float) -> bool:
    """Whether a site's first factor, scaled, moves the network's outputs by more than rounding.

    Every other entry is scaled, as a normalization may undo a change of all, or of all of an output channel; so the
    first with more than one entry is meant.
    """
    own = (layer._parameters.get("weight") for layer in module.get_submodule(name).modules())
    weight = next(weight for weight in own if weight is not None and weight.dim() >= 2 and weight.numel() > 1)
    kept = weight.detach().clone()
    with torch.no_grad():
        weight *= torch.tensor([1.0, SCALE])[torch.arange(weight.numel()) % 2].view_as(weight)
        try:
            return _worst(reference, outputs(module, case)) > noise
        finally:
            weight.copy_(kept)


def _flops(module: nn.Module, case: Case) -> Mapping[str, Mapping[Any, int]]:
    """FLOPs of convolutions and matrix products with weights by torch's counter, by module; "" is the whole.

    It counts nothing for recurrent layers, which are left out on both sides, and for fused attention, which is not run.
    """
    frozen = copy.deepcopy(module).requires_grad_(False)  # the counter hooks into gradients where there are any
    with plain_attention(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        outputs(frozen, case)
    counts = counter.get_flop_counts()
    named = {name.partition(".")[2]: found for name, found in counts.items() if name != "Global"}
    named[""] = counts.get("Global", {})
    return {
        name: {operator: flops for operator, flops in found.items() if operator in COUNTED}
        for name, found in named.items()
    }
