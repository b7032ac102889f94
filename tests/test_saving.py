from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tdfx
from tdfx import saving
from tdfx.errors import CaptureError, InputError, PlanError
from tdfx.saving import Manifest, Output, output_folder, save_state_dict

NAMES = ["model.onnx", "model.safetensors", "plan.json", "report.json", "structure.json"]


def write(output: Output) -> None:
    for name in NAMES:
        output.stage(name).write_text(name)


def test_files_appear_together(tmp_path: Path) -> None:
    with output_folder(tmp_path / "new" / "out") as output:
        write(output)
        assert not [name for name in os.listdir(output.folder) if not name.startswith(".")]
    assert sorted(os.listdir(tmp_path / "new" / "out")) == NAMES
    assert all((output.folder / name).read_text() == name for name in NAMES)


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
    assert len(os.listdir(tmp_path / "out")) == 5


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


def test_what_safetensors_cannot_hold_is_named(tmp_path: Path) -> None:
    model = nn.Module()
    model.register_buffer("phase", torch.ones(2, dtype=torch.complex128))
    with pytest.raises(InputError, match=r"model.safetensors: safetensors has no torch.complex128; use another"):
        save_state_dict(model, tmp_path / "model.safetensors")


def test_what_is_no_tensor_is_named(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def get_extra_state(self) -> int:
            return 3

    with pytest.raises(InputError, match=r"model.safetensors: _extra_state is a int; expected tensors only"):
        save_state_dict(Counting(), tmp_path / "model.safetensors")


class Net(nn.Module):
    """Input (batch, 8) and scale=(batch, 1), output a dictionary."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.dropout = nn.Dropout(0.4)
        self.second = nn.Linear(width, width)
        self.register_buffer("mask", torch.arange(float(width)), persistent=False)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        x = self.second(self.dropout(self.first(x).relu())) * self.mask
        return {"scaled": x * scale, "plain": x}


class Gate(nn.Module):
    """A layer that torch.nn does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x


class Gated(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 32), Gate(), nn.Linear(32, 32))


X, SCALE = torch.linspace(-1, 1, 16).reshape(2, 8), torch.tensor([[0.5], [2.0]])
OPTIONS: dict[str, Any] = {"target": None, "rank_multiple": 1, "methods": ["svd"], "trainable": True}


def make(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind().eval()


def compressed(kind: type[nn.Module] = Net, seed: int = 0) -> tdfx.Result:
    kwargs = {"scale": SCALE} if kind is Net else {}
    return tdfx.compress(make(kind, seed), X, kwargs, budget="params=60%", **OPTIONS)


@cache
def result(kind: type[nn.Module] = Net, seed: int = 0) -> tdfx.Result:
    """Not to be changed."""
    return compressed(kind, seed)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tdfx.save(result(), tmp_path / "saved")
    return tmp_path / "saved"


def outputs(module: nn.Module, *args: Tensor, **kwargs: Tensor) -> list[Tensor]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = module(*(x.clone() for x in args), **kwargs)
    return [*found.values()] if isinstance(found, dict) else [found]


def assert_same(left: tdfx.Result, right: tdfx.Result, *args: Tensor, **kwargs: Tensor) -> None:
    pairs = zip(outputs(left.module, *args, **kwargs), outputs(right.module, *args, **kwargs), strict=True)
    assert all(torch.equal(wanted, found) for wanted, found in pairs)
    wanted, found = left.module.state_dict(), right.module.state_dict()
    assert list(wanted) == list(found)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert replace(right, module=left.module) == left


@pytest.mark.parametrize("trainable", [False, True], ids=["deployed", "trainable"])
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_every_network_comes_back(name: str, trainable: bool, tmp_path: Path) -> None:
    network, inputs = networks.build(name)
    budget = "params=100%" if name == "functional" else "params=99.9%"  # one has no layers
    options = {**OPTIONS, "methods": ["svd", "spatial_svd"], "trainable": trainable}
    try:
        saved = tdfx.compress(network, inputs, budget=budget, **options)
    except CaptureError:
        pytest.skip("it cannot be captured")
    tdfx.save(saved, tmp_path)
    loaded = tdfx.load(tmp_path)
    assert_same(saved, loaded, *inputs)
    if trainable:
        saved.module.train()
        loaded.module.train()
        assert_same(saved, loaded, *inputs)


def test_files_and_report(saved: Path) -> None:
    assert sorted(os.listdir(saved)) == ["buffers.safetensors", *NAMES[1:]]
    assert load_file(saved / "model.safetensors").keys() == result().module.state_dict().keys()
    assert tdfx.load(saved).report.inputs == (
        tdfx.InputSpec(None, (2, 8), "float32"),
        tdfx.InputSpec("scale", (2, 1), "float32"),
    )


def test_a_loaded_result_can_be_saved_and_exported(saved: Path, tmp_path: Path) -> None:
    loaded = tdfx.load(str(saved))
    tdfx.save(loaded, tmp_path / "again")
    for name in os.listdir(saved):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()
    export = tdfx.export_onnx(loaded.module.eval(), tmp_path / "model.onnx", (X,), {"scale": SCALE})
    assert export.max_rel_diff <= export.rtol


def test_trained_weights_are_saved(tmp_path: Path) -> None:
    trained = compressed()
    optimizer = torch.optim.SGD(trained.module.train().parameters(), lr=0.1)
    trained.module(X, scale=SCALE)["plain"].square().mean().backward()
    optimizer.step()
    tdfx.save(trained, tmp_path)
    loaded = tdfx.load(tmp_path)
    assert loaded.module.training
    assert_same(trained, loaded, X, scale=SCALE)
    assert all(not tensor.grad for tensor in loaded.module.parameters())


def test_the_source_of_the_model_is_not_needed(tmp_path: Path) -> None:
    tdfx.save(result(), tmp_path / "saved")
    code = (
        "import sys, torch, tdfx; result = tdfx.load(sys.argv[1]);"
        "x = torch.linspace(-1, 1, 16).reshape(2, 8);"
        "print(result.module(x, scale=torch.tensor([[0.5], [2.0]]))['scaled'].double().sum().item().hex());"
        "print([name for name in sys.modules if 'test_saving' in name])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "saved")], capture_output=True, text=True, check=True
    )
    total = result().module(X, scale=SCALE)["scaled"].double().sum().item().hex()
    assert done.stdout.split("\n")[:2] == [total, "[]"]


def test_a_model_with_layers_of_its_own_is_given_to_load(tmp_path: Path) -> None:
    tdfx.save(result(Gated), tmp_path)
    message = (
        r"holds weights and plan but no structure \(layer 1: .*Gate is no layer of torch.nn\); load it with model="
    )
    with pytest.raises(InputError, match=message):
        tdfx.load(tmp_path)
    loaded = tdfx.load(tmp_path, make(Gated, seed=1))
    assert_same(result(Gated), loaded, X)
    with pytest.raises(PlanError, match="another structure"):
        tdfx.load(tmp_path, nn.Linear(8, 4))


class Routed(nn.Module):
    """Takes one layer or the other by what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, inputs: dict[str, Tensor], scale: float) -> Tensor:
        chosen = self.first if float(inputs["x"].sum()) > 100 else self.second
        out: Tensor = chosen(inputs["x"]) * scale
        return out


def test_a_model_whose_forward_depends_on_values_is_loaded_with_its_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, given = Routed().eval(), ({"x": torch.ones(2, 16) * 50}, 2.0)
    compressed = tdfx.compress(model, given, budget="flops=60%", methods=["svd"], rank_multiple=1, target=None)
    assert compressed.report.tier == "inplace"
    tdfx.save(compressed, tmp_path)
    with pytest.raises(tdfx.TdfxError, match=r"was compressed with: tdfx.load\(folder, model, example_inputs"):
        tdfx.load(tmp_path, Routed())
    loaded = tdfx.load(tmp_path, Routed(), given)
    assert torch.equal(loaded.module(*given), compressed.module(*given))


def test_a_result_that_is_no_graph_is_saved_by_its_weights(tmp_path: Path) -> None:
    other = replace(result(Gated), module=nn.Sequential(result(Gated).module))
    tdfx.save(other, tmp_path)
    with pytest.raises(InputError, match=r"the network is a Sequential and no torch.fx.GraphModule"):
        tdfx.load(tmp_path)


def test_nothing_is_left_of_a_result_that_cannot_be_saved(tmp_path: Path) -> None:
    module = nn.Module()
    module.register_buffer("phase", torch.ones(2, dtype=torch.complex128))
    with pytest.raises(InputError, match="complex128"):
        tdfx.save(replace(result(), module=module), tmp_path / "new")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["structure.json", "plan.json", "report.json", "model.safetensors", "buffers.safetensors"]
)
def test_missing_short_and_changed_files_are_named(saved: Path, name: str) -> None:
    path, content = saved / name, (saved / name).read_bytes()
    damaged = [content[:length] for length in (0, 1, 7, len(content) // 2, len(content) - 2)]
    damaged += [content + b"}", content * 2]
    for position in range(0, len(content), max(1, len(content) // 40)):
        flipped = bytearray(content)
        flipped[position] ^= 4
        damaged.append(bytes(flipped))
    for other in damaged:
        path.write_bytes(other)
        with pytest.raises(InputError, match=name):
            tdfx.load(saved)
    path.unlink()
    with pytest.raises(InputError, match=rf"cannot read .*{name}: No such file or directory; expected a folder that"):
        tdfx.load(saved)


@pytest.mark.parametrize("name", ["structure.json", "plan.json", "report.json", "model.safetensors"])
def test_files_of_two_results_are_told_apart(saved: Path, tmp_path: Path, name: str) -> None:
    tdfx.save(result(seed=1), tmp_path / "other")
    shutil.copy(tmp_path / "other" / name, saved / name)
    with pytest.raises(InputError, match=r"(?s)does not belong to .*structure.json.*comes from another result"):
        tdfx.load(saved)


def signed(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """An edit that somebody means: with hashes that fit."""
    values = json.loads((folder / "structure.json").read_text())
    edit(values)
    for name in values["files"]:
        values["files"][name] = saving._digest((folder / name).read_bytes())
    manifest = Manifest(**values).signed()
    (folder / "structure.json").write_text(json.dumps(vars(manifest)))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v.update(version=2), r"structure.json has version 2; this tdfx reads version 1"),
        (lambda v: v.update(version=True), r"structure.json has version True"),
        (
            lambda v: v.update(torch="99.1.0"),
            r"written with torch 99.1.0; this is torch .*install that torch or a later",
        ),
        (lambda v: v.update(graph=[]), r"structure.json: graph is \[\]; expected an object"),
        (lambda v: v.update(graph=3), r"structure.json: graph is 3"),
        (lambda v: v["graph"]["nodes"][0].update(target="x=1"), r"an input is 'x=1'.*written by tdfx .* read by tdfx"),
        (lambda v: v["files"].pop("buffers.safetensors"), r"tensor mask: found no such tensor"),
        (lambda v: v["files"].pop("plan.json"), r"lists the files .*; expected model.safetensors"),
        (lambda v: v["files"].update({"../x": ""}), r"lists the files"),
    ],
)
def test_files_that_save_does_not_write_are_refused(
    saved: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    (saved.parent / "x").touch()
    signed(saved, edit)
    with pytest.raises(InputError, match=message):
        tdfx.load(saved)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("plan.json", b"{}", r"plan.json: the plan has version None"),
        ("plan.json", b"\xff", r"plan.json is no text"),
        ("report.json", b"{}", r"report.json: report: missing 'plan'"),
        ("report.json", b"[" * 100_000, r"report.json: the report is no JSON"),
        ("model.safetensors", b"", r"model.safetensors is no safetensors file"),
        ("model.safetensors", b"\xff" * 64, r"model.safetensors is no safetensors file"),
    ],
)
def test_files_with_fitting_hashes_are_read_with_care(saved: Path, name: str, content: bytes, message: str) -> None:
    (saved / name).write_bytes(content)
    signed(saved, lambda values: None)
    with pytest.raises(InputError, match=message):
        tdfx.load(saved)


def test_tensors_with_a_fitting_hash_must_fit_the_network(saved: Path) -> None:
    state = load_file(saved / "model.safetensors")
    name = next(iter(state))
    save_file({**state, name: torch.ones(3)}, saved / "model.safetensors")
    signed(saved, lambda values: None)
    with pytest.raises(InputError, match=rf"structure.json: tensor {name}: found shape \(3,\)"):
        tdfx.load(saved)


def test_what_is_no_folder_of_a_result_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"structure.json: No such file or directory; expected a folder that tdfx.save"
    ):
        tdfx.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"Not a directory"):
        tdfx.load(tmp_path / "file")
