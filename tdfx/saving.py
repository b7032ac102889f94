"""Saved results: a folder with a network's weights, its structure, its plan and a report, none of which can run code.

``plan.json`` and ``report.json`` are the records, ``model.safetensors`` is the state dict and ``structure.json`` the
graph of plain layers. The latter ties the files together: it holds versions and the hash of every other file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor, nn

from tdfx.errors import InputError, TdfxError
from tdfx.files import replacing, write_json, write_text
from tdfx.inputs import Inputs
from tdfx.loading import draw_inputs
from tdfx.onnx_export import ExportReport, export_onnx
from tdfx.records.plan import Plan
from tdfx.records.reading import parse, read
from tdfx.records.result import Report, Result
from tdfx.stages.apply import apply
from tdfx.stages.capture import Model
from tdfx.structure import decode_graph, encode_graph, named_tensors
from tdfx.version import VERSION as TDFX_VERSION

VERSION = 1
STRUCTURE, PLAN, REPORT = "structure.json", "plan.json", "report.json"
TENSORS, BUFFERS, ONNX = "model.safetensors", "buffers.safetensors", "model.onnx"
INT8_ONNX = "model.int8.onnx"
FILES = (TENSORS, PLAN, REPORT, STRUCTURE)


@dataclass(frozen=True)
class Manifest:
    """What ``structure.json`` holds.

    Attributes:
        version: of this format.
        tdfx: version that wrote it.
        torch: version of torch there.
        files: SHA-256 of the other files by name.
        reason: why there is no graph ("" if there is one).
        graph: the graph of plain layers as ``encode_graph`` gives it, or None.
        digest: SHA-256 of all of this.
    """

    version: int
    tdfx: str
    torch: str
    files: dict[str, str]
    reason: str
    graph: Any
    digest: str = ""

    def signed(self) -> Manifest:
        """With the digest of the rest."""
        text = json.dumps(asdict(replace(self, digest="")), sort_keys=True)
        return replace(self, digest=_digest(text.encode()))


@dataclass(frozen=True)
class Output:
    """Where the files of one result are written before all of them get their names.

    Attributes:
        folder: where they will lie.
        stage: temporary path of a file by its name.
    """

    folder: Path
    stage: Callable[[str], Path]

    def save(
        self, result: Result, args: Sequence[Tensor], kwargs: Mapping[str, Tensor], *, opset: int | None = None
    ) -> ExportReport:
        """Writes the files of a result, and the network as ``model.onnx``.

        Raises:
            ExportError, InputError, VerificationError: as for ``export_onnx``.
        """
        export = export_onnx(result.module, self.stage(ONNX), args, kwargs, opset=opset)
        export = replace(export, path=str(self.folder / ONNX))
        self.save_result(result, export)
        return export

    def save_result(self, result: Result, export: ExportReport | None = None) -> None:
        """Writes the files of a result; the report also holds that of the export, if there was one.

        Raises:
            InputError: the files cannot be written.
        """
        graph, reason = None, ""
        try:
            graph = encode_graph(result.module)
        except InputError as error:
            reason = str(error)
        write_text(self.stage(PLAN), result.plan.to_json())
        report = {"export": asdict(export)} if export is not None else {}
        write_json(self.stage(REPORT), {**asdict(result.report), **report})
        names = [TENSORS, PLAN, REPORT]
        save_state_dict(result.module, self.stage(TENSORS))
        outside = _outside_state_dict(result.module)
        if outside and graph is not None:
            save_tensors(outside, self.stage(BUFFERS))
            names.append(BUFFERS)
        files = {name: _digest(self.stage(name).read_bytes()) for name in names}
        manifest = Manifest(VERSION, TDFX_VERSION, torch.__version__, files, reason, graph)
        write_text(self.stage(STRUCTURE), json.dumps(asdict(manifest.signed()), allow_nan=False) + "\n")


@contextmanager
def output_folder(folder: Path, names: Sequence[str] = (ONNX, *FILES)) -> Iterator[Output]:
    """Gives temporary names for the files of a result; they take their places when the block ends without an error.

    Writable or not is found out at once, before any long work. Other files in the folder stay as they are; on any
    error, an interrupt included, all of them do.

    Args:
        folder: where they will lie; made where it is missing.
        names: files that the block will write; it may stage more.

    Raises:
        InputError: the folder cannot be made or written to.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output folder {folder}: it is a file; name a folder, which is made where it is missing")
    with ExitStack() as staged:
        paths: dict[str, Path] = {}

        def stage(name: str) -> Path:
            if name not in paths:
                paths[name] = staged.enter_context(replacing(folder / name, optional=name in (ONNX, INT8_ONNX)))
            return paths[name]

        for name in names:
            stage(name)
        yield Output(folder, stage)


def save(result: Result, folder: str | os.PathLike[str]) -> None:
    """Saves a result so that ``load`` gives it back, all files or none.

    The network is saved as the graph of its layers where all of them, and all functions between them, are torch's
    own; otherwise as weights and plan only, which ``load`` puts into the model it is given.

    Args:
        result: what ``compress``, ``apply`` or ``load`` returned; its module may have been trained since.
        folder: made where it is missing; files of an older result in it are replaced.

    Raises:
        InputError: the folder cannot be written, or a tensor is of a dtype that safetensors does not know.
    """
    with output_folder(Path(folder), FILES) as output:
        output.save_result(result)


def load(
    folder: str | os.PathLike[str],
    model: Model | None = None,
    example_inputs: Inputs | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Result:
    """Loads a result that ``save`` or the command line wrote. Files are checked and no code in them is run.

    Args:
        folder: the folder.
        model: the model that was compressed, with any weights; only for a result saved without its structure.
        example_inputs: with a model, those that it was compressed with; None draws tensors of their shapes, which does
            where what ``forward`` does depends on neither their values nor containers and constants among them.
        example_kwargs: keyword arguments, likewise.

    Returns:
        The result as saved, its tensors in main memory.

    Raises:
        InputError: a file is missing, damaged, of another result or version, or holds what ``save`` does not write;
            or the structure was not saved and no model is given.
        PlanError, CaptureError, VerificationError: the model is not the one that was compressed, or does something else
            on these inputs, as for ``apply``.
    """
    root = Path(folder)
    manifest = _manifest(root)
    contents = {name: _content(root, name, digest) for name, digest in manifest.files.items()}
    plan, report = _record(Plan, root / PLAN, contents[PLAN]), _record(Report, root / REPORT, contents[REPORT])
    tensors = _tensors(root / TENSORS, contents[TENSORS])
    if manifest.graph is not None:
        if BUFFERS in contents:
            tensors = {**_tensors(root / BUFFERS, contents[BUFFERS]), **tensors}
        module: nn.Module = _graph(root / STRUCTURE, manifest, tensors)
    elif model is None:
        raise InputError(
            f"{root} holds weights and plan but no structure ({manifest.reason}); load it with model=, the model "
            "that was compressed"
        )
    elif example_inputs is not None or example_kwargs is not None:
        module = apply(model, example_inputs, plan, example_kwargs=example_kwargs, factors=tensors).module
    else:
        args, kwargs = draw_inputs(report.inputs)
        try:
            module = apply(model, args, plan, example_kwargs=kwargs, factors=tensors).module
        except TdfxError as error:
            raise type(error)(f"{error}. {DRAWN}") from error
    return Result(module, plan, report.before, report.after, report.skipped, report)


DRAWN = (
    "The inputs were drawn by their shapes; if forward depends on values, containers or constants, pass those that the "
    "model was compressed with: tdfx.load(folder, model, example_inputs, example_kwargs)"
)


def save_state_dict(module: nn.Module, path: Path) -> None:
    """Writes a module's state dict as safetensors, tensors that share memory each on its own.

    Raises:
        InputError: the path cannot be written, or an entry is no tensor that safetensors can hold.
    """
    save_tensors(module.state_dict(), path)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes tensors as safetensors, those that share memory each on its own.

    Raises:
        InputError: the path cannot be written, or an entry is no tensor that safetensors can hold.
    """
    strange = [
        f"{name} is a {type(value).__name__}" for name, value in tensors.items() if not isinstance(value, Tensor)
    ]
    if strange:
        raise InputError(f"cannot write {path}: {', '.join(strange)}; expected tensors only")
    sparse = [f"{name} is of layout {value.layout}" for name, value in tensors.items() if value.layout != torch.strided]
    if sparse:
        raise InputError(
            f"cannot write {path}: {', '.join(sparse)}, which safetensors does not hold; make it an input of forward, "
            "or pickle the result"
        )
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as staged:
        try:
            staged.write_bytes(safetensors.save(copies))  # save_file makes files that only their owner can read
        except KeyError as error:
            raise InputError(f"cannot write {path}: safetensors has no {error}; use another dtype") from error
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}; make room, or choose another folder") from error


def _outside_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that are part of the function but not of the state dict."""
    kept = module.state_dict()
    return {name: tensor for name, tensor in named_tensors(module).items() if name not in kept}


def _manifest(root: Path) -> Manifest:
    path = root / STRUCTURE
    values = parse(_text(path, _bytes(path)), str(path), InputError)
    version = values.get("version")
    if type(version) is not int or version != VERSION:
        raise InputError(
            f"{path} has version {version!r}; this tdfx reads version {VERSION}: save the result anew, or install the "
            "tdfx that wrote it"
        )
    manifest = read(Manifest, values, str(path), InputError)
    if manifest.digest != manifest.signed().digest:
        raise InputError(f"{path} was changed after it was saved; save the result anew")
    if not {TENSORS, PLAN, REPORT} <= manifest.files.keys() <= {TENSORS, PLAN, REPORT, BUFFERS}:
        raise InputError(f"{path} lists the files {', '.join(manifest.files)}; expected {TENSORS}, {PLAN} and {REPORT}")
    if _release(manifest.torch) > _release(torch.__version__):
        raise InputError(
            f"{path} was written with torch {manifest.torch}; this is torch {torch.__version__}, which may not have "
            "all of its operators: install that torch or a later one"
        )
    return manifest


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _content(root: Path, name: str, digest: str) -> bytes:
    content = _bytes(root / name)
    if _digest(content) != digest:
        raise InputError(
            f"{root / name} does not belong to {root / STRUCTURE}: it was changed, cut short or comes from another "
            "result; put the file back that was saved with it, or save the result anew"
        )
    return content


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}; expected a folder that tdfx.save wrote, with {', '.join(FILES)}"
        ) from error


def _text(path: Path, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text: {error}; save the result anew") from error


def _record(record: type[Any], path: Path, content: bytes) -> Any:
    try:
        return record.from_json(_text(path, content))
    except TdfxError as error:
        raise InputError(f"{path}: {error}") from error


def _tensors(path: Path, content: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.load(content)
    except Exception as error:  # safetensors has an error of its own, and asserts and looks up besides
        raise InputError(f"{path} is no safetensors file: {type(error).__name__}: {error}") from error


def _graph(path: Path, manifest: Manifest, tensors: Mapping[str, Tensor]) -> nn.Module:
    try:
        return decode_graph(manifest.graph, tensors)
    except InputError as error:
        raise InputError(
            f"{path}: {error} (written by tdfx {manifest.tdfx} with torch {manifest.torch}, read by tdfx "
            f"{TDFX_VERSION} with torch {torch.__version__})"
        ) from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
