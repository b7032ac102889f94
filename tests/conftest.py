"""Fixtures that several test modules share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from commands import SOURCE


@pytest.fixture
def folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the model, and a cache outside of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    Path("net.py").write_text(SOURCE)
    return tmp_path
