"""Exported programs from files: what is read and what is refused before anything of it runs."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import build
from torch.export import Dim

from tdfx.errors import InputError
from tdfx.pt2 import load_program


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, args = build("vgg")
    path = tmp_path_factory.mktemp("pt2") / "vgg.pt2"
    torch.export.save(torch.export.export(model, args, dynamic_shapes=({0: Dim.DYNAMIC},)), path)
    return path


def edited(
    saved: Path, folder: Path, edit: Callable[[str, bytes], bytes], added: dict[str, bytes] | None = None
) -> Path:
    """A copy of the file with entries changed or added."""
    path = folder / "edited.pt2"
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, edit(name, source.read(name)))
        for name, content in (added or {}).items():
            target.writestr(f"{source.namelist()[0].split('/')[0]}/{name}", content)
    return path


class Touch:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_program_computes_what_the_model_does(saved: Path) -> None:
    model, args = build("vgg")
    program = load_program(saved)
    torch.testing.assert_close(program.module()(*args), model(*args), rtol=0, atol=0)
    assert program.state_dict.keys() == model.state_dict().keys()


def in_model(change: Callable[[dict[str, Any]], None]) -> Callable[[str, bytes], bytes]:
    def edit(name: str, content: bytes) -> bytes:
        if not name.endswith("/model.json"):
            return content
        value = json.loads(content)
        change(value)
        return json.dumps(value).encode()

    return edit


def with_target(target: str) -> Callable[[dict[str, Any]], None]:
    return lambda value: value["graph_module"]["graph"]["nodes"][0].update(target=target)


def with_size(expression: str) -> Callable[[dict[str, Any]], None]:
    def change(value: dict[str, Any]) -> None:
        value["graph_module"]["graph"]["sym_int_values"]["s0"] = {"as_expr": {"expr_str": expression, "hint": None}}

    return change


@pytest.mark.parametrize("target", ["torch.hub.load", "os.system", "torch.ops.load_library", "torch.ops.aten.relu;x"])
def test_other_calls_than_operators_are_refused(saved: Path, tmp_path: Path, target: str) -> None:
    path = edited(saved, tmp_path, in_model(with_target(target)))
    with pytest.raises(InputError, match=rf"edited.pt2: refused, .*it calls '{target}'"):
        load_program(path)


@pytest.mark.parametrize(
    "expression", ["__import__('os').system('touch x')", "exit()", "Symbol(s0.__class__)", "lambda: 1"]
)
def test_other_sizes_than_arithmetic_are_refused(saved: Path, tmp_path: Path, expression: str) -> None:
    path = edited(saved, tmp_path, in_model(with_size(expression)))
    with pytest.raises(InputError, match=r"refused, since reading it could run code .a size is"):
        load_program(path)


def test_pickled_weights_are_refused(saved: Path, tmp_path: Path) -> None:
    def edit(name: str, content: bytes) -> bytes:
        return content.replace(b'"use_pickle": false', b'"use_pickle": true')

    with pytest.raises(InputError, match="it asks for pickle"):
        load_program(edited(saved, tmp_path, edit))


def test_example_inputs_that_run_code_are_refused(saved: Path, tmp_path: Path) -> None:
    trap = io.BytesIO()
    torch.save(Touch(tmp_path / "touched"), trap)

    def edit(name: str, content: bytes) -> bytes:
        return trap.getvalue() if name.endswith("/model.pt") else content

    with pytest.raises(InputError, match="its example inputs are no plain tensors"):
        load_program(edited(saved, tmp_path, edit))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "name", ["data/aotinductor/model/lib.so", "data/constants/custom_obj_0/evil", "serialized_state_dict.pt"]
)
def test_other_contents_are_refused(saved: Path, tmp_path: Path, name: str) -> None:
    path = edited(saved, tmp_path, lambda _, content: content, {name: pickle.dumps(Touch(tmp_path / "touched"))})
    with pytest.raises(InputError, match=r"refused, since reading it could run code .it holds '"):
        load_program(path)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("length", [0, 10, 1000, -100])
def test_broken_files_are_refused(saved: Path, tmp_path: Path, length: int) -> None:
    path = tmp_path / "broken.pt2"
    path.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(InputError, match=r"broken\.pt2: (cannot be read|refused)"):
        load_program(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.pt2: there is no such file"):
        load_program(tmp_path / "none.pt2")
