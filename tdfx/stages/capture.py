"""First stage: from a model to a normalized graph."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from tdfx.contained import plain_attention, reason
from tdfx.dynamic import BATCH, Dynamic, check_dynamic, free_axes, other_sizes, resized
from tdfx.errors import CaptureError, InputError, OptionError, VerificationError
from tdfx.fingerprint import structure_fingerprint, weights_fingerprint
from tdfx.inputs import Inputs, as_args, as_kwargs, run
from tdfx.model_check import check_devices, check_values
from tdfx.passes.capture import has_hooks, has_stock_forward, isolate, symbolic_trace
from tdfx.passes.capture_in_place import capture_in_place, kept_batch_norms, not_called
from tdfx.passes.count import count
from tdfx.passes.drop_inactive import DropInactive
from tdfx.passes.drop_unread import DropUnread
from tdfx.passes.export_trace import export_trace, operators
from tdfx.passes.fold_batch_norm import FoldBatchNorm, RemainingBatchNorms
from tdfx.passes.fold_weights import FoldWeights
from tdfx.passes.in_place import InPlace, sharing
from tdfx.passes.layer_operators import parameter_read
from tdfx.passes.lift_layers import LiftLayers
from tdfx.passes.lift_modules import LiftModules
from tdfx.passes.merge_linear import MergedLayers, MergeLinear
from tdfx.passes.recurrent import is_recurrent
from tdfx.passes.shape_prop import ShapeProp, bind
from tdfx.passes.sites import has_weight_matrix
from tdfx.passes.unpack_attention import unpack_attention
from tdfx.passes.unpack_recurrent import UnpackableLayers, UnpackRecurrent
from tdfx.passes.verify import relative_difference
from tdfx.pt2 import load_program
from tdfx.records.capture import AUTO, EXPORT, FX, INPLACE, TIERS, Capture
from tdfx.records.layer import Skipped
from tdfx.signature import Signature, with_flat_call

Model = nn.Module | ExportedProgram | str | Path
Traced = TypeVar("Traced")

UPDATED = "forward updates this buffer in eval mode"

# Allowed between the model's outputs and the normalized graph's; folding BatchNorm rounds weights anew.
RTOL = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


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
    given = as_args(example_inputs), as_kwargs(example_kwargs)
    original, notes = _isolated(model)
    check_values(original)
    structure, weights = structure_fingerprint(original), weights_fingerprint(original)
    buffers = {name: buffer.clone() for name, buffer in original.named_buffers()}
    signature, tensors = Signature.of(original.forward, *given)
    check_devices(original, dict(zip(signature.names, tensors, strict=True)))
    # Stages between this one and the result know tensors alone.
    args, kwargs = given if signature.is_plain else (tensors, {})
    network = _flat(original, signature)
    try:
        reference = _run_model(network, args, kwargs)
    except InputError:
        if not has_hooks(model):
            raise
        # Some models gather their outputs by hooks of their own.
        original, notes = _isolated(model, keep_hooks=True)
        network = _flat(original, signature)
        reference = _run_model(network, args, kwargs)
    if not signature.is_plain:
        _compare(run(original, *given), reference)
    notes = (*notes, *_constant_notes(signature))
    changed = _restore_buffers(original, buffers)
    trials = _trials(network, signature, dynamic, args, kwargs)
    unpacked = unpack_attention(network, trainable=trainable)
    if program is None:
        tier, traced, tier_notes = _trace(unpacked, args, kwargs, trials, trainable, capture)
    else:
        tier, traced, tier_notes = EXPORT, _lift(original, original, trainable), ()
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
        max_rel_diff=_compare(reference, run_plain(module, args, kwargs)),
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


@dataclass(frozen=True)
class _Trials:
    """The model at another size of each dimension that is named.

    Attributes:
        free: names of the free dimensions of each input.
        args: positional inputs of those sizes.
        kwargs: likewise by keyword.
        reference: what the model makes of them; None without names, the batch's aside.
        sizes: in words.
    """

    free: tuple[dict[int, str], ...]
    args: tuple[Tensor, ...] = ()
    kwargs: Mapping[str, Tensor] = field(default_factory=dict)
    reference: list[Tensor] | None = None
    sizes: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        return () if self.reference is None else (f"free sizes: model and graph agree at {self.sizes} too",)

    def check(self, traced: fx.GraphModule) -> fx.GraphModule:
        """The graph, if it computes what the model does.

        Raises:
            CaptureError: it does not.
        """
        if self.reference is None:
            return traced
        try:
            _compare(self.reference, run(traced, self.args, self.kwargs))
        except Exception as error:
            raise CaptureError(
                f"the graph is of the example inputs' sizes and not of {self.sizes}: {reason(error)}; leave out of "
                "dynamic what forward needs as a number"
            ) from error
        return traced


def _trials(
    model: nn.Module,
    signature: Signature,
    dynamic: Dynamic,
    args: tuple[Tensor, ...],
    kwargs: Mapping[str, Tensor],
) -> _Trials:
    inputs = dict(zip(signature.names, (*args, *kwargs.values()), strict=True))
    axes = free_axes(dynamic, inputs)
    free = tuple(axes.get(name, {}) for name in inputs)

    def call(values: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        given = tuple(values.values())
        return given[: len(args)], dict(zip(kwargs, given[len(args) :], strict=True))

    def outputs(values: Mapping[str, Tensor]) -> list[Tensor]:
        with plain_attention():
            return run(model, *call(values))

    others = other_sizes(axes, inputs, outputs)
    if not others:
        return _Trials(free)
    other = resized(axes, inputs, others)
    text = ", ".join(f"{name} = {size}" for name, size in others.items())
    return _Trials(free, *call(other), outputs(other), text)


def _trace(
    model: nn.Module,
    args: tuple[Tensor, ...],
    kwargs: Mapping[str, Tensor],
    trials: _Trials,
    trainable: bool,
    tier: str,
) -> tuple[str, fx.GraphModule, tuple[str, ...]]:
    """Tier, graph and notes, of the tier asked for or of the first one that takes the model."""
    if tier == INPLACE:
        return INPLACE, trials.check(capture_in_place(model, args, kwargs)), ()
    if tier == FX:
        return FX, trials.check(_lift(_forced(FX, symbolic_trace, model, args, kwargs), model, trainable)), ()
    if tier == EXPORT:
        exported, notes = _forced(EXPORT, export_trace, model, args, kwargs, trials.free)
        return EXPORT, trials.check(_lift(exported, model, trainable)), notes
    try:
        return _trace_graph(
            sharing(model), args, kwargs, trials, trainable
        )  # tracing may leave its own in buffers and attributes
    except CaptureError as error:
        why = f"captured in place, where forward stays Python code: {error}"
        return INPLACE, trials.check(capture_in_place(model, args, kwargs)), (why,)


def _forced(tier: str, trace: Callable[..., Traced], *given: Any) -> Traced:
    """What a way of tracing returns.

    Raises:
        CaptureError: it fails; says what else to try.
    """
    try:
        return trace(*given)
    except CaptureError as error:
        other = EXPORT if tier == FX else FX
        raise CaptureError(
            f"capture={tier!r}: {error}; or try capture={other!r}, or capture={INPLACE!r}, which needs no graph"
        ) from error


def _trace_graph(
    model: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], trials: _Trials, trainable: bool
) -> tuple[str, fx.GraphModule, tuple[str, ...]]:
    """Symbolic tracing if it sees all layers, or else torch.export if that sees more of them."""
    traced, problem = None, None
    try:
        traced = trials.check(_lift(symbolic_trace(model, args, kwargs), model, trainable))
        if len(_layers(traced)) >= _count_called(model, args, kwargs) and not _calls_opaque(traced):
            return FX, traced, ()
    except CaptureError as error:
        problem = error
    try:
        exported, notes = export_trace(model, args, kwargs, trials.free)
        lifted = trials.check(_lift(exported, model, trainable))
    except CaptureError as error:
        if traced is not None:
            return FX, traced, (f"symbolic tracing does not see all layers, and {error}",)
        raise CaptureError(f"{problem}. {error}") from error
    if traced is not None and len(_layers(traced)) >= len(_layers(lifted)):
        return FX, traced, ()
    return EXPORT, lifted, notes


def _lift(operators: nn.Module, model: nn.Module, trainable: bool) -> fx.GraphModule:
    assert isinstance(operators, fx.GraphModule)
    folded = operators if trainable else FoldWeights().run(operators)
    return DropUnread().run(LiftModules(model).run(LiftLayers(model).run(folded)))


def _layers(graph_module: fx.GraphModule) -> set[str]:
    """Names of the Linear and convolution layers that a graph calls."""
    called = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    return {name for name in called if has_stock_forward(graph_module.get_submodule(name))}


def _calls_opaque(graph_module: fx.GraphModule) -> bool:
    """Whether weights go into functions that tracing does not look into (torch.fx.wrap)."""
    functions = (node for node in graph_module.graph.nodes if node.op == "call_function")
    opaque = (node for node in functions if getattr(node.target, "__module__", None) and not _is_known(node.target))
    return any(parameter_read(graph_module, value) is not None for node in opaque for value in node.all_input_nodes)


def _is_known(function: Any) -> bool:
    return function.__module__.partition(".")[0] in ("torch", "_operator", "operator", "builtins", "math")


def _count_called(model: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> int:
    """How many Linear and convolution layers one run calls."""
    called: set[nn.Module] = set()
    layers = [module for module in model.modules() if has_stock_forward(module)]
    handles = [layer.register_forward_hook(lambda module, *_: called.add(module)) for layer in layers]
    try:
        run_plain(model, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return len(called)


def _run_model(model: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> list[Tensor]:
    for name, value in (*((f"[{i}]", v) for i, v in enumerate(args)), *kwargs.items()):
        if value.numel() == 0:
            raise InputError(
                f"example input {name} of shape {tuple(value.shape)} is empty; nothing could be verified on it"
            )
    try:
        outputs = run_plain(model, args, kwargs)
    except Exception as error:
        shapes = ", ".join(f"{tuple(value.shape)} {value.dtype}" for value in (*args, *kwargs.values()))
        raise InputError(
            f"{type(model).__name__}{inspect.signature(model.forward)} does not run on the example inputs "
            f"({shapes}): {type(error).__name__}: {error}"
        ) from error
    if not outputs:
        raise InputError(f"{type(model).__name__} returns no tensor on the example inputs; expected at least one")
    return outputs


def run_plain(model: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> list[Tensor]:
    """Output tensors, without torch's fast path for transformer layers."""
    with plain_attention():
        return run(model, args, kwargs)


def _restore_buffers(model: nn.Module, before: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of the buffers that forward writes to, which a graph does not repeat; they are set back."""
    changed = []
    for name, buffer in model.named_buffers():
        if name in before and not torch.equal(buffer, before[name]):
            changed.append(name)
            buffer.copy_(before[name])
    return tuple(changed)


def _constant_notes(signature: Signature) -> tuple[str, ...]:
    if not signature.constants:
        return ()
    found = ", ".join(f"{place} = {value!r}" for place, value in signature.constants.items())
    return (f"constants of the capture, with which alone the result can be called: {found}",)


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
            found.append(Skipped(name or type(model).__name__, "not called on the example inputs"))
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
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        inside = any(f"{name}.".startswith(f"{leaf}.") or leaf.startswith(_join(name, "dropout_")) for leaf in called)
        if is_own and not inside and code is not None and "training" in code.co_names:
            notes.append(
                f"{name or type(module).__name__}: forward asks for self.training; the result computes there as in "
                "eval mode even when it trains (use nn.Dropout and the like as modules)"
            )
    return tuple(notes)
