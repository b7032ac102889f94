from __future__ import annotations

import sys

import pytest

from tdfx.progress import reporter


def work(progress: bool | None) -> None:
    with reporter(progress) as report:
        report("decomposing conv1", 0, 2)
        report("decomposing conv2", 1, 2)


def test_a_function_is_called_as_it_is() -> None:
    steps = []
    with reporter(lambda description, done, total: steps.append((description, done, total))) as report:
        report("decomposing conv1", 0, 2)
    assert steps == [("decomposing conv1", 0, 2)]


@pytest.mark.parametrize("progress", [None, False])
def test_silent_in_pipes(progress: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    work(progress)
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_terminals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    work(None)
    out, error = capsys.readouterr()
    assert out == ""
    assert "decomposing conv2" in error and "1/2" in error


def test_no_bar_on_a_terminal_if_unwanted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    work(False)
    assert capsys.readouterr() == ("", "")


def test_true_shows_a_bar_anywhere_and_never_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    work(True)
    out, error = capsys.readouterr()
    assert out == ""
    assert error != ""


@pytest.mark.parametrize("progress", [True, False])
def test_errors_pass_through(progress: bool) -> None:
    with pytest.raises(KeyboardInterrupt), reporter(progress):
        raise KeyboardInterrupt
