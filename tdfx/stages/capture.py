"""First stage: from a model to a normalized graph."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from tdfx.agreement import compare, run_plain
from tdfx.contained import quiet
from tdfx.dynamic import BATCH, Dynamic, check_dynamic
from tdfx.errors import CaptureError, InputError, OptionError, VerificationError
from tdfx.fingerprint import structure_fingerprint, weights_fingerprint
from tdfx.inputs import Inputs, as_call, run
from tdfx.layouts import equal
from tdfx.model_check import check_devices, check_values
from tdfx.passes.capture import has_hooks, has_stock_forward, is_reparametrized, isolate
from tdfx.passes.capture_in_place import NOT_CALLED, kept_batch_norms, not_called
from tdfx.passes.count import count
from tdfx.passes.drop_inactive import DropInactive
from tdfx.passes.export_trace import operators
from tdfx.passes.fold_batch_norm import FoldBatchNorm, RemainingBatchNorms
from tdfx.passes.in_place import InPlace
from tdfx.passes.layer_operators import parameter_read
from tdfx.passes.merge_linear import MergedLayers, MergeLinear
from tdfx.passes.recurrent import is_recurrent
from tdfx.passes.shape_prop import ShapeProp, bind
from tdfx.passes.sites import has_weight_matrix
from tdfx.passes.unpack_attention import unpack_attention
from tdfx.passes.unpack_recurrent import UnpackableLayers, UnpackRecurrent
from tdfx.pt2 import load_program
from tdfx.records.capture import AUTO, EXPORT, TIERS, Capture
from tdfx.records.layer import Skipped
from tdfx.signature import Signature, with_flat_call
from tdfx.tracing import lift, trace
from tdfx.trials import at_other_sizes

Model = nn.Module | ExportedProgram | str | Path

FUSED = nn.TransformerEncoder | nn.TransformerEncoderLayer | nn.MultiheadAttention
UPDATED = "forward updates this buffer in eval mode"


def capture(
    model: Model,
    example_inputs: Inputs | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Dynamic = BATCH,
    trainable: bool = False,
    capture: str = AUTO,
) -> Capture:
    """Captures a model's graph and normalizes it: BatchNorm folded, Dropout and Identity dropped, linear layers merged.

    Linear layers and convolutions that follow each other directly become one where that is cheaper; the result's
    ``skipped`` says which.

    The model is copied; its weights, buffers, hooks and train flags stay as they are. The graph is of eval mode. It
    comes from symbolic tracing ("fx"), or, where that fails or sees fewer layers, from torch.export ("export") with the
    sizes free that ``dynamic`` names, and all others those of the example inputs. A model that neither takes, as one
    whose control flow depends on values, has no graph: its own forward runs as Python on the copy ("inplace"), its
    layers are watched and replaced there, and BatchNorm and Dropout stay.

    Args:
        model: a module, an ``ExportedProgram``, or the path of a ``.pt2`` file with one.
        example_inputs: a tensor, or a tuple of the arguments that ``model`` takes: tensors, tuples, lists and
            dictionaries of them, and numbers, strings and None, which stay as they are in all calls of the result.
            Shapes decide the costs. None for those that an exported program was made with.
        example_kwargs: keyword arguments, likewise.
        dynamic: sizes that stay free: "batch", dimension 0 of all inputs where the model allows that; names of other
            dimensions besides it by argument, as ``{"input_ids": {1: "sequence"}}``, with None for one that is fixed;
            or None for no such size. Of each name another size is tried on model and graph.
        trainable: keep BatchNorm and Dropout and merge nothing, so that the result trains as the original would.
        capture: "auto", or "fx", "export" or "inplace" for that way and no other.

    Returns:
        The normalized graph in ``.module``, with what later stages need to know of the model as given.

    Raises:
        InputError: the inputs are none that a model can be called with here, or on another device than it, or the model
            does not run on them, or on another size of a dimension that is to be free, or has lazy layers that never
            ran.
        OptionError: ``dynamic`` is not understood.
        WeightError: a parameter holds NaN or Inf, or a buffer NaN.
        OptionError: ``capture`` is not understood.
        CaptureError: the model cannot be copied, or not traced in the way asked for; names the construct.
        VerificationError: the graph does not compute what the model does.
    """
    check_dynamic(dynamic)
    if capture not in TIERS:
        raise OptionError(f"capture is {capture!r}; expected one of {', '.join(map(repr, TIERS))}")
    model, program = _module(model)
    if program is not None and capture not in (AUTO, EXPORT):
        raise CaptureError(
            f"model is an exported program, a graph of its own; expected capture 'auto', found {capture!r}"
        )
    if program is not None and example_inputs is None and not example_kwargs:
        example_inputs, example_kwargs = program.example_inputs or (None, None)
    if program is not None and isinstance(dynamic, Mapping):
        raise OptionError(f"dynamic is {dynamic!r}; an exported program has its own free sizes: export it with these")
    given = as_call(example_inputs, example_kwargs)
    original, notes = _isolated(model)
    check_values(original)
    structure, weights = structure_fingerprint(original), weights_fingerprint(original)
    buffers = {name: buffer.clone() for name, buffer in original.named_buffers()}
    signature, values = Signature.of(original.forward, *given)
    check_devices(original, dict(zip(signature.names, values, strict=True)))
    # Stages between this one and the result know tensors alone.
    args, kwargs = given if signature.is_plain else (values, {})
    if _needs_hooks(model, original, given):
        original, notes = _isolated(model, keep_hooks=True)
    # The model first: what it sets up in itself when it runs is then the same in all views of it.
    reference = _run_model(original, *given)
    compare(reference, reference, original)
    network = _flat(original, signature)
    if not signature.is_plain:
        compare(reference, run_plain(network, args, kwargs), network)
    notes = (
        *notes,
        *_fast_path_notes(original, given, reference),
        *_constant_notes(signature),
        *(_reparametrized_notes(model) if trainable else ()),
    )
    changed = _restore_buffers(original, buffers)
    trials = at_other_sizes(network, signature, dynamic, args, kwargs, reference)
    unpacked = unpack_attention(network, trainable=trainable)
    if program is None:
        tier, traced, tier_notes = trace(unpacked, args, kwargs, trials, trainable, capture)
    else:
        tier, traced, tier_notes = EXPORT, lift(original, original, trainable), ()
    inputs = bind(traced, args, kwargs)
    merged: tuple[Skipped, ...] = ()
    if isinstance(traced, InPlace):
        plain: fx.GraphModule = traced
        module = plain
        hidden = not_called(traced, args, kwargs)
        notes = (*notes, *(f"{name}: {UPDATED}; so does the result" for name in changed))
        notes = (*notes, *(() if trainable else kept_batch_norms(unpacked)))
    else:
        plain = traced if trainable else normalize(traced, inputs)
        module = _unpacked(plain, inputs, trainable)
        merged = MergedLayers().run(plain)
        hidden = (*_unseen(unpacked, traced), *merged, *_remaining_batch_norms(plain, inputs, trainable))
        notes = (*notes, *(f"{name}: {UPDATED}; the result does not" for name in changed))
        notes = (*notes, *(_train_notes(unpacked, plain) if trainable else ()))
    workloads = count(network, args, kwargs)
    return Capture(
        original=original,
        module=module,
        plain=plain,
        tier=tier,
        args=args,
        kwargs=kwargs,
        trainable=trainable,
        workloads=workloads,
        module_workloads=count(plain, args, kwargs) if merged else workloads,
        params=sum(parameter.numel() for parameter in model.parameters()),
        weight_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        structure=structure,
        weights=weights,
        skipped=hidden,
        max_rel_diff=compare(reference, run_plain(module, args, kwargs), module),
        notes=(*notes, *tier_notes, *trials.notes),
        signature=signature,
    )


def _module(model: object) -> tuple[nn.Module, ExportedProgram | None]:
    """The model as a module, and the exported program that it comes from."""
    if isinstance(model, str | Path):
        model = load_program(model)
    if isinstance(model, ExportedProgram):
        return operators(model), model
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("model is a TorchScript module, which hides its layers; give the module it was made from")
    if isinstance(model, nn.Module):
        return model, None
    raise InputError(
        f"model is a {type(model).__name__}; expected a torch.nn.Module, a torch.export.ExportedProgram or the path of "
        "a .pt2 file"
    )


def _isolated(model: nn.Module, *, keep_hooks: bool = False) -> tuple[nn.Module, tuple[str, ...]]:
    original, notes = isolate(model, keep_hooks=keep_hooks)
    if not has_stock_forward(original) and not is_recurrent(original):
        return original, notes
    # A graph is of what happens inside its root, so a single layer needs a root of its own.
    return nn.Sequential(OrderedDict(layer=original)).eval(), notes


def _needs_hooks(model: nn.Module, original: nn.Module, given: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
    """Whether a model's own hooks have a part in its outputs: its copy without them fails, or returns others."""
    if not has_hooks(model):
        return False
    try:
        without = run_plain(original, *given)
    except Exception:
        return True
    try:
        kept = run_plain(_isolated(model, keep_hooks=True)[0], *given)
    except Exception:
        return False  # they are made for the model alone, which its copy can do without
    return len(without) != len(kept) or not all(map(torch.equal, without, kept))


def _flat(model: nn.Module, signature: Signature) -> nn.Module:
    """The model as what takes tensors alone."""
    return model if signature.is_plain else with_flat_call(model, signature)


def normalize(graph_module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    """Eval-mode clean-up that changes no numbers but by rounding."""
    dropped = DropInactive().run(graph_module)
    metas = ShapeProp(inputs).run(dropped)
    return MergeLinear(metas).run(FoldBatchNorm(metas).run(dropped))


def _unpacked(plain: fx.GraphModule, inputs: tuple[Tensor, ...], trainable: bool) -> fx.GraphModule:
    """The graph with the input weights of its recurrent layers as linear layers."""
    if not any(is_recurrent(module) for module in plain.modules()):
        return plain
    names = UnpackableLayers(ShapeProp(inputs).run(plain)).run(plain)
    return UnpackRecurrent(names, trainable).run(plain)


def _run_model(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    given, values = Signature.of(model.forward, args, kwargs)
    for name, value in zip(given.names, values, strict=True):
        if value.numel() == 0:
            raise InputError(
                f"example input {name} of shape {tuple(value.shape)} is empty; nothing could be verified on it"
            )
    try:
        outputs = run_plain(model, args, kwargs)
    except Exception as error:
        shapes = ", ".join(f"{tuple(value.shape)} {value.dtype}" for value in values)
        raise InputError(
            f"{type(model).__name__}{inspect.signature(model.forward)} does not run on the example inputs "
            f"({shapes}): {type(error).__name__}: {error}"
        ) from error
    if not outputs:
        raise InputError(f"{type(model).__name__} returns no tensor on the example inputs; expected at least one")
    return outputs


def _fast_path_notes(
    model: nn.Module, given: tuple[tuple[Any, ...], dict[str, Any]], reference: list[Tensor]
) -> tuple[str, ...]:
    """A word where torch's fused transformer layers return other values than those that the result is compared to."""
    if not any(isinstance(module, FUSED) for module in model.modules()):
        return ()
    try:
        with quiet():
            compare(reference, run(model, *given), model)
    except VerificationError:
        return (
            "without gradients torch runs these transformer layers fused, which returns other values on the example "
            "inputs (zeros at padded positions); the result returns what the layers compute one by one, as in training "
            "and after torch.backends.mha.set_fastpath_enabled(False)",
        )
    except Exception:
        return ()  # it does not run fused
    return ()


def _restore_buffers(model: nn.Module, before: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of the buffers that forward writes to, which a graph does not repeat; they are set back."""
    changed = []
    for name, buffer in model.named_buffers():
        if name in before and not equal(buffer, before[name]):
            changed.append(name)
            buffer.copy_(before[name])
    return tuple(changed)


def _reparametrized_notes(model: nn.Module) -> tuple[str, ...]:
    names = [name for name, module in model.named_modules() if is_reparametrized(module)]
    if not names:
        return ()
    return (f"{', '.join(names)}: the weight itself trains, not what weight_norm or the like computed it from",)


def _constant_notes(signature: Signature) -> tuple[str, ...]:
    if not signature.constants:
        return ()
    found = ", ".join(f"{place} = {value!r}" for place, value in signature.constants.items())
    return (f"constants of the capture, with which alone the result can be called: {found}",)


def _unseen(model: nn.Module, traced: fx.GraphModule) -> tuple[Skipped, ...]:
    """Layers with weights that the graph neither calls nor reads."""
    called = dict.fromkeys(str(node.target) for node in traced.graph.nodes if node.op == "call_module")
    read = {id(parameter_read(traced, node)) for node in traced.graph.nodes}
    known = read | {id(p) for name in called for p in traced.get_submodule(name).parameters(recurse=False)}
    found = []
    for name, module in model.named_modules():
        weights = [weight for weight in module.named_parameters(recurse=False) if weight[1].dim() >= 2]
        own = [key for key, weight in weights if id(weight) not in known and _join(name, key) not in called]
        if not own or name in called:
            continue
        inside = next((leaf for leaf in called if name.startswith(f"{leaf}.")), None)
        if inside is not None:
            leaf = type(traced.get_submodule(inside)).__name__
            found.append(
                Skipped(name, f"{leaf} {inside} reads its weight directly; only layers called as such are seen")
            )
        elif not any(True for child in module.children() if has_weight_matrix(child)):
            found.append(Skipped(name or type(model).__name__, NOT_CALLED))
    return tuple(found)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _remaining_batch_norms(module: fx.GraphModule, inputs: tuple[Tensor, ...], trainable: bool) -> tuple[Skipped, ...]:
    return () if trainable else RemainingBatchNorms(ShapeProp(inputs).run(module)).run(module)


def _train_notes(original: nn.Module, traced: fx.GraphModule) -> tuple[str, ...]:
    """Modules whose forward was traced through although it asks for the mode: they stay as in eval."""
    called = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    notes = []
    for name, module in original.named_modules():
        is_own = not type(module).__module__.startswith("torch.")
        forward: Any = getattr(type(module), "forward", None)
        code = getattr(inspect.unwrap(forward), "__code__", None)
        made = tuple(_join(name, f"{kind}_") for kind in ("batch_norm", "dropout", "rrelu"))
        inside = any(f"{name}.".startswith(f"{leaf}.") or leaf.startswith(made) for leaf in called)
        if is_own and not inside and code is not None and "training" in code.co_names:
            notes.append(
                f"{name or type(module).__name__}: forward asks for self.training; the result computes there as in "
                "eval mode even when it trains (use nn.Dropout and the like as modules)"
            )
    return tuple(notes)
