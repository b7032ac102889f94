from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from commands import BOTH_INPUTS, BUDGET, FILES, INPUTS, METHODS, SOURCE, tdfx_command
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tdfx
from tdfx import cli, demo, saving
from tdfx.cli import stages
from tdfx.decompositions import registry
from tdfx.errors import InputError
from tdfx.loading import example_inputs, load_model

ARGUMENTS = [*BOTH_INPUTS, *BUDGET, *METHODS]

pytestmark = pytest.mark.usefixtures("folder")


def compress(*more: str, model: str = "net.py:make", out: str = "out", code: int = 0) -> tuple[str, str]:
    return tdfx_command("compress", model, *ARGUMENTS, "--out", out, *more, code=code)


def test_compress_writes_and_prints(folder: Path) -> None:
    stdout, stderr = compress("--verify", "full", "--exclude", "table", "--opset", "19", "--cache-dir", "cache")
    assert stderr == ""
    assert sorted(os.listdir("out")) == FILES
    report = json.loads(Path("out/report.json").read_text())
    plan = tdfx.Plan.from_json(Path("out/plan.json").read_text())
    for text in (str(plan), "parameters", "skipped table", "ONNX Runtime differs by", "at batch 2 and 3", "opset 19"):
        assert text in stdout
    assert {choice.method for choice in plan.candidates} - {"dense"} <= {"spatial_svd", "svd"}
    assert plan.after.params <= 0.6 * plan.before.params
    assert report["after"]["params"] == plan.after.params
    assert report["export"]["path"] == str(Path("out/model.onnx"))
    assert report["export"]["opset"] == 19
    assert report["verification"]["full_rank"]
    assert os.listdir("cache")


def test_saved_factors_make_the_saved_network_again(folder: Path) -> None:
    compress()
    args, kwargs = example_inputs(INPUTS)
    plan = tdfx.Plan.from_json(Path("out/plan.json").read_text())
    assert any(not choice.is_dense for choice in plan.candidates)
    factors = load_file("out/model.safetensors")
    result = tdfx.apply(load_model("net.py:make"), args, plan, example_kwargs=kwargs, factors=factors)
    with torch.no_grad():
        wanted = result.module(*args, **kwargs).numpy()
        np.testing.assert_array_equal(tdfx.load("out").module(*args, **kwargs).numpy(), wanted)
    session = onnxruntime.InferenceSession("out/model.onnx", providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    (found,) = session.run(None, dict(zip(names, [args[0].numpy(), kwargs["ids"].numpy()], strict=True)))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(np.abs(wanted).max()))


def test_options_reach_compress(monkeypatch: pytest.MonkeyPatch) -> None:
    class Called(BaseException):
        pass

    def called(model: object, args: object, kwargs: object, **options: object) -> None:
        raise Called(options)

    monkeypatch.setattr(stages, "compress_model", called)
    options = (
        "--include first --include second --exclude third --metric weight:scaled --planner other --target none "
        "--guard measured --threads 2 --no-correct --rank-multiple 2 --trainable --dynamic x:1=width "
        "--capture export --verify full --seed 3 --cache-dir c"
    )
    arguments = ["compress", "net.py:make", *ARGUMENTS, "--out", "out", *options.split()]
    with pytest.raises(Called) as caught:
        CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert caught.value.args[0] == {
        "budget": tdfx.Budget.parse("params=60%"), "ranks": None, "methods": ["spatial_svd", "svd"],
        "include": ["first", "second"], "exclude": ["third"], "metric": "weight:scaled", "calibration": None,
        "correct": False, "planner": "other",
        "target": None, "guard": "measured", "runtime": tdfx.Runtime(threads=2),
        "rank_multiple": 2, "trainable": True, "dynamic": {"x": {1: "width"}}, "capture": "export",
        "verify": "full", "seed": 3, "minimize": "flops", "evaluate": None, "cache_dir": Path("c"),
    }  # fmt: skip


def test_weights_are_loaded(folder: Path) -> None:
    model = load_model("net.py:make")
    with torch.no_grad():
        model.get_parameter("third.bias").fill_(5.0)
    save_file(model.state_dict(), "w.safetensors")
    compress("--weights", "w.safetensors")
    (bias,) = (t for name, t in load_file("out/model.safetensors").items() if name.startswith("third") and t.dim() == 1)
    assert torch.equal(bias, torch.full((48,), 5.0))


def test_notes_are_printed_once(folder: Path) -> None:
    """A budget that needs choices slower than dense makes compress warn; the report says it."""
    small = ["compress", "net.py:small", "--input", "1x4x3x3", "--budget", "params=60%", "--out", "out"]
    stdout, stderr = tdfx_command(*small)
    assert stdout.count("reachable only with choices") == 1
    assert stderr == ""


def test_other_files_stay_and_older_results_are_replaced(folder: Path) -> None:
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    Path("out/plan.json").write_text("older")
    compress()
    assert sorted(os.listdir("out")) == sorted([*FILES, "notes.txt"])
    assert Path("out/notes.txt").read_text() == "mine"
    assert Path("out/plan.json").read_text() != "older"


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (InputError("the disk is full"), 1)], ids=["interrupt", "error"]
)
def test_what_fails_while_files_are_written_leaves_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def write_json(path: Path, value: object) -> None:
        assert not {*FILES} & {*os.listdir("out")}
        raise error

    monkeypatch.setattr(saving, "write_json", write_json)
    stdout, stderr = compress(code=code)
    assert (stdout, "Traceback" in stderr) == ("", False)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["net.py"], "model 'net.py': expected package.module:factory or file.py:factory"),
        (["lost.py:make"], "there is no file lost.py"),
        (["lost_module:make"], "no module 'lost_module'"),
        (["net.py:mak"], "net.py has no 'mak'; did you mean 'make'?"),
        (["net.py:fail"], "calling fail() raised ValueError: no such width"),
        (["net.py:torch"], "found a module; expected a function or model"),
        (["net.py:make", "--weights", "lost.pt"], "weights lost.pt: there is no such file"),
        (["net.py:make", "--weights", "net.py"], "weights net.py: "),
        (["net.py:make", "--input", "2,3"], "input '2,3' is not understood"),
        (["net.py:make", "--input", "2x3"], "does not run"),
        (["net.py:make", "--methods", "svd,spatial"], "'spatial'"),
        (["net.py:make", "--include", "fourth"], "'fourth'"),
        (["net.py:make", "--metric", "weigh"], "'weigh'"),
        (["net.py:make", "--planner", "plan"], "'plan'"),
        (["net.py:make", "--target", "phone"], "'phone'"),
        (["net.py:make", "--rank-multiple", "0"], "rank_multiple"),
        (["net.py:make", "--budget", "watts=50%"], "watts"),
        (["net.py:make", "--budget", "params=1"], "not reachable"),
        (["net.py:make", "--out", "net.py"], "output folder net.py: it is a file"),
        (["net.py:make", "--out", "net.py/out"], "cannot write"),
    ],
)
def test_errors_are_one_message(folder: Path, arguments: list[str], message: str) -> None:
    model, *more = arguments
    stdout, stderr = compress(*more, model=model, code=1)
    assert stdout == ""
    assert stderr.startswith("error: ")
    assert message in stderr
    assert "Traceback" not in stderr
    assert {*os.listdir()} <= {"net.py", "__pycache__"}
    assert Path("net.py").read_text() == SOURCE


def test_debug_shows_the_traceback(folder: Path) -> None:
    _, stderr = compress("--debug", model="net.py:fail", code=1)
    assert "Traceback" in stderr
    assert "def fail(): raise" in stderr
    assert stderr.rstrip().splitlines()[-1].startswith("tdfx.errors.InputError: model 'net.py:fail'")


def test_interrupt(folder: Path) -> None:
    stdout, stderr = compress(model="net.py:interrupt", code=130)
    assert (stdout, stderr) == ("", "interrupted\n")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["compress"],
        ["compress", "net.py:make", *ARGUMENTS],
        ["compress", "net.py:make", *BOTH_INPUTS, "--out", "out"],
        ["compress", "net.py:make", *ARGUMENTS, "--ranks", "vbmf", "--out", "out"],
        ["compress", "net.py:make", *BUDGET, "--out", "out"],
        ["compress", "net.py:make", *ARGUMENTS, "--out", "out", "--verify", "some"],
        ["compress", "net.py:make", *ARGUMENTS, "--out", "out", "--opset", "9"],
        ["compress", "net.py:make", *ARGUMENTS, "--out", "out", "--seed", "-1"],
        ["squash"],
        ["--loud"],
    ],
)
def test_usage_errors(arguments: list[str]) -> None:
    _, stderr = tdfx_command(*arguments, code=2)
    assert "Usage: tdfx" in stderr


def test_methods_are_listed() -> None:
    stdout, _ = tdfx_command("methods")
    for method in registry().values():
        assert all(text in stdout for text in (method.name, method.summary, method.source))


def test_version_and_entry_point() -> None:
    assert tdfx_command("--version")[0] == f"tdfx {tdfx.__version__}\n"
    settings = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert '[project.scripts]\ntdfx = "tdfx.cli:main"\n' in settings


@pytest.mark.parametrize(("failures", "code"), [([], 0), (["accuracy fell", "it is slow"], 1)])
def test_demo_exit_codes(monkeypatch: pytest.MonkeyPatch, failures: list[str], code: int) -> None:
    folders = []

    def run(out: Path, echo: object) -> list[str]:
        folders.append(out)
        return failures

    monkeypatch.setattr(demo, "demo", run)
    _, stderr = tdfx_command("demo", code=code)
    assert stderr == "".join(f"error: {failure}\n" for failure in failures)
    tdfx_command("demo", "--out", "there", code=code)
    assert folders == [Path("build/demo"), Path("there")]


def test_demo_without_scikit_learn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    _, stderr = tdfx_command("demo", code=1)
    assert "pip install tdfx[demo]" in stderr
    assert not Path("build").exists()


def python_m_tdfx(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(tdfx.__file__).parent.parent)}
    command = [sys.executable, "-W", "error", "-m", "tdfx", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_python_m_tdfx_is_quiet_in_a_pipe(folder: Path) -> None:
    done = python_m_tdfx("compress", "net:make", *ARGUMENTS, "--out", "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert done.stdout.startswith("layer")
    assert sorted(os.listdir("out")) == FILES


def test_python_m_tdfx_reports_an_interrupt(folder: Path) -> None:
    done = python_m_tdfx("compress", "net.py:interrupt", *ARGUMENTS, "--out", "out")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
    assert not Path("out").exists()


def test_python_m_tdfx_reports_an_error(folder: Path) -> None:
    done = python_m_tdfx("compress", "net.py:fail", *ARGUMENTS, "--out", "out")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: model 'net.py:fail': calling fail() raised ValueError: no such width\n"


@pytest.mark.parametrize("raised", [RuntimeError("boom\nat length"), SystemExit(3)])
def test_the_unexpected_is_one_line_too(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, raised: BaseException
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(stages, "compress_model", fail)
    outcome = CliRunner().invoke(cli.app, ["compress", "net.py:make", *ARGUMENTS, "--out", "out"])
    assert outcome.exit_code == 1
    kind = type(raised).__name__
    assert outcome.stderr == f"error: unexpected {kind}: {str(raised).splitlines()[0]}; --debug shows where\n"
    assert not Path("out").exists()


BRANCH = """
import torch
from torch import nn

class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.positive, self.negative = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.positive(x) if x.sum() > 0 else self.negative(self.positive(x))

def make():
    torch.manual_seed(0)
    return Branch().eval()
"""


def test_a_model_without_a_graph_is_compressed_without_an_onnx_file(folder: Path) -> None:
    Path("branch.py").write_text(BRANCH)
    arguments = ["compress", "branch.py:make", "--input", "2x32", "--budget", "params=60%", "--rank-multiple", "1"]
    stdout, _ = tdfx_command(*arguments, "--methods", "svd", "--target", "none", "--out", "out")
    assert "note: no ONNX file: torch.onnx.export cannot export the network" in stdout
    assert "in place;" in stdout
    assert {path.name for path in Path("out").iterdir()} == {
        "model.safetensors", "plan.json", "report.json", "structure.json",
    }  # fmt: skip
    result = tdfx.load("out", load_model("branch.py:make"))
    assert result.module(torch.ones(3, 32)).shape == (3, 32)
    _, stderr = tdfx_command(*arguments, "--capture", "export", "--out", "other", code=1)
    assert "capture='export'" in stderr and not Path("other").exists()
