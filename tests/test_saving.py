from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tdfx.errors import InputError
from tdfx.saving import Output, output_folder, save_state_dict


def write(output: Output) -> None:
    for path in (output.onnx, output.tensors, output.plan, output.report):
        path.write_text(path.name)


def test_files_appear_together(tmp_path: Path) -> None:
    with output_folder(tmp_path / "new" / "out") as output:
        write(output)
        assert not [name for name in os.listdir(output.folder) if not name.startswith(".")]
    names = ["model.onnx", "model.safetensors", "plan.json", "report.json"]
    assert sorted(os.listdir(tmp_path / "new" / "out")) == names
    assert all((output.folder / name).read_text() == name for name in names)


def test_nothing_changes_on_an_interrupt(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("older")
    with pytest.raises(KeyboardInterrupt), output_folder(tmp_path) as output:
        write(output)
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["plan.json"]
    assert (tmp_path / "plan.json").read_text() == "older"


def test_what_cannot_be_written_to_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "out" / "report.json").mkdir(parents=True)
    for folder, message in (("file", "it is a file; name a folder"), ("out", r"report.json.*it names a folder")):
        with pytest.raises(InputError, match=message), output_folder(tmp_path / folder):
            pytest.fail("the block ran")
    assert os.listdir(tmp_path / "out") == ["report.json"]


def test_a_linked_file_draws_no_others_along(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "out" / "model.onnx").symlink_to(tmp_path / "store" / "digits.onnx")
    with output_folder(tmp_path / "out") as output:
        write(output)
    assert os.listdir(tmp_path / "store") == ["digits.onnx"]
    assert len(os.listdir(tmp_path / "out")) == 4


def test_tied_and_transposed_weights_are_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5), nn.Linear(5, 3))
    model[1].weight = model[0].weight
    model[2].weight = nn.Parameter(torch.randn(5, 3).T)
    save_state_dict(model, tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


def test_saved_weights_are_as_readable_as_other_files(tmp_path: Path) -> None:
    save_state_dict(nn.Linear(1, 1), tmp_path / "model.safetensors")
    (tmp_path / "other").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_full_disk_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_bytes(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(InputError, match=r"model.safetensors: No space left on device; make room"):
        save_state_dict(nn.Linear(1, 1), tmp_path / "model.safetensors")
    assert os.listdir(tmp_path) == []
