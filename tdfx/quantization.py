"""A float32 ONNX file in int8, by onnxruntime.quantization, and how far its outputs moved."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from tdfx.contained import failing_as, quiet
from tdfx.data import Batch, fitted
from tdfx.equalization import Feed, channel_ranges, equalize, pairs
from tdfx.errors import InputError, OptionError, VerificationError
from tdfx.evaluation import Evaluate, check_evaluate, score
from tdfx.latency import runner
from tdfx.onnx_module import OnnxModule
from tdfx.parity import TINY, differences, session_options
from tdfx.records.latency import Runtime
from tdfx.records.reading import Signed
from tdfx.replay import Replay

INT8 = "int8"
FAILED = "onnxruntime cannot quantize the network"
WEIGHTS: dict[str, Any] = {"per_channel": True, "weight_type": QuantType.QInt8, "reduce_range": True}
"""Of seven bits: sums of two products of eight bits each do not fit the 16 bits that x86 without VNNI adds them in."""
BATCH = 32  # samples in a batch, of data that come in one piece
HINT = "export it without quantize, and quantize the float32 file with other settings"
NOTHING = "nothing was quantized: no weight, as of Conv, Gemm or MatMul, became int8; take the float32 file"
Sizes = Sequence[int | None]


@dataclass(frozen=True)
class QuantizedOutput:
    """How far one output of the int8 file is from the network's.

    Attributes:
        name: the output's name in the file.
        max_rel_diff: largest absolute difference divided by the largest magnitude of the network's output.
        rel_l2_diff: Euclidean norm of the difference divided by that of the network's output.
    """

    name: str
    max_rel_diff: float
    rel_l2_diff: float


@dataclass(frozen=True)
class Quantization:
    """An int8 file.

    Attributes:
        path: the file, as given.
        file_bytes: size on disk, external weights included.
        calibrated: samples that the ranges of tensors were found on; 0: found anew in every run ("dynamic").
        compared: samples that the outputs were compared on: the first batch of the calibration data, or the example.
        equalized: tensors between linear operators, as in chains of factors, whose channels were given alike ranges.
        max_rel_diff: the largest of the outputs.
        rtol: the most that was allowed for floating-point outputs; None: any.
        outputs: one record per output.
        speed: median of the float32 file's seconds over this one's, both run in turn in ONNX Runtime on the example
            inputs, one thread.
        speed_quartiles: lower and upper quartile of the same.
        scores: what ``evaluate`` says of the float32 file and of this one; None if it was not given.
        notes: what the user should know.
    """

    path: str
    file_bytes: int
    calibrated: int
    compared: int
    equalized: int
    max_rel_diff: float
    rtol: float | None
    outputs: tuple[QuantizedOutput, ...]
    speed: float
    speed_quartiles: tuple[float, ...]
    scores: tuple[Signed, ...] | None
    notes: tuple[str, ...] = ()


@dataclass(eq=False)
class Calibration:
    """Calibration data as inputs of an ONNX file, read as often as needed.

    Attributes:
        replay: the data.
        sizes: of the dimensions of the file's inputs, by name in their order; None for those that are open.
        example: a tensor for each.
        batch: the only batch size that the file takes, None if it takes any; other batches are left out.
        samples: how many there are, once they have been read.
        first: the inputs of the first batch, likewise.
        failure: what reading them has ended with, None if it went well.
    """

    replay: Replay
    sizes: Mapping[str, Sizes]
    example: Sequence[Tensor]
    batch: int | None
    samples: int = 0
    first: list[Tensor] = field(default_factory=list)
    failure: Exception | None = None

    def feeds(self) -> Iterator[Feed]:
        """The batches.

        Raises:
            InputError: the data cannot be read or do not fit, or there is none of the file's batch size.
        """
        try:
            yield from self._feeds()
        except Exception as error:
            self.failure = error
            raise

    def _feeds(self) -> Iterator[Feed]:
        names = list(self.sizes)
        self.samples = 0
        for batch in self.replay.read():
            if self.batch not in (None, batch.samples):
                continue
            inputs = self._cast(fitted(batch, names, self.example))
            self._check(batch.index, inputs)
            self.first = self.first or inputs
            self.samples += batch.samples
            yield {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        if not self.samples:
            raise InputError(f"the calibration data hold no batch of {self.batch}, the only size that the file takes")

    def _check(self, index: int, inputs: Sequence[Tensor]) -> None:
        for (name, sizes), value in zip(self.sizes.items(), inputs, strict=True):
            if any(size not in (None, found) for size, found in zip(sizes, value.shape, strict=True)):
                wanted = "x".join("any" if size is None else str(size) for size in sizes)
                raise InputError(
                    f"batch {index} of the calibration data: input {name} is {'x'.join(map(str, value.shape))}, the "
                    f"file takes {wanted}, as the example inputs were; give data or example inputs of the other's shape"
                )

    def _cast(self, batch: Batch) -> list[Tensor]:
        values = zip(batch.inputs, self.example, strict=True)
        return [value.detach().cpu().to(wanted.dtype).contiguous() for value, wanted in values]


@dataclass(frozen=True, eq=False)
class FloatFile:
    """A float32 file that was verified.

    Attributes:
        path: where it lies; other files may be written beside it.
        external: whether its weights lie in a file of their own, for their size.
        example: a tensor for each of its inputs, in their order.
        batch: the only batch size that it takes, None if it takes any.
    """

    path: Path
    external: bool
    example: Sequence[Tensor]
    batch: int | None


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Feeds as onnxruntime asks for them."""

    def __init__(self, feeds: Iterator[Feed]) -> None:
        self.feeds = feeds

    def get_next(self) -> Feed | None:
        return next(self.feeds, None)


def check_quantize(
    quantize: object, calibration: object, samples: object, evaluate: object, dtypes: Collection[torch.dtype]
) -> None:
    """Refuse options that are not understood, and networks of other floats than float32.

    Args:
        quantize: None or "int8".
        calibration: data or None.
        samples: a positive integer or None.
        evaluate: a function or None.
        dtypes: floating-point types of the network's parameters and inputs.

    Raises:
        OptionError, InputError: naming the option or type.
    """
    if quantize not in (None, INT8):
        raise OptionError(f"quantize is {quantize!r}; expected {INT8!r} or None")
    for name, value in (("calibration", calibration), ("samples", samples), ("evaluate", evaluate)):
        if value is not None and quantize is None:
            raise OptionError(f"{name} is given without quantize; pass quantize={INT8!r} too, or leave it out")
    if samples is not None and (calibration is None or type(samples) is not int or samples < 1):
        raise OptionError(f"samples is {samples!r}; expected a positive integer, with calibration data, or None")
    if evaluate is not None:
        check_evaluate(evaluate)
    others = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes} - {"float32"})
    if quantize is not None and others:
        raise InputError(
            f"quantize={quantize!r} takes a float32 network; this one or its inputs are {', '.join(others)}: pass "
            "module.float() and inputs in float32"
        )


def quantized(
    source: FloatFile,
    target: Path,
    network: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    calibration: object,
    samples: int | None,
    rtol: float | None,
    evaluate: Evaluate | None = None,
) -> Quantization:
    """Write a float32 file in int8 and compare its outputs with the network's.

    Args:
        source: the float32 file.
        target: the file to write, in a folder of its own.
        network: from tensors for the file's inputs to the network's outputs.
        calibration: data as ``tdfx.data.batches`` takes it, or None.
        samples: how many of them to use; None for all.
        rtol: largest difference of a floating-point output, relative to its largest magnitude; None allows any.
        evaluate: gives both files' scores.

    Raises:
        ExportError: onnxruntime fails.
        OptionError: ``evaluate`` returns no finite number.
        InputError: the data cannot be read.
        VerificationError: an output differs by more than ``rtol``.
    """
    inputs, calibrated, equalized = source.example, 0, 0
    prepared = _prepared(source)
    if calibration is None:
        with failing_as(FAILED, HINT), quiet():
            quantize_dynamic(str(prepared), str(target), use_external_data_format=source.external, **WEIGHTS)
    else:
        sizes = _input_sizes(source.path)
        replay = Replay(calibration, list(sizes), batch_size=source.batch or BATCH, samples=samples, with_labels=False)
        replay.keep_in(source.path.parent)
        data = Calibration(replay, sizes, source.example, source.batch)
        with _failing(data):
            equalized = _equalize(prepared, data, external=source.external)
            with quiet():
                quantize_static(
                    str(prepared),
                    str(target),
                    _Reader(data.feeds()),
                    quant_format=QuantFormat.QDQ,
                    activation_type=QuantType.QUInt8,  # int8 activations run at half the speed on x86
                    use_external_data_format=source.external,
                    **WEIGHTS,
                )
        inputs, calibrated = data.first, data.samples
    with failing_as("ONNX Runtime cannot load the int8 file", HINT):
        session = ort.InferenceSession(str(target), session_options(), providers=["CPUExecutionProvider"])
    outputs = _differences(session, inputs, network(inputs), rtol)
    files = source.path, target
    feed = {value.name: t.cpu().numpy() for value, t in zip(session.get_inputs(), source.example, strict=True)}
    with failing_as("ONNX Runtime cannot run the int8 file on the example inputs", HINT):
        before, after = runner.network_times(list(map(str, files)), Runtime().as_dict(), feed)
    lower, speed, upper = quantiles([a / b for a, b in zip(before, after, strict=True)], n=4)
    return Quantization(
        path=str(target),
        file_bytes=folder_bytes(target.parent),
        calibrated=calibrated,
        compared=len(inputs[0]) if inputs and inputs[0].dim() else 1,
        equalized=equalized,
        max_rel_diff=max(output.max_rel_diff for output in outputs),
        rtol=rtol,
        outputs=outputs,
        speed=speed,
        speed_quartiles=(lower, upper),
        scores=None if evaluate is None else tuple(score(evaluate, OnnxModule(path)) for path in files),
        notes=() if _holds_int8(target) else (NOTHING,),
    )


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(part.stat().st_size for part in folder.iterdir())


@contextmanager
def _failing(data: Calibration) -> Iterator[None]:
    """Failures come as an ExportError, but those of reading the data as they are."""
    try:
        yield
    except Exception:
        if data.failure is not None:
            raise
        with failing_as(FAILED, HINT):
            raise


def _input_sizes(path: Path) -> dict[str, Sizes]:
    inputs = onnx.load(str(path), load_external_data=False).graph.input
    return {value.name: [dim.dim_value or None for dim in value.type.tensor_type.shape.dim] for value in inputs}


def _holds_int8(path: Path) -> bool:
    """Whether a file has weights of 8 bits; zero points, which every quantized tensor has, have no two dimensions."""
    kinds = onnx.TensorProto.INT8, onnx.TensorProto.UINT8
    weights = onnx.load(str(path), load_external_data=False).graph.initializer
    return any(weight.data_type in kinds and len(weight.dims) > 1 for weight in weights)


def _prepared(source: FloatFile) -> Path:
    """The file with constants folded and shapes inferred, beside it."""
    prepared = source.path.with_name("prepared.onnx")
    with failing_as("onnxruntime cannot prepare the network for int8", HINT), quiet():
        quant_pre_process(
            str(source.path),
            str(prepared),
            skip_symbolic_shape=True,
            save_as_external_data=source.external,
            external_data_location=f"{prepared.name}.data",
        )
        model = onnx.load(str(prepared))
        # quantize_dynamic transposes weights of Gemm and leaves their old shapes here, which onnx then refuses.
        model.graph.ClearField("value_info")
        _save(model, prepared, external=source.external)
    return prepared


def _save(model: onnx.ModelProto, path: Path, *, external: bool) -> None:
    onnx.save_model(model, str(path), save_as_external_data=external, location=f"{path.name}.data")


def _equalize(path: Path, data: Calibration, *, external: bool) -> int:
    """Equalizes channels in a file; returns of how many tensors."""
    model = onnx.load(str(path))
    found = pairs(model)
    ranges = channel_ranges(model, found, data.feeds(), path.with_name("ranges.onnx"), external=external)
    equalize(model, found, ranges)
    _save(model, path, external=external)
    return len(found)


def _differences(
    session: Any, inputs: Sequence[Tensor], wanted: Sequence[Tensor], rtol: float | None
) -> tuple[QuantizedOutput, ...]:
    """How far an int8 file's outputs are from the network's, on inputs in the order of the file's.

    Raises:
        ExportError: ONNX Runtime cannot run the file.
        VerificationError: an output holds NaN or Inf, or a floating-point one differs by more than ``rtol``.
    """
    names = [value.name for value in session.get_inputs()]
    with failing_as("ONNX Runtime cannot run the int8 file", HINT):
        found = session.run(None, {name: value.cpu().numpy() for name, value in zip(names, inputs, strict=True)})
    outputs = zip((value.name for value in session.get_outputs()), wanted, found, strict=True)
    return tuple(_difference(name, a.cpu(), torch.from_numpy(np.asarray(b)), rtol) for name, a, b in outputs)


def _difference(name: str, wanted: Tensor, found: Tensor, rtol: float | None) -> QuantizedOutput:
    if not found.isfinite().all():
        raise VerificationError(f"output {name!r} of the int8 file holds NaN or Inf; {HINT}")
    largest, relative = differences(wanted, found)
    if rtol is not None and wanted.is_floating_point() and relative > rtol:
        raise VerificationError(
            f"output {name!r} of the int8 file differs from the network's by {relative:.3g} of its largest magnitude "
            f"(allowed: {rtol:g}); no file was written: calibrate on more data like that of use, or allow more",
            max_abs_diff=largest,
            max_rel_diff=relative,
        )
    a, b = wanted.double(), found.double()
    norm = float(torch.linalg.vector_norm(b - a)) / max(float(torch.linalg.vector_norm(a)), TINY)
    return QuantizedOutput(name, relative, norm)
