"""What the command line leaves behind: a folder with the network, its factors, its plan and a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safetensors.torch import save
from torch import Tensor, nn

from tdfx.errors import InputError
from tdfx.files import replacing, write_json, write_text
from tdfx.onnx_export import ExportReport, export_onnx
from tdfx.records.result import Result


@dataclass(frozen=True)
class Output:
    """Where the files of one result are written before all of them get their names.

    Attributes:
        folder: where they will lie.
        onnx: the network as ONNX file.
        tensors: its state dict as safetensors.
        plan: its plan as JSON.
        report: its report and that of the export as JSON.
    """

    folder: Path
    onnx: Path
    tensors: Path
    plan: Path
    report: Path

    def save(
        self, result: Result, args: Sequence[Tensor], kwargs: Mapping[str, Tensor], *, opset: int | None = None
    ) -> ExportReport:
        """Writes the four files.

        Raises:
            ExportError, InputError, VerificationError: as for ``export_onnx``.
        """
        export = export_onnx(result.module, self.onnx, args, kwargs, opset=opset)
        export = replace(export, path=str(self.folder / "model.onnx"))
        save_state_dict(result.module, self.tensors)
        write_text(self.plan, result.plan.to_json())
        write_json(self.report, {**asdict(result.report), "export": asdict(export)})
        return export


@contextmanager
def output_folder(folder: Path) -> Iterator[Output]:
    """Gives temporary names for the files of a result; they take their places when the block ends without an error.

    Writable or not is found out at once, before any long work. Other files in the folder stay as they are; on any
    error, an interrupt included, all of them do.

    Raises:
        InputError: the folder cannot be made or written to.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output folder {folder}: it is a file; name a folder, which is made where it is missing")
    with ExitStack() as staged:

        def stage(name: str) -> Path:
            return staged.enter_context(replacing(folder / name))

        yield Output(folder, stage("model.onnx"), stage("model.safetensors"), stage("plan.json"), stage("report.json"))


def save_state_dict(module: nn.Module, path: Path) -> None:
    """Writes a module's state dict as safetensors, tensors that share memory each on its own.

    Raises:
        InputError: the path cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    with replacing(path) as staged:
        try:
            staged.write_bytes(save(tensors))  # save_file makes files that only their owner can read
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}; make room, or choose another folder") from error
