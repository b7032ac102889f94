"""Files appear whole or not at all, and a path that cannot be written is refused with nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tdfx.errors import InputError
from tdfx.files import replacing, write_json, write_text


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refuse(code: int) -> Any:
    def call(*args: object, **kwargs: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return call


def test_the_final_name_appears_only_at_the_end(tmp_path: Path) -> None:
    final = tmp_path / "plan.txt"
    with replacing(final) as staged:
        staged.write_text("new")
        assert not final.exists()
        assert (staged.name, staged.parent.parent) == (final.name, tmp_path)
    assert final.read_text() == "new"
    assert tree(tmp_path) == {"plan.txt"}


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failing_block_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: type[BaseException]) -> None:
    final = tmp_path / "plan.txt"
    final.write_text("old")
    with pytest.raises(failure), replacing(final) as staged:
        staged.write_text("half")
        raise failure
    assert final.read_text() == "old"
    assert tree(tmp_path) == {"plan.txt"}


def test_missing_folders_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "plan.txt", "x")
    assert tree(tmp_path) == {"a", "a/b", "a/b/plan.txt"}


def test_folders_made_for_a_failing_block_are_removed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError), replacing(tmp_path / "a" / "b" / "c" / "plan.txt"):
        raise ValueError
    assert tree(tmp_path) == {"a"}


def test_a_file_written_beside_travels_too(tmp_path: Path) -> None:
    with replacing(tmp_path / "m.onnx") as staged:
        staged.write_text("graph")
        staged.with_name("m.onnx.data").write_text("weights")
    assert tree(tmp_path) == {"m.onnx", "m.onnx.data"}
    assert (tmp_path / "m.onnx.data").read_text() == "weights"


def test_the_named_file_comes_last(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("old")
    (tmp_path / "a.data").mkdir()  # stands in the way of the file beside
    with pytest.raises(InputError, match=r"m\.onnx"), replacing(tmp_path / "m.onnx") as staged:
        staged.write_text("new")
        staged.with_name("a.data").write_text("weights")
    assert (tmp_path / "m.onnx").read_text() == "old"
    assert tree(tmp_path) == {"m.onnx", "a.data"}


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "real" / "plan.txt")
    write_text(tmp_path / "link.txt", "x")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real" / "plan.txt").read_text() == "x"


def test_the_mode_is_that_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("x")
    write_text(tmp_path / "ours", "x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("folder", "names a folder"),
        ("new/", "names a folder"),
        ("file/plan.txt", "Not a directory"),
        ("pipe", "device or pipe"),
        ("n" * 300, "too long"),
        ("nul\0l", "null"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=words) as caught:
        write_text(f"{tmp_path}/{name}", "x")
    assert repr(f"{tmp_path}/{name}") in str(caught.value)
    assert tree(tmp_path) == {"folder", "file", "pipe"}
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("path", ["", None, 3])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(InputError, match="cannot write"):
        write_text(path, "x")


def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "mkdtemp", refuse(errno.EACCES))
    with pytest.raises(InputError, match="Permission denied"):
        write_text(tmp_path / "a" / "plan.txt", "x")
    assert tree(tmp_path) == set()


@pytest.mark.parametrize(("owner", "call"), [(Path, "write_text"), (os, "replace")])
def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, call: str
) -> None:
    (tmp_path / "plan.txt").write_text("old")
    with monkeypatch.context() as patched, pytest.raises(InputError, match="No space left"):
        patched.setattr(owner, call, refuse(errno.ENOSPC))
        write_text(tmp_path / "plan.txt", "new")
    assert (tmp_path / "plan.txt").read_text() == "old"
    assert tree(tmp_path) == {"plan.txt"}


def test_text_is_utf8_with_plain_newlines(tmp_path: Path) -> None:
    write_text(tmp_path / "t", "µ ≤ 1\nend\n")
    assert (tmp_path / "t").read_bytes() == "µ ≤ 1\nend\n".encode()


def test_json_round_trip(tmp_path: Path) -> None:
    write_json(tmp_path / "p.json", {"rank": [16, 32], "share": 0.5, "target": None})
    assert json.loads((tmp_path / "p.json").read_text()) == {"rank": [16, 32], "share": 0.5, "target": None}


def test_json_without_words_for_nan_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "p.json", {"error": float("nan")})
    assert tree(tmp_path) == set()


def test_a_file_that_is_optional_need_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("kept")
    with replacing(tmp_path / "old", optional=True), replacing(tmp_path / "new" / "file", optional=True):
        pass
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old", "kept")]
    with pytest.raises(InputError, match="cannot write"), replacing(tmp_path / "other"):
        pass
