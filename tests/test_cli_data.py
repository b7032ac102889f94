from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tdfx.cli.data import load_data
from tdfx.data import batches
from tdfx.errors import InputError

X = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
IDS = np.arange(4)
ONES = torch.ones(4, 2)
SHAPES = [(2, 3, 2), (2,)]


def read(path: object, *placeholders: str, **options: Any) -> Any:
    return load_data(str(path), placeholders or ("x",), SHAPES, **options)


def test_an_array(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    assert torch.equal(read(tmp_path / "x.npy"), torch.from_numpy(X))
    np.save(tmp_path / "d.npy", X.astype(">f8"))
    assert torch.equal(read(tmp_path / "d.npy"), torch.from_numpy(X).double())
    np.save(tmp_path / "i.npy", IDS)
    assert read(tmp_path / "i.npy").dtype == torch.int64


def test_arrays_by_name_or_in_order(tmp_path: Path) -> None:
    np.savez(tmp_path / "named.npz", ids=IDS, x=X, y=IDS)
    found = read(tmp_path / "named.npz", "x", "ids")
    assert list(found) == ["ids", "x", "y"]
    assert torch.equal(found["x"], torch.from_numpy(X))
    np.savez(tmp_path / "ordered.npz", X, IDS)
    ordered = read(tmp_path / "ordered.npz", "x", "ids")
    assert [value.shape for value in ordered] == [(4, 3, 2), (4,)]
    np.savez(tmp_path / "one.npz", images=X)
    assert torch.equal(read(tmp_path / "one.npz"), torch.from_numpy(X))
    with pytest.raises(InputError, match=r"one\.npz: it holds images; expected arrays for x, ids"):
        read(tmp_path / "one.npz", "x", "ids")


@pytest.mark.parametrize(
    "value", [torch.ones(4, 2), (torch.ones(4, 2), torch.ones(4)), [torch.ones(4, 2)], {"x": torch.ones(4, 2)}]
)
def test_tensors_of_torch(value: Any, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "x.pt")
    assert next(batches(read(tmp_path / "x.pt"), ["x"])).samples == 4


class Strange:
    pass


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    torch.save(Strange(), tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"x\.pt: refused, since reading it could run code; expected a tensor"):
        read(tmp_path / "x.pt")
    np.save(tmp_path / "x.npy", np.array([Strange()]), allow_pickle=True)
    with pytest.raises(InputError, match=r"x\.npy: cannot be read .*; expected arrays of numbers"):
        read(tmp_path / "x.npy")
    np.savez(tmp_path / "x.npz", allow_pickle=True, x=np.array([Strange()]))
    with pytest.raises(InputError, match=r"x\.npz: x cannot be read"):
        read(tmp_path / "x.npz")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name in ("x.npy", "x.npz", "x.pt"):
        with pytest.raises(InputError, match=rf"{name}: there is no such file"):
            read(tmp_path / name)
        (tmp_path / name).write_text("text")
        with pytest.raises(InputError, match=rf"{name}: .*(cannot be read|refused)"):
            read(tmp_path / name)
    torch.save(3, tmp_path / "x.pt")
    with pytest.raises(InputError, match="found a int; expected a tensor"):
        read(tmp_path / "x.pt")
    np.save(tmp_path / "t.npy", np.array(["text"]))
    with pytest.raises(InputError, match=r"found an array of <U4; expected numbers"):
        read(tmp_path / "t.npy")
    with pytest.raises(InputError, match=r"no such file or folder; expected a file \.npy"):
        read(tmp_path / "none")
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(InputError, match=r"a file of another kind; expected a file \.npy"):
        read(tmp_path / "x.csv")


def pictures(folder: Path, count: int = 35) -> None:
    """Of one colour each, whose red tells which it is; in two folders."""
    for index in range(count):
        path = folder / str(index % 2) / f"{index:02}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (9, 5), (index, 0, 255)).save(path)


def test_a_folder_of_images(tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    found = load_data(str(tmp_path), ["x"], [(2, 3, 4, 6)])
    parts = list(batches(found, ["x"]))
    assert [tuple(part.inputs[0].shape) for part in parts] == [(32, 3, 4, 6), (3, 3, 4, 6)]
    assert len(found) == 2  # type: ignore[arg-type]
    whole = torch.cat([part.inputs[0] for part in parts])
    red = (whole[:, 0] * 255).round()
    assert sorted(red[:, 0, 0].tolist()) == list(range(35))
    assert {int(value) % 2 for value in red[:8, 0, 0]} == {0, 1}  # of both folders from the start
    torch.testing.assert_close(whole[:, 2], torch.ones(35, 4, 6), rtol=0, atol=0)
    torch.testing.assert_close(whole[:, 1], torch.zeros(35, 4, 6), rtol=0, atol=0)
    again = torch.cat([part.inputs[0] for part in batches(found, ["x"])])
    assert torch.equal(again, whole)


def test_rows_and_columns_of_images_stay_where_they_are(tmp_path: Path) -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = next(iter(load_data(str(tmp_path), ["x"], [(1, 3, 2, 3)])))  # type: ignore[call-overload]
    torch.testing.assert_close(found[0], torch.from_numpy(pixels).permute(2, 0, 1) / 255, rtol=0, atol=1e-7)


def test_images_are_normalized_and_of_the_channels_asked_for(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (255, 51, 0)).save(tmp_path / "a.bmp")
    options = {"mean": (0.5, 0.1, 0.0), "std": (0.5, 0.1, 2.0)}
    found = next(iter(load_data(str(tmp_path), ["x"], [(1, 3, 2, 2)], **options)))  # type: ignore[arg-type,call-overload]
    torch.testing.assert_close(found[0, :, 0, 0], torch.tensor([1.0, 1.0, 0.0]), rtol=0, atol=1e-6)
    grey = next(iter(load_data(str(tmp_path), ["x"], [(1, 1, 2, 2)])))  # type: ignore[call-overload]
    assert grey.shape == (1, 1, 2, 2)
    assert float(grey.max()) == pytest.approx(0.299 + 0.587 * 0.2, abs=0.01)


def test_folders_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = [(1, 3, 2, 2)]
    with pytest.raises(InputError, match=r"the folder holds no image; expected \.jpg"):
        load_data(str(tmp_path), ["x"], image)
    pictures(tmp_path, 1)
    with pytest.raises(InputError, match=r"images are for a network with one input .*this one takes x \(2, 3, 2\)"):
        load_data(str(tmp_path), ["x"], SHAPES)
    with pytest.raises(InputError, match="one input"):
        load_data(str(tmp_path), ["x", "y"], image * 2)
    with pytest.raises(InputError, match=r"mean is \(0.5,\); expected a number for each of 3 channels"):
        load_data(str(tmp_path), ["x"], image, mean=[0.5])
    with pytest.raises(InputError, match=r"std is \(1, 0, 1\); expected a positive number"):
        load_data(str(tmp_path), ["x"], image, std=[1, 0, 1])
    (tmp_path / "broken.png").write_text("text")
    with pytest.raises(InputError, match=r"broken\.png: it cannot be read as an image"):
        list(load_data(str(tmp_path), ["x"], image))  # type: ignore[call-overload]
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match="takes Pillow; install it with pip install pillow"):
        load_data(str(tmp_path), ["x"], image)


def test_normalization_is_for_images(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(InputError, match="mean and std are for folders of images"):
        read(tmp_path / "x.npy", mean=[0.0])


SOURCE = """
import torch
def make(): return [torch.ones(2, 3)]
ready = torch.ones(4, 3)
def fail(): raise ValueError("no such disk")
"""


def test_python_that_makes_data(folder: Path) -> None:
    Path("loaders.py").write_text(SOURCE)
    assert [value.shape for value in read("loaders.py:make")] == [(2, 3)]
    assert read("loaders.py:ready").shape == (4, 3)
    assert read("loaders:ready").shape == (4, 3)
    with pytest.raises(InputError, match=r"data 'loaders.py:fail': calling fail\(\) raised ValueError: no such disk"):
        read("loaders.py:fail")
    with pytest.raises(InputError, match=r"data 'loaders.py:none': loaders.py has no 'none'"):
        read("loaders.py:none")
    with pytest.raises(InputError, match=r"data 'none.py:make': there is no file none.py"):
        read("none.py:make")
    with pytest.raises(InputError, match=r"data ':make': expected a file .npy"):
        read(":make")
