"""First stage: from a model to a normalized graph."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from tdfx.errors import CaptureError, InputError, VerificationError, WeightError
from tdfx.fingerprint import structure_fingerprint, weights_fingerprint
from tdfx.inputs import Inputs, as_args, as_kwargs, run
from tdfx.passes.capture import has_stock_forward, isolate, symbolic_trace
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
        WeightError: a parameter holds NaN or Inf, or a buffer NaN.
        CaptureError: the model cannot be copied or traced; names the construct.
        VerificationError: the graph does not compute what the model does.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("model is a TorchScript module, which hides its layers; give the module it was made from")
    args, kwargs = as_args(example_inputs), as_kwargs(example_kwargs)
    original, notes = isolate(model)
    if has_stock_forward(original):
        # A graph is of what happens inside its root, so a single layer needs a root of its own.
        original = nn.Sequential(OrderedDict(layer=original)).eval()
    _check_values(original)
    structure, weights = structure_fingerprint(original), weights_fingerprint(original)
    buffers = {name: buffer.clone() for name, buffer in original.named_buffers()}
    reference = _run_model(original, args, kwargs)
    notes = (*notes, *_buffer_notes(original, buffers))
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
        params=sum(parameter.numel() for parameter in model.parameters()),
        weight_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        structure=structure,
        weights=weights,
        skipped=(*_unseen(original, traced), *_remaining_batch_norms(module, inputs, trainable)),
        max_rel_diff=_compare(reference, run(module, args, kwargs)),
        notes=notes,
    )


def normalize(graph_module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    """Eval-mode clean-up that changes no numbers but by rounding."""
    dropped = DropInactive().run(graph_module)
    return FoldBatchNorm(ShapeProp(inputs).run(dropped)).run(dropped)


def _run_model(model: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> list[Tensor]:
    for name, value in (*((f"[{i}]", v) for i, v in enumerate(args)), *kwargs.items()):
        if value.numel() == 0:
            raise InputError(
                f"example input {name} of shape {tuple(value.shape)} is empty; nothing could be verified on it"
            )
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


def _check_values(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise InputError(f"{name} has no shape yet: the layer is lazy; run the model once before")
        if parameter.is_meta:
            raise InputError(f"{name} has no values, only a shape: it is on the meta device; load the weights before")
        _refuse(name, parameter, ~torch.isfinite(parameter), "NaN or Inf")
    for name, buffer in model.named_buffers():
        # Inf is the stuff of attention masks.
        _refuse(name, buffer, torch.isnan(buffer), "NaN")


def _refuse(name: str, values: Tensor, bad: Tensor, what: str) -> None:
    if bool(bad.any()):
        raise WeightError(
            f"layer {name.rpartition('.')[0] or name}: {int(bad.sum())} of {values.numel()} values of {name} are "
            f"{what}; repair the checkpoint"
        )


def _buffer_notes(model: nn.Module, before: Mapping[str, Tensor]) -> tuple[str, ...]:
    """What forward does to buffers, which a graph does not repeat; they are set back to what they were."""
    changed = []
    for name, buffer in model.named_buffers():
        if name in before and not torch.equal(buffer, before[name]):
            changed.append(name)
            buffer.copy_(before[name])
    return tuple(f"{name}: forward updates this buffer in eval mode; the result does not" for name in changed)


def _compare(reference: list[Tensor], found: list[Tensor]) -> float:
    if len(reference) != len(found):
        raise CaptureError(
            f"the captured graph returns {len(found)} tensors, the model {len(reference)}; return tensors, tuples or "
            "dictionaries of them from forward"
        )
    worst = 0.0
    for index, (wanted, got) in enumerate(zip(reference, found, strict=True)):
        if bool(torch.isnan(wanted).any()):
            raise VerificationError(f"output {index} of the model itself holds NaN on the example inputs; use others")
        absolute, relative = relative_difference(wanted, got)
        allowed = RTOL.get(wanted.dtype, 0.0)
        if not relative <= allowed:
            raise VerificationError(
                f"output {index} of the captured graph ({got.dtype}) differs from the model's ({wanted.dtype}) by "
                f"{absolute:.3g} ({relative:.3g} of its largest value, allowed {allowed:.0e}): forward depends on "
                "something that tracing does not see",
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
