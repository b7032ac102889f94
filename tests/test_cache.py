from __future__ import annotations

import math
from pathlib import Path

import pytest

from tdfx.cache import ListCache, sources_digest
from tdfx.errors import InputError

KEY = ("svd", "abc", ((1,), (2,)), 0)
VALUES = [0.1, 1 / 3, math.pi * 1e-300, 0.0]


def never() -> list[float]:
    raise AssertionError("computed although it is in the cache")


def entry(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_without_a_folder_everything_is_computed_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cache = ListCache(None)
    assert [cache.get(KEY, 1, lambda: [1.0]), cache.get(KEY, 1, lambda: [2.0])] == [[1.0], [2.0]]
    assert list(tmp_path.iterdir()) == []


def test_values_come_back_exactly_in_another_run(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "cache"
    assert ListCache(folder).get(KEY, 4, lambda: VALUES) == VALUES
    assert ListCache(str(folder)).get(KEY, 4, never) == VALUES


@pytest.mark.parametrize(
    "key",
    [
        ("cp", "abc", ((1,), (2,)), 0),
        ("svd", "abd", ((1,), (2,)), 0),
        ("svd", "abc", ((1, 2),), 0),
        ("svd", "abc", ((1,), (2,)), 1),
    ],
)
def test_every_part_of_the_key_counts(key: tuple[object, ...], tmp_path: Path) -> None:
    cache = ListCache(tmp_path)
    cache.get(KEY, 1, lambda: [1.0])
    assert cache.get(key, 1, lambda: [2.0]) == [2.0]
    assert cache.get(KEY, 1, never) == [1.0]


@pytest.mark.parametrize(
    "damage",
    [
        b"", b"[0.1, 0.", b"{}", b"null", b'[0.1, 0.2, 0.3, "0.4"]', b"[0.1, 0.2, 0.3, null]", b"\xff\xfe",
        b"[0.1, 0.2, 0.3]", b"[0.1, 0.2, 0.3, 0.4, 0.5]", b"[0.1, 0.2, 0.3, NaN]", b"[0.1, 0.2, 0.3, Infinity]",
    ],
)  # fmt: skip
def test_an_unreadable_file_is_written_anew(damage: bytes, tmp_path: Path) -> None:
    cache = ListCache(tmp_path)
    cache.get(KEY, 4, lambda: VALUES)
    entry(tmp_path).write_bytes(damage)
    assert cache.get(KEY, 4, lambda: VALUES) == VALUES
    assert cache.get(KEY, 4, never) == VALUES


def test_an_interrupted_computation_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ListCache(tmp_path).get(KEY, 1, interrupted)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InputError, match=r"cache_dir .*/file: .*choose a folder that can be written"):
        ListCache(file).get(KEY, 4, lambda: VALUES)


def test_sources_of_a_package_have_a_digest_of_their_own() -> None:
    assert sources_digest("tdfx.decompositions") == sources_digest("tdfx.decompositions")
    assert sources_digest("tdfx.decompositions") != sources_digest("tdfx.planner")
