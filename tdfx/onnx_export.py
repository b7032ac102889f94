"""ONNX export behind a gate: no file gets its name before ONNX Runtime has computed the network's outputs from it."""

from __future__ import annotations

import copy
import inspect
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

from tdfx.contained import failing_as, plain_attention, quiet, reason
from tdfx.dynamic import BATCH, Axes, Dynamic, check_dynamic, free_axes, other_sizes, resized, sizes
from tdfx.errors import ExportError, InputError, OptionError
from tdfx.evaluation import Evaluate
from tdfx.files import replacing
from tdfx.inputs import Inputs, as_call, named_outputs
from tdfx.onnx_shared import share_matrices
from tdfx.parity import OutputParity, compare, session_options
from tdfx.quantization import FloatFile, Quantization, check_quantize, folder_bytes, quantized
from tdfx.signature import Signature, with_flat_call, with_output

LEAST_OPSET = 18  # torch's exporter writes no older one
MAX_WEIGHT_BYTES = 2 * 10**9  # protobuf ends at 2^31 bytes; the rest is room for the graph
RTOL = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how closely ONNX Runtime reproduces the network from it.

    Attributes:
        path: the file, as given. With ``quantization`` that one is int8, and the rest of this is about the float32
            file that it was made from, which is kept only if asked for.
        opset: version of the ONNX operator set, read from the file.
        max_abs_diff: largest absolute difference over all outputs and sizes, in output units.
        max_rel_diff: largest difference of an output divided by that output's largest magnitude.
        rtol: the relative difference that was allowed.
        batch_sizes: batch sizes (dimension 0 of the inputs) that were compared.
        file_bytes: size on disk, external weights included (1 MB = 10^6 bytes).
        external_data: whether the weights lie in a second file, ``<path>.data`` (from 2 GB on).
        outputs: one record per output, each the worst over the sizes.
        sizes: of each dynamic dimension by name, the batch among them, those that were compared.
        quantization: the int8 file, if one was asked for.
    """

    path: str
    opset: int
    max_abs_diff: float
    max_rel_diff: float
    rtol: float
    batch_sizes: tuple[int, ...]
    file_bytes: int
    external_data: bool
    outputs: tuple[OutputParity, ...]
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    quantization: Quantization | None = None


def export_onnx(
    module: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Inputs | None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Dynamic = BATCH,
    rtol: float | None = None,
    opset: int | None = None,
    quantize: str | None = None,
    calibration: object = None,
    samples: int | None = None,
    evaluate: Evaluate | None = None,
    float32: str | os.PathLike[str] | None = None,
) -> ExportReport:
    """Write a network as an ONNX file that is known to compute the same.

    The network is exported in eval mode (the caller's module keeps its modes), checked by ``onnx.checker`` and run
    by ONNX Runtime on the CPU at the example's sizes and, where some are dynamic, at others of these. Only then does
    the file get its name; on any error an older file stays as it was. The file holds no source paths. Its inputs are
    called as forward's arguments, tensors in containers by their keys. Its outputs are all tensors among the network's,
    called by their keys or fields ("logits", "past_key_values_0"), else "output", or "output_0" and on in a tuple.

    With ``quantize="int8"`` the float32 file passes all that in a temporary place, and the file is made from it by
    onnxruntime.quantization: weights in int8 by output channel, activations in uint8. Given calibration data, tensors
    between linear operators, as in chains of factors, first have their channels brought to alike ranges, which changes
    no output, and then fixed ranges; without, ranges are found anew in every run, which suits linear layers, while
    convolutions get slower than in float32.

    Args:
        module: the network.
        path: the ONNX file to write; missing folders are made.
        example_inputs: a tensor, or a tuple of arguments: tensors, each (batch, ...), containers of them, constants;
            None where there are keyword arguments alone.
        example_kwargs: arguments that ``forward`` takes by keyword, likewise.
        dynamic: "batch" names dimension 0 of every input "batch" and leaves its size open; a mapping names other
            dimensions besides, as ``{"input_ids": {1: "sequence"}}``, with None for one that is fixed; None fixes all
            shapes.
        rtol: largest difference of an output, relative to its largest magnitude. None: 1e-4 for float32 and float64,
            1e-2 for float16, 5e-2 for bfloat16 networks. Integer and boolean outputs must be equal. With
            ``quantize`` it is for the int8 file instead, where None allows any and only floats are held to it.
        opset: version of the ONNX operator set, 18 or later; None leaves it to torch.
        quantize: "int8", or None for the network's own dtype.
        calibration: for int8, inputs like those of use: as for ``tdfx.calibrate`` a tensor, tuple or dictionary of
            tensors, loader or other iterable of batches.
        samples: how many of them to use; None for all.
        evaluate: for int8, from a module, which ONNX Runtime computes, to a score: the report has both files'.
        float32: for int8, where the float32 file is kept as well.

    Returns:
        What was written, and how far its outputs are from the network's.

    Raises:
        OptionError: an option has a value that is not understood.
        InputError: the network does not run on the inputs, the path cannot be written, the calibration data cannot be
            read, or a network to quantize is not float32.
        ExportError: torch cannot export the network, or ONNX Runtime cannot run the file.
        VerificationError: ONNX Runtime's outputs differ from the network's, or are too small to tell.
    """
    check_dynamic(dynamic)
    _check_options(rtol, opset)
    copied = _eval_copy(module)
    signature, inputs = _bind(copied, example_inputs, example_kwargs)
    network = _with_tensors_alone(copied, signature)
    axes = _axes(dynamic, inputs)
    given = sizes(axes, inputs)
    # torch.export takes a size of 1 for a constant, hence traces 2; the second run must not repeat the traced size.
    traced = {name: max(size, 2) for name, size in given.items()}
    batch = given.get(BATCH, next((len(value) for value in inputs.values() if value.dim()), 1))
    _outputs(network, resized(axes, inputs, {}), batch, batch)
    other = other_sizes(axes, inputs, lambda values: network(*values.values()))
    if BATCH in given:
        other[BATCH] = traced[BATCH] + 1
    tried = [resized(axes, inputs, wanted) for wanted in ([given, other] if other else [given])]
    batch_sizes = (batch,) if BATCH not in given else (batch, other[BATCH])
    dtypes = {tensor.dtype for tensor in (*network.parameters(), *inputs.values()) if tensor.dtype in RTOL}
    check_quantize(quantize, calibration, samples, evaluate, dtypes)
    _check_float32(float32, path, quantize)
    default = max((RTOL[dtype] for dtype in dtypes), default=RTOL[torch.float32])
    allowed = default if rtol is None or quantize is not None else rtol
    hint = (
        "export the network in float32 (module.float(), inputs too): ONNX Runtime's CPU lacks other float types"
        if dtypes - {torch.float32}
        else "ask for another opset or write that operation differently"
    )
    sizes_run = [batch, other.get(BATCH, batch)]
    found = [_outputs(network, values, size, batch) for values, size in zip(tried, sizes_run, strict=False)]
    wanted = [list(outputs.values()) for outputs in found]
    names = _apart([*found[0]], inputs)
    with replacing(path) as final, ExitStack() as temporary:
        # Everything in the final file's folder gets a name; the float32 file of an int8 one must not.
        folder = temporary.enter_context(TemporaryDirectory()) if quantize is not None else final.parent
        staged = Path(folder) / (final if float32 is None else Path(os.fsdecode(float32))).name
        program = _export(network, resized(axes, inputs, traced), axes, opset)
        if quantize is None:  # ONNX Runtime has one scale for a matrix, and two where it is read in two ways
            share_matrices(program.model)
        _rename(program, [*inputs], names)
        _lower_ir_version(program)
        external = _save(program, staged)
        del program
        with failing_as("onnx.checker refuses the exported file", hint):
            onnx.checker.check_model(str(staged), full_check=True)
        written = _check_file(staged, axes, opset)
        with failing_as("ONNX Runtime cannot load the exported file", hint):
            session = ort.InferenceSession(str(staged), session_options(), providers=["CPUExecutionProvider"])
        runs = [
            compare(session, list(values.values()), outputs, allowed, hint)
            for values, outputs in zip(tried, wanted, strict=True)
        ]
        del session  # it holds the file open, which some systems do not let be renamed
        file_bytes = folder_bytes(staged.parent)
        quantization = None
        if quantize is not None:
            source = FloatFile(staged, external, list(inputs.values()), None if BATCH in given else batch)
            quantization = quantized(source, final, partial(_run, network), calibration, samples, rtol, evaluate)
            _keep(staged, float32)
    outputs = tuple(
        OutputParity(same[0].name, max(run.max_abs_diff for run in same), max(run.max_rel_diff for run in same))
        for same in zip(*runs, strict=True)
    )
    return ExportReport(
        path=os.fsdecode(path),
        opset=written,
        max_abs_diff=max(output.max_abs_diff for output in outputs),
        max_rel_diff=max(output.max_rel_diff for output in outputs),
        rtol=allowed,
        batch_sizes=batch_sizes,
        file_bytes=file_bytes,
        external_data=external,
        outputs=outputs,
        sizes={name: (size, other[name]) for name, size in given.items()},
        quantization=None if quantization is None else replace(quantization, path=os.fsdecode(path)),
    )


# --- before the export ---


def _check_options(rtol: object, opset: object) -> None:
    if opset is not None and (type(opset) is not int or opset < LEAST_OPSET):
        raise OptionError(f"opset is {opset!r}, expected an integer of {LEAST_OPSET} or more, or None")
    if rtol is not None and not (isinstance(rtol, (int, float)) and 0 <= rtol < 1):
        raise OptionError(f"rtol is {rtol!r}, expected a number from 0 to below 1, or None")


def _check_float32(float32: str | os.PathLike[str] | None, path: str | os.PathLike[str], quantize: str | None) -> None:
    if float32 is None:
        return
    if quantize is None:
        raise OptionError(f"float32 is {os.fsdecode(float32)!r}; without quantize the file at path is float32")
    if os.path.realpath(float32) == os.path.realpath(path):
        raise OptionError(f"float32 and path are both {os.fsdecode(path)!r}; choose two names")


def _eval_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode that shares the parameters; tracing may write to everything else."""
    if not isinstance(module, nn.Module):
        raise InputError(f"module has type {type(module).__name__}, expected a torch.nn.Module")
    with failing_as("the network cannot be copied", "remove what copy.deepcopy refuses"):
        return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()}).eval()


def _bind(network: nn.Module, example_inputs: object, example_kwargs: object) -> tuple[Signature, dict[str, Tensor]]:
    """The call, and its tensors by name in forward's order."""
    args, kwargs = as_call(example_inputs, example_kwargs)
    try:
        bound = inspect.signature(network.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"the example inputs do not fit the network's forward: {error}") from error
    signature, tensors = Signature.of(network.forward, bound.args, bound.kwargs)
    return signature, dict(zip(signature.names, tensors, strict=True))


def _with_tensors_alone(network: nn.Module, signature: Signature) -> nn.Module:
    """The network as what takes tensors, under the names of its inputs, and returns them."""

    def flattened(outputs: object) -> dict[str, Tensor]:
        leaves = {name: leaf for name, leaf in named_outputs(outputs).items() if leaf is not None}  # dropped in export
        for name, leaf in leaves.items():
            if not isinstance(leaf, Tensor):
                raise ExportError(f"output {name!r} of the network has type {type(leaf).__name__}; return tensors only")
        if not leaves:
            raise ExportError("the network returns no tensor; an ONNX file needs at least one output")
        return leaves

    return with_output(with_flat_call(network, signature), flattened)


def _axes(dynamic: Dynamic, inputs: Mapping[str, Tensor]) -> Axes:
    """Names of free dimensions; the batch is dimension 0 of all inputs for which nothing else is said."""
    axes = free_axes(dynamic, inputs)
    said = {} if isinstance(dynamic, str) or dynamic is None else dynamic
    alike = [value.shape[0] for name, value in inputs.items() if value.dim() and 0 not in said.get(name, {})]
    others = any(0 in dims for dims in said.values())
    if dynamic is not None and not (others and not alike) and (len(set(alike)) != 1 or 0 in alike):
        raise InputError(
            f"dimension 0 of the example inputs is {alike}, expected one batch size of at least 1 for all of them; "
            'pass such inputs, dynamic={"<input>": {0: None}} for one that has no batch, or dynamic=None for fixed '
            "shapes"
        )
    return axes


def _run(network: nn.Module, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The network's outputs on tensors in the order of its inputs."""
    size = next((value.shape[0] for value in tensors if value.dim()), 1)
    return list(_outputs(network, dict(enumerate(tensors)), size, size).values())


def _outputs(network: nn.Module, inputs: Mapping[Any, Tensor], size: int, batch: int) -> dict[str, Tensor]:
    """The network's outputs by name, which it may write into its inputs to compute."""
    try:
        with torch.no_grad(), plain_attention(), quiet():
            found: dict[str, Tensor] = network(*(value.clone() for value in inputs.values()))
    except ExportError:
        raise
    except Exception as error:
        fix = "pass other example inputs" if size == batch else "pass dynamic=None for a fixed batch size"
        raise InputError(f"the network does not run on a batch of {size}: {reason(error)}; {fix}") from error
    return found


# --- the export ---


def _export(network: nn.Module, inputs: Mapping[str, Tensor], axes: Axes, opset: int | None) -> torch.onnx.ONNXProgram:
    fix = "see torch.export's documentation on what forward may do"
    if axes:
        free = dict.fromkeys(name for dims in axes.values() for name in dims.values())
        fix += f", or fix {', '.join(free)} (dynamic=None fixes all shapes)"
    named = {name: torch.export.Dim(name) for dims in axes.values() for name in dims.values()}
    shapes = {name: {dim: named[text] for dim, text in axes.get(name, {}).items()} or None for name in inputs}
    with failing_as("torch.onnx.export cannot export the network", fix), plain_attention(), quiet():
        program = torch.onnx.export(
            network,
            tuple(inputs.values()),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            dynamic_shapes=shapes if axes else None,
        )
    assert program is not None  # only the older exporter gives None
    return program


def _lower_ir_version(program: torch.onnx.ONNXProgram) -> None:
    """Takes the oldest format of files that the operator set allows, so that runtimes of some years ago read it."""
    model = program.model
    if model.functions:  # what these may hold goes by the format
        return
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    model.ir_version = min(model.ir_version, onnx.helper.find_min_ir_version_for(imports, ignore_unknown=True))


def _apart(names: Sequence[str], taken: Collection[str]) -> list[str]:
    """Names of outputs, changed where an input has the same."""
    found: list[str] = []
    for name in names:
        while name in taken or name in found:
            name = f"output_{name}"
        found.append(name)
    return found


def _rename(program: torch.onnx.ONNXProgram, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Names the inputs and outputs; what else has one of these names takes another."""
    graph = program.model.graph
    wanted = [*zip(graph.inputs, inputs, strict=True), *zip(graph.outputs, outputs, strict=False)]
    values = [
        *graph.inputs,
        *graph.initializers.values(),
        *(value for node in graph.all_nodes() for value in node.outputs),
    ]
    taken = {*inputs, *outputs}
    for value in values:
        if value.name in taken:
            value.name = next(name for i in count(1) if (name := f"{value.name}_inner_{i}") not in taken)
            taken.add(value.name)
    for value, name in wanted:
        value.name = name


def _save(program: torch.onnx.ONNXProgram, path: Path) -> bool:
    """Write the model without its metadata; returns whether the weights needed a file of their own."""
    weights = [value.const_value for value in program.model.graph.initializers.values()]
    external = sum(weight.nbytes for weight in weights if weight is not None) >= MAX_WEIGHT_BYTES
    with failing_as("the ONNX file cannot be written", "make room, or choose another path"), quiet():
        model = program.model_proto
        _strip(model)
        onnx.save_model(model, path, save_as_external_data=external, location=f"{path.name}.data")
    return external


def _keep(staged: Path, path: str | os.PathLike[str] | None) -> None:
    """Copies a file, with its weights where they lie beside it, to its final name."""
    if path is None:
        return
    with replacing(path) as final:
        for source in (staged, staged.with_name(f"{staged.name}.data")):
            if source.exists():
                shutil.copyfile(source, final.with_name(source.name))


def _strip(message: Any) -> None:
    """Remove metadata and doc strings at every depth: they hold stack traces with source paths."""
    for entry, value in message.ListFields():
        if entry.name in ("metadata_props", "doc_string"):
            message.ClearField(entry.name)
        elif entry.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                _strip(part)


def _check_file(path: Path, axes: Axes, opset: int | None) -> int:
    """Read back what the exporter may have decided otherwise; returns the opset."""
    model = onnx.load(path, load_external_data=False)
    written = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset not in (None, written):
        raise ExportError(f"opset {opset} was asked for, but torch wrote {written}; ask for {written} or None")
    for value in model.graph.input:
        for dim, name in axes.get(value.name, {}).items():
            size = value.type.tensor_type.shape.dim[dim]
            if size.dim_param != name:
                what = "a batch of" if name == BATCH else f"{name} ="
                raise ExportError(
                    f"the network computes with {what} {size.dim_param or size.dim_value} only (input {value.name!r}, "
                    f"dimension {dim}); take that size from the input's shape in forward, or fix it (dynamic=None "
                    "fixes all shapes)"
                )
    return int(written)
