from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import tdfx
from tdfx import demo
from tdfx.demo import Figures, checks
from tdfx.errors import InputError

OLD = Figures(accuracy=0.98, flops=1000, params=100, file_bytes=500, latency_s=2e-3, parity=1e-6)
NEW = Figures(accuracy=0.961, flops=500, params=60, file_bytes=300, latency_s=1e-3, parity=1e-4)


def test_promises_kept_to_the_limit() -> None:
    assert checks(OLD, NEW) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ({}, {"accuracy": 0.957}, "accuracy fell by 2.30 points"),
        ({}, {"accuracy": float("nan")}, "accuracy fell"),
        ({}, {"flops": 501}, "FLOPs are 50.1% of the original's; 50% were promised"),
        ({}, {"parity": 2e-4}, "ONNX Runtime differs by 0.0002"),
        ({"parity": 2e-4}, {}, "ONNX Runtime differs by 0.0002"),
        ({}, {"latency_s": 2e-3}, "takes 2 ms, the original 2 ms; less was promised"),
    ],
)
def test_each_broken_promise_is_told(old: dict[str, float], new: dict[str, float], message: str) -> None:
    (failure,) = checks(replace(OLD, **old), replace(NEW, **new))  # type: ignore[arg-type]
    assert message in failure


def test_the_table_shows_both() -> None:
    text = demo.table(OLD, NEW)
    for part in ("98.0%", "96.1%", "-1.9 points", "50.0%", "60.0%", "500B", "300B", "2 ms", "2.00x as fast", "1e-06"):
        assert part in text


def test_the_digits_are_split_the_same_way_every_time() -> None:
    digits, again = demo.load_digits(), demo.load_digits()
    assert digits.images.shape == (1437, 1, 16, 16)
    assert digits.held_out_images.shape == (360, 1, 16, 16)
    assert torch.equal(digits.held_out_images, again.held_out_images)
    assert (float(digits.images.min()), float(digits.images.max())) == (-1.0, 1.0)
    assert sorted(set(digits.held_out_labels.tolist())) == list(range(10))
    train = {image.numpy().tobytes() for image in digits.images}
    assert not any(image.numpy().tobytes() in train for image in digits.held_out_images)


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(InputError, match=r"pip install tdfx\[demo\]"):
        demo.load_digits()


def test_the_network_is_one_worth_compressing() -> None:
    convs = [layer for layer in demo.DigitsNet() if isinstance(layer, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [64, 64, 64, 128]
    assert demo.DigitsNet()(torch.zeros(2, 1, 16, 16)).shape == (2, 10)


def test_one_thread_for_a_while() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with pytest.raises(KeyError), demo.one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


class Narrow(nn.Sequential):
    """The demo's network with fewer channels, to be quick."""

    def __init__(self) -> None:
        blocks = (*demo._block(1, 16), *demo._block(16, 32))
        super().__init__(*blocks, nn.MaxPool2d(4), nn.BatchNorm2d(32), nn.Flatten(), nn.Linear(512, 10))


def test_training_learns_and_leaves_the_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "DigitsNet", Narrow)
    digits, state = demo.load_digits(), torch.get_rng_state()
    network, again = (demo.train(digits.images[:512], digits.labels[:512], epochs=3) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert not network.training
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    with torch.no_grad():
        right = network(digits.held_out_images).argmax(1) == digits.held_out_labels
    assert float(right.float().mean()) > 0.5


def test_the_whole_demo_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "DigitsNet", Narrow)
    shown: list[str] = []
    figures: list[Figures] = []

    def checked(old: Figures, new: Figures) -> list[str]:
        figures.extend((old, new))
        return ["told"]

    monkeypatch.setattr(demo, "checks", checked)
    assert demo.demo(tmp_path, shown.append, epochs=1, images=128) == ["told"]
    old, new = figures
    names = [
        "model.onnx",
        "model.safetensors",
        "original.onnx",
        "original.safetensors",
        "plan.json",
        "report.json",
        "structure.json",
    ]
    assert sorted(os.listdir(tmp_path)) == names
    plan = tdfx.Plan.from_json((tmp_path / "plan.json").read_text())
    assert (old.flops, new.flops, new.params) == (plan.before.flops, plan.after.flops, plan.after.params)
    assert new.flops <= 0.5 * old.flops
    assert (old.file_bytes, new.file_bytes) == tuple((tmp_path / name).stat().st_size for name in (names[2], names[0]))
    assert new.parity == json.loads((tmp_path / "report.json").read_text())["export"]["max_rel_diff"]
    assert shown[0].startswith(str(plan))
    assert shown[1] == demo.table(old, new)


def test_accuracy_is_that_of_the_file(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    with torch.no_grad():
        network[1].weight.copy_(torch.eye(3, 4))  # type: ignore[operator]
    tdfx.export_onnx(network, tmp_path / "eye.onnx", torch.eye(4)[:1, None])
    images, labels = torch.eye(4)[[0, 1, 2, 2], None], torch.tensor([0, 1, 2, 0])
    assert demo.evaluate(tmp_path / "eye.onnx", images, labels) == 0.75
