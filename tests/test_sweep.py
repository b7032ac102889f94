from __future__ import annotations

from pathlib import Path

import torch
from torch import fx, nn

from tdfx.data import Batch
from tdfx.fisher import OutputLoss
from tdfx.passes.calibrate import Sums
from tdfx.passes.sites import layer_spec
from tdfx.sweep import Sweep


def sweep(name: str = "0") -> Sweep:
    layer = layer_spec(name, nn.Linear(3, 4), ())
    return Sweep({name: Sums.of(layer, gradients=True)}, OutputLoss("values"))


def added() -> Sweep:
    found = sweep()
    found.add(fx.symbolic_trace(nn.Sequential(nn.Linear(3, 4))), Batch(0, (torch.randn(5, 3),)))
    return found


def test_a_sweep_is_taken_over_whole(tmp_path: Path) -> None:
    given, found = added(), sweep()
    given.save(tmp_path / "s", ["a"])
    found.load(tmp_path / "s", lambda digests: digests == ["a"])
    assert (found.batches, found.samples, found.full) == (1, 5, False)
    assert torch.equal(found.inputs[0], given.inputs[0])
    assert given.loss is not None and found.loss is not None
    assert found.loss.variances == given.loss.variances != []
    kept, sums = given.sums["0"], found.sums["0"]
    assert (sums.positions, sums.reached) == (5, True)
    a, b = sums.moments(5), kept.moments(5)
    assert a.out_cov is not None and b.out_cov is not None
    assert all(torch.equal(x, y) for x, y in ((a.mean, b.mean), (a.in_cov, b.in_cov), (a.out_cov, b.out_cov)))


def test_other_sweeps_are_left_alone(tmp_path: Path) -> None:
    added().save(tmp_path / "s", ["a"])
    (tmp_path / "text").write_text("text")
    other, unknown, unread = sweep("1"), sweep(), sweep()
    other.load(tmp_path / "s", lambda digests: True)
    unknown.load(tmp_path / "s", lambda digests: False)
    unread.load(tmp_path / "text", lambda digests: True)
    assert [entry.batches for entry in (other, unknown, unread)] == [0, 0, 0]
