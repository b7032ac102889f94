from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tdfx.errors import InputError
from tdfx.loading import DTYPES, draw_inputs, example_inputs, load_model, load_weights
from tdfx.records.inputs import InputSpec

SOURCE = """
from __future__ import annotations
import sys
from dataclasses import dataclass
from torch import nn

@dataclass
class Options:
    width: int = 3

class Zoo:
    net = nn.Linear(2, Options().width)

def make(): return nn.Linear(2, 3)
def fail(): raise ValueError("no such width\\nsecond line")
def leave(): sys.exit(4)
def number(): return 7
def needs(width): return nn.Linear(2, width)
constant = 7
"""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in the current folder, with model files beside it; its name is one that no import has cached."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("zoo.py").write_text(SOURCE)
    Path("broken.py").write_text("import not_installed_anywhere")
    Path("script.py").write_text("raise SystemExit(0)")
    package = tmp_path / f"pack_{os.urandom(4).hex()}"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nets.py").write_text(SOURCE)
    (package / "broken.py").write_text("from . import missing_part\nimport not_installed_anywhere")
    return package


@pytest.mark.parametrize("attribute", ["make", "Zoo.net"])
def test_models_come_from_files_and_packages(package: Path, attribute: str) -> None:
    for source in ("zoo.py", str(Path("zoo.py").resolve()), f"{package.name}.nets"):
        model = load_model(f"{source}:{attribute}")
        assert isinstance(model, nn.Linear)
        assert model.weight.shape == (3, 2)


def test_a_model_file_finds_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "tdfx_test_neighbour.py").write_text(SOURCE)
    (tmp_path / "sub" / "main.py").write_text("from tdfx_test_neighbour import make")
    assert isinstance(load_model("sub/main.py:make"), nn.Linear)


def test_a_model_file_shadows_no_module(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("from torch import nn\ndef make(): return nn.Linear(1, 1)")
    assert isinstance(load_model("torch.py:make"), nn.Linear)
    assert sys.modules["torch"] is torch


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zoo.py", "with a colon"),
        (":make", "with a colon"),
        ("zoo.py:", "with a colon"),
        ("lost.py:make", "there is no file lost.py"),
        ("lost_package.nets:make", "no module 'lost_package' is installed"),
        ("PACKAGE.lost:make", r"no module 'pack_\w+\.lost' is installed"),
        ("zoo.py:mak", "zoo.py has no 'mak'; did you mean 'make'"),
        ("zoo.py:xyz", "zoo.py has no 'xyz'$"),
        ("zoo.py:Zoo.other", "has no 'Zoo.other'"),
        ("zoo.py:fail", r"calling fail\(\) raised ValueError: no such width$"),
        ("zoo.py:leave", r"calling leave\(\) raised SystemExit: 4"),
        ("zoo.py:needs", "raised TypeError: .*width"),
        ("zoo.py:number", r"number\(\) returned a int; expected a torch.nn.Module"),
        ("zoo.py:constant", "found a int; expected a function or model"),
        ("broken.py:make", "importing broken.py raised ModuleNotFoundError: .*not_installed_anywhere"),
        ("script.py:make", "importing script.py raised SystemExit: 0"),
        ("PACKAGE.broken:make", r"importing pack_\w+\.broken raised ImportError"),
        ("..zoo:make", r"importing \.\.zoo raised TypeError"),
    ],
)
def test_models_that_cannot_be_had(package: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(name.replace("PACKAGE", package.name))


def test_an_interrupt_in_a_factory_is_one(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("def make(): raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_model("slow.py:make")


def test_weights_of_both_formats(tmp_path: Path) -> None:
    wanted = nn.Linear(3, 2).state_dict()
    torch.save(wanted, tmp_path / "w.pt")
    save_file(wanted, tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        model = nn.Linear(3, 2)
        load_weights(model, tmp_path / name)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in wanted.items())


class Run:
    """A pickle of this runs code when it is read."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch was_run",)


def half_a_file(path: Path) -> None:
    torch.save({"weight": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("w.pt", lambda path: None, "there is no such file"),
        ("w.pt", Path.mkdir, "there is no such file"),
        ("w.pt", Path.touch, "cannot be read .*EOFError.*; expected a state dict"),
        ("w.pt", half_a_file, "cannot be read"),
        ("w.safetensors", lambda path: path.write_bytes(b"junk" * 9), "cannot be read .SafetensorError"),
        ("w.pt", lambda path: torch.save({"weight": Run()}, path), "refused.*could run code .it holds .*system"),
        ("w.pt", lambda path: torch.save(nn.Linear(3, 2), path), "refused.*could run code .it holds .*Linear"),
        ("w.pt", lambda path: path.write_bytes(pickle.dumps({"a": 1})), "refused.*holds other things than tensors"),
        ("w.pt", lambda path: torch.save([1], path), "found a list; expected a state dict"),
        ("w.pt", lambda path: torch.save({"epoch": 1, "net": {}}, path), "checkpoint with dictionaries in it .net"),
        ("w.pt", lambda path: torch.save({"weight": torch.ones(2, 3)}, path), "missing are bias$"),
        (
            "w.pt",
            lambda path: torch.save({f"{key}{n}": torch.ones(1) for key in "ab" for n in range(3)}, path),
            "missing are weight, bias; unexpected are a0, a1, a2 and 3 more",
        ),
        (
            "w.pt",
            lambda path: torch.save({"weight": torch.ones(5, 3), "bias": torch.ones(2)}, path),
            "of another model: size mismatch for weight",
        ),
    ],
)
def test_weights_that_cannot_be_used(tmp_path: Path, name: str, write: Callable[[Path], object], message: str) -> None:
    write(tmp_path / name)
    with pytest.raises(InputError, match=message) as caught:
        load_weights(nn.Linear(3, 2), tmp_path / name)
    assert "\n" not in str(caught.value)
    assert not Path("was_run").exists()


def test_example_inputs() -> None:
    args, kwargs = example_inputs(["2x3x4x4", "5:float16", "ids=2x16:int64", "mask=2x16:bool"])
    assert [value.shape for value in args] == [(2, 3, 4, 4), (5,)]
    assert [value.dtype for value in args] == [torch.float32, torch.float16]
    assert list(kwargs) == ["ids", "mask"]
    assert kwargs["ids"].dtype == torch.int64
    assert set(kwargs["ids"].flatten().tolist()) == {0, 1}
    assert kwargs["mask"].dtype == torch.bool
    assert abs(float(args[0].std()) - 1) < 0.3


def test_example_inputs_are_seeded_and_differ() -> None:
    one, two = (example_inputs(["2x8", "2x8"], seed)[0] for seed in (0, 0))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], example_inputs(["2x8"], 1)[0][0])


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_can_be_asked_for(name: str) -> None:
    assert example_inputs([f"2:{name}"])[0][0].dtype == getattr(torch, name)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([""], "not understood; expected sizes joined by x"),
        (["1,3,8"], "'1,3,8' is not understood"),
        (["1x0x8"], "not understood"),
        (["1x3x"], "not understood"),
        (["2x3:float8"], "not understood.*dtypes: float32"),
        (["2x3:"], "not understood"),
        (["=2x3"], "not understood"),
        (["a b=2x3"], "not understood"),
        (["x=2x3", "x=2x4"], "x is given twice"),
        (["99999999999x99999999"], "no room for a tensor of this shape"),
        (["9" * 30], "no room for a tensor of this shape"),
    ],
)
def test_inputs_that_are_not_understood(texts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        example_inputs(texts)


@pytest.mark.parametrize("state", [{0: torch.zeros(2)}, {"weight": "text"}])
def test_entries_that_are_no_named_tensors_are_refused(tmp_path: Path, state: dict[object, object]) -> None:
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(InputError, match="found entries that are no named tensors"):
        load_weights(nn.Linear(2, 2), tmp_path / "w.pt")


def test_specifications_draw_what_texts_draw() -> None:
    specs = (InputSpec(None, (2, 3), "float32"), InputSpec("ids", (2, 4), "int64"))
    (args, kwargs), (wanted, named) = draw_inputs(specs, 5), example_inputs(["2x3", "ids=2x4:int64"], 5)
    assert torch.equal(args[0], wanted[0])
    assert kwargs.keys() == named.keys() and torch.equal(kwargs["ids"], named["ids"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (InputSpec(None, (2,), "load"), r"dtype='load'\) has an unknown dtype; expected one of float32"),
        (InputSpec(None, (10**18, 10**18), "float32"), r"no room for a tensor of this shape; give smaller sizes"),
    ],
)
def test_specifications_that_cannot_be_drawn_are_named(spec: InputSpec, message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw_inputs((spec,))
