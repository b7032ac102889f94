"""First stage: from a model to a normalized graph."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from tdfx.errors import CaptureError, InputError, VerificationError, WeightError
from tdfx.fingerprint import structure_fingerprint, weights_fingerprint
from tdfx.inputs import Inputs, as_args, as_kwargs, run
from tdfx.passes.capture import isolate, symbolic_trace
from tdfx.passes.count import count
from tdfx.passes.drop_inactive import DropInactive
from tdfx.passes.fold_batch_norm import FoldBatchNorm, RemainingBatchNorms
from tdfx.passes.shape_prop import ShapeProp, bind
from tdfx.passes.sites import has_weight_matrix
from tdfx.passes.verify import relative_difference
from tdfx.records.capture import Capture
from tdfx.records.layer import Skipped

# Allowed between the model's outputs and the normalized graph's; folding BatchNorm rounds weights anew.
RTOL = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def capture(
    model: nn.Module,
    example_inputs: Inputs,
    example_kwargs: Mapping[str, Tensor] | None = None,
    *,
    trainable: bool = False,
) -> Capture:
    """Captures a model's graph by symbolic tracing and normalizes it: BatchNorm folded, Dropout and Identity dropped.

    The model is copied; its weights, buffers, hooks and train flags stay as they are. The graph is of eval mode.

    Args:
        model: any module that torch.fx can trace.
        example_inputs: a tensor or tuple of tensors that ``model`` takes; shapes decide the costs.
        example_kwargs: keyword arguments, tensors.
        trainable: keep BatchNorm and Dropout, so that the result trains as the original would.

    Returns:
        The normalized graph in ``.module``, with what later stages need to know of the model as given.

    Raises:
        InputError: the inputs are no tensors, or the model does not run on them or has lazy layers that never ran.
        WeightError: a parameter holds NaN or Inf.
        CaptureError: the model cannot be copied or traced; names the construct.
        VerificationError: the graph does not compute what the model does.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    args, kwargs = as_args(example_inputs), as_kwargs(example_kwargs)
    original, notes = isolate(model)
    _check_parameters(original)
    reference = _run_model(original, args, kwargs)
    traced = symbolic_trace(original, args, kwargs)
    inputs = bind(traced, args, kwargs)
    module = traced if trainable else normalize(traced, inputs)
    if trainable:
        notes = (*notes, *_train_notes(original, module))
    return Capture(
        original=original,
        module=module,
        tier="fx",
        args=args,
        kwargs=kwargs,
        trainable=trainable,
        workloads=count(original, args, kwargs),
        structure=structure_fingerprint(original),
        weights=weights_fingerprint(original),
        skipped=(*_unseen(original, traced), *_remaining_batch_norms(module, inputs, trainable)),
        max_rel_diff=_compare(reference, run(module, args, kwargs)),
        notes=notes,
    )


def normalize(graph_module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    """Eval-mode clean-up that changes no numbers but by rounding."""
    dropped = DropInactive().run(graph_module)
    return FoldBatchNorm(ShapeProp(inputs).run(dropped)).run(dropped)


def _run_model(model: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> list[Tensor]:
    try:
        outputs = run(model, args, kwargs)
    except Exception as error:
        shapes = ", ".join(f"{tuple(value.shape)} {value.dtype}" for value in (*args, *kwargs.values()))
        raise InputError(
            f"{type(model).__name__}{inspect.signature(model.forward)} does not run on the example inputs "
            f"({shapes}): {type(error).__name__}: {error}"
        ) from error
    if not outputs:
        raise InputError(f"{type(model).__name__} returns no tensor on the example inputs; expected at least one")
    return outputs


def _check_parameters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise InputError(f"{name} has no shape yet: the layer is lazy; run the model once before")
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            bad = int((~torch.isfinite(parameter)).sum())
            raise WeightError(
                f"layer {name.rpartition('.')[0] or name}: {bad} of {parameter.numel()} values of {name} are NaN or "
                "Inf; repair the checkpoint"
            )


def _compare(reference: list[Tensor], found: list[Tensor]) -> float:
    if len(reference) != len(found):
        raise CaptureError(
            f"the captured graph returns {len(found)} tensors, the model {len(reference)}; return tensors, tuples or "
            "dictionaries of them from forward"
        )
    worst = 0.0
    for index, (wanted, got) in enumerate(zip(reference, found, strict=True)):
        absolute, relative = relative_difference(wanted, got)
        allowed = RTOL.get(wanted.dtype, 0.0)
        if not relative <= allowed:
            raise VerificationError(
                f"output {index} of the captured graph differs from the model's by {absolute:.3g} ({relative:.3g} of "
                f"its largest value, allowed {allowed:.0e}): forward depends on something that tracing does not see",
                max_abs_diff=absolute,
                max_rel_diff=relative,
            )
        worst = max(worst, relative)
    return worst


def _unseen(original: nn.Module, traced: fx.GraphModule) -> tuple[Skipped, ...]:
    """Layers with weights that the graph does not call."""
    called = dict.fromkeys(str(node.target) for node in traced.graph.nodes if node.op == "call_module")
    leaves = {id(traced.get_submodule(name)): name for name in called}
    found = []
    for name, module in original.named_modules():
        own = any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))
        if not own or id(module) in leaves:
            continue
        inside = next((leaf for leaf in called if name.startswith(f"{leaf}.")), None)
        if inside is not None:
            leaf = type(traced.get_submodule(inside)).__name__
            found.append(
                Skipped(name, f"{leaf} {inside} reads its weight directly; only layers called as such are seen")
            )
        elif not any(True for child in module.children() if has_weight_matrix(child)):
            found.append(Skipped(name or type(original).__name__, _why_unseen(name, module, traced)))
    return tuple(found)


def _why_unseen(name: str, module: nn.Module, traced: fx.GraphModule) -> str:
    reads = any(n.op == "get_attr" and str(n.target).startswith(f"{name}." if name else "") for n in traced.graph.nodes)
    if reads:
        return f"{type(module).__name__} computes with its weight in a forward of its own; use the stock layer there"
    return "not called on the example inputs"


def _remaining_batch_norms(module: fx.GraphModule, inputs: tuple[Tensor, ...], trainable: bool) -> tuple[Skipped, ...]:
    return () if trainable else RemainingBatchNorms(ShapeProp(inputs).run(module)).run(module)


def _train_notes(original: nn.Module, traced: fx.GraphModule) -> tuple[str, ...]:
    """Modules whose forward was traced through although it asks for the mode: they stay as in eval."""
    called = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    notes = []
    for name, module in original.named_modules():
        is_own = not type(module).__module__.startswith("torch.")
        code = getattr(type(module).forward, "__code__", None)
        inside = any(name == leaf or name.startswith(f"{leaf}.") for leaf in called)
        if is_own and not inside and code is not None and "training" in code.co_names:
            notes.append(
                f"{name or type(module).__name__}: forward asks for self.training; the result computes there as in "
                "eval mode even when it trains (use nn.Dropout and the like as modules)"
            )
    return tuple(notes)
