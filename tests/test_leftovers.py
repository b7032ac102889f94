from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tdfx.leftovers import DAYS, remove_leftovers

KEY, OTHER, WHOLE = "a1" * 16, "b2" * 16, "c3" * 8
OURS = [
    f"batches-{OTHER}/batch-00000000.safetensors",
    f"partial-{OTHER}.safetensors",
    f"partial-{OTHER}-{WHOLE}.safetensors",
    f"tune-{OTHER}.pt",
    ".tdfx-ab12_xyz/partial.safetensors",
]
NOT_OURS = [
    f"moments-{OTHER}-{WHOLE}.safetensors",
    f"{OTHER}.json",
    "batches-of-2024/photos.zip",
    "partial-report.safetensors",
    "tune-in.pt",
    f"deeper/partial-{OTHER}.safetensors",
]


def made(folder: Path, name: str, days: float) -> Path:
    """A file, its folder if it has one of its own, not touched for so long."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    entry = folder / Path(name).parts[0]
    then = time.time() - days * 86400
    for aged in (path, entry):
        os.utime(aged, (then, then))
    return entry


@pytest.mark.parametrize("name", OURS)
def test_what_nobody_touched_for_days_goes(name: str, tmp_path: Path) -> None:
    made(tmp_path, name, DAYS + 0.01)
    remove_leftovers(tmp_path, KEY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", OURS)
def test_what_was_touched_lately_stays(name: str, tmp_path: Path) -> None:
    entry = made(tmp_path, name, DAYS - 0.01)
    remove_leftovers(tmp_path, KEY)
    assert entry.exists()


@pytest.mark.parametrize("name", NOT_OURS)
def test_what_is_no_leftover_stays(name: str, tmp_path: Path) -> None:
    made(tmp_path, name, 100 * DAYS)
    remove_leftovers(tmp_path, KEY)
    assert (tmp_path / name).exists()


def test_what_this_run_may_go_on_from_stays(tmp_path: Path) -> None:
    names = [name for name in OURS if OTHER in name]
    for name in names:
        made(tmp_path, name, 100 * DAYS)
    remove_leftovers(tmp_path, OTHER)
    assert all((tmp_path / name).exists() for name in names)


def test_what_cannot_be_removed_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = made(tmp_path, f"tune-{OTHER}.pt", 100 * DAYS)

    def vanish(path: Path, missing_ok: bool = False) -> None:
        raise FileNotFoundError(path)  # another run was first

    monkeypatch.setattr(Path, "unlink", vanish)
    remove_leftovers(tmp_path, KEY)
    assert entry.exists()
