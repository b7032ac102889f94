"""Measured times in place of estimates."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from timed_networks import INPUT, captured, compress, measured_once, network, profiled
from torch import nn

import tdfx
from tdfx.errors import BudgetError, InputError, OptionError, PlanError
from tdfx.latency import runner
from tdfx.latency.grid import sweep
from tdfx.records.latency import LatencyTable, Runtime
from tdfx.stages import guard as guard_stage
from tdfx.stages.latency import (
    corrected_times,
    measure_latency,
    measured_rank_grid,
    notes_on,
    timed_structure,
    with_latency,
    write_latency_kit,
)
from tdfx.targets import ORT_CPU


def test_every_candidate_has_its_time(table: LatencyTable) -> None:
    found = table.by_candidate
    for candidate in profiled().candidates:
        wanted = 2e-6 + 1e-9 * candidate.cost.macs
        assert found[candidate.site, candidate.method, candidate.rank] == pytest.approx(wanted, abs=1e-9)
    assert table.network_s == pytest.approx(2e-6 + 1e-9 * profiled().before.macs, abs=1e-9)
    assert len(table.rows) == len(profiled().candidates)


def test_measured_times_take_the_place_of_estimates(table: LatencyTable) -> None:
    found = with_latency(profiled(), table)
    assert found.latency_source == "measured"
    assert found.before.latency_s == pytest.approx(table.network_s, abs=1e-9)
    dense = {c.site: c for c in found.candidates if c.is_dense}
    whole = sum((c.cost for c in dense.values()), start=found.rest)
    assert whole.latency_s == pytest.approx(table.network_s, abs=1e-8)
    rows = table.by_candidate
    for candidate in found.candidates:
        latency_s, dense_s = candidate.cost.latency_s, dense[candidate.site].cost.latency_s
        assert latency_s is not None and dense_s is not None
        if latency_s > 0:  # differences are as measured, whatever is taken off for being timed alone
            measured = rows[candidate.site, candidate.method, candidate.rank] - rows[candidate.site, "dense", ()]
            assert latency_s - dense_s == pytest.approx(measured, abs=2e-9)
        slower = not candidate.is_dense and latency_s > 0.98 * dense_s
        assert ("slower than dense" in candidate.caveat) == slower
    assert any(c.caveat for c in found.candidates) and any(not c.caveat for c in found.candidates)


def test_what_layers_take_alone_is_no_more_than_the_network(table: LatencyTable) -> None:
    quick = replace(table, network_s=0.95 * table.network_s)
    found = with_latency(profiled(), quick)
    whole = sum((c.cost for c in found.candidates if c.is_dense), start=found.rest)
    assert whole.latency_s == pytest.approx(quick.network_s, rel=1e-3)


@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
def test_the_network_as_it_is_takes_its_own_time_however_little_that_is(table: LatencyTable, share: float) -> None:
    """What starting a small model takes may be more than all that is computed in it."""
    quick = replace(table, network_s=share * table.network_s)
    found = with_latency(profiled(), quick)
    assert tdfx.plan(found, "latency=100%").after.latency_s == pytest.approx(quick.network_s, rel=1e-3)
    assert all(c.cost.latency_s for c in found.candidates)
    for site in found.sites:
        dense, *chains = sorted(found.of_site(site.name), key=lambda c: not c.is_dense)
        alone = [quick.by_candidate[c.site, c.method, c.rank] for c in chains]
        assert sorted(alone) == [a for _, a in sorted(zip([c.cost.latency_s for c in chains], alone, strict=True))]
        assert dense.is_dense


def test_a_choice_that_a_person_fixed_is_carried_out_however_slow(timed: list[bytes | str]) -> None:
    fixed = {"2": {"rank": 20, "methods": ["spatial_svd"]}}
    found = tdfx.profile(captured(), methods=["spatial_svd"], rank_multiple=4, overrides=fixed)
    table = measure_latency(captured(), found)
    slow = replace(table, rows=tuple(replace(r, latency_s=1.0) if r.site == "2" and r.rank else r for r in table.rows))
    chosen = tdfx.plan(with_latency(found, slow), "flops=90%", slower=False)
    assert [c.rank for c in chosen.candidates if c.site == "2"] == [(20,)]


def test_a_latency_budget_is_kept_and_predicted(table: LatencyTable) -> None:
    found = with_latency(profiled(), table)
    for budget, most in (("latency=60%", 0.6 * table.network_s), ("latency=200us", 200e-6)):
        chosen = tdfx.plan(found, budget)
        assert chosen.after.latency_s is not None and chosen.after.latency_s <= most
        result = tdfx.apply(network(), INPUT, chosen)
        assert (result.after.latency_s, result.plan.after) == (chosen.after.latency_s, chosen.after)
        assert result.plan.candidates[0].cost == chosen.candidates[0].cost
        assert "measured" in str(result.report)


def test_latency_joins_other_limits(table: LatencyTable) -> None:
    chosen = tdfx.plan(with_latency(profiled(), table), "latency=80%,params=50%")
    assert chosen.after.latency_s is not None and chosen.after.latency_s <= 0.8 * table.network_s
    assert chosen.after.params <= 0.5 * chosen.before.params


def test_an_unreachable_latency_says_how_far_one_gets(table: LatencyTable) -> None:
    with pytest.raises(BudgetError, match=r"latency: asked 0.001 ms, least reachable on its own 0\.\d+ ms"):
        tdfx.plan(with_latency(profiled(), table), "latency=1us")


def test_the_guard_offers_nothing_slower(table: LatencyTable) -> None:
    slow = replace(table, rows=tuple(row if not row.rank else replace(row, latency_s=1.0) for row in table.rows))
    found = with_latency(profiled(), slow)
    assert tdfx.plan(found, "flops=60%").after.flops <= 0.6 * found.before.flops
    with pytest.raises(BudgetError, match=r"lift the guard.*faster than these layers as they are: 0, 2, 4, 7"):
        tdfx.plan(found, "flops=60%", slower=False)


def test_times_are_kept_between_runs(timed: list[bytes | str], tmp_path: Path) -> None:
    first = measure_latency(captured(), profiled(), cache_dir=tmp_path)
    number = len(timed)
    assert measure_latency(captured(), profiled(), cache_dir=tmp_path) == first
    assert len(timed) - number == 2 + len({row.site for row in first.rows})  # the network, first alone, and its layers
    measure_latency(captured(), profiled(), cache_dir=tmp_path, runtime=Runtime(threads=2))
    assert len(timed) - number > number


def test_times_that_other_code_took_are_not_used(
    timed: list[bytes | str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_latency(captured(), profiled(), cache_dir=tmp_path)
    number = len(timed)
    monkeypatch.setattr("tdfx.stages.latency.sources_digest", lambda package: "other")
    measure_latency(captured(), profiled(), cache_dir=tmp_path)
    assert len(timed) == 2 * number


def test_a_run_that_was_stopped_goes_on(
    timed: list[bytes | str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(description: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_latency(captured(), profiled(), cache_dir=tmp_path, progress=stop)
    before = {model for model in timed if isinstance(model, bytes)}
    timed.clear()
    measure_latency(captured(), profiled(), cache_dir=tmp_path)
    layers = 4
    assert len({model for model in timed if isinstance(model, bytes)} & before) <= layers
    assert len(before) > layers


def test_a_broken_cache_is_measured_anew(timed: list[bytes | str], tmp_path: Path) -> None:
    first = measure_latency(captured(), profiled(), cache_dir=tmp_path)
    (kept,) = tmp_path.glob("latency-*.json")
    for text in (b"{", b"[]", b'{"a": {"b": "c"}}', b"\xff\xfe\x80"):
        kept.write_bytes(text)
        assert measure_latency(captured(), profiled(), cache_dir=tmp_path) == first


def test_alike_layers_are_timed_once(timed: list[bytes | str]) -> None:
    twins = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))).eval()
    example = torch.randn(1, 16, 8, 8)
    found = tdfx.capture(twins, example)
    measure_latency(found, tdfx.profile(found, methods=["spatial_svd"]))
    chains = [model for model in timed if isinstance(model, bytes)]
    assert len(set(chains)) == len(chains) - 1  # the layer itself again, beside the network


def test_a_layer_called_twice_is_timed_for_both(timed: list[bytes | str]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(nn.functional.max_pool2d(self.conv(x), 2))

    found = tdfx.capture(Twice().eval(), torch.randn(1, 16, 8, 8))
    profile = tdfx.profile(found, methods=["spatial_svd"])
    rows = measure_latency(found, profile).by_candidate
    for candidate in profile.candidates:
        wanted = 2 * 2e-6 + 1e-9 * candidate.cost.macs
        assert rows[candidate.site, candidate.method, candidate.rank] == pytest.approx(wanted, abs=1e-9)


def test_ruled_profiles_are_timed_against_their_layers(timed: list[bytes | str]) -> None:
    profile = tdfx.profile(captured(), methods=["spatial_svd"], ranks="ratio=0.3")
    table = measure_latency(captured(), profile)
    assert {row.site for row in table.rows if row.method == "dense"} == {site.name for site in profile.sites}
    assert with_latency(profile, table).before.latency_s == pytest.approx(table.network_s, abs=1e-9)


# --- what does not fit ---


def test_tables_of_other_networks_are_refused(table: LatencyTable) -> None:
    with pytest.raises(PlanError, match="of another network"):
        with_latency(replace(profiled(), structure="other"), table)
    with pytest.raises(PlanError, match="no time of spatial_svd 4 at 2; measure this profile"):
        kept = [row for row in table.rows if (row.site, row.method, row.rank) != ("2", "spatial_svd", (4,))]
        with_latency(profiled(), replace(table, rows=tuple(kept)))
    with pytest.raises(PlanError, match="no time of 2 as it is"):
        kept = [row for row in table.rows if row.site != "2" or row.rank]
        with_latency(profiled(), replace(table, rows=tuple(kept)))
    with pytest.raises(PlanError, match="of another structure"):
        measure_latency(captured(), replace(profiled(), structure="other"))


def test_a_table_of_other_layers_names_them(table: LatencyTable) -> None:
    fewer = tdfx.profile(captured(), methods=["svd", "spatial_svd", "tucker2"], rank_multiple=4, exclude=["2"])
    with pytest.raises(PlanError, match="the latency table holds besides 2, unlike the profile; measure this profile"):
        with_latency(fewer, table)
    kept = tuple(row for row in table.rows if row.site not in ("2", "4"))
    with pytest.raises(PlanError, match="the latency table lacks 2, 4, unlike the profile"):
        with_latency(profiled(), replace(table, rows=kept))


def test_ranks_off_the_device_s_grid_are_told(table: LatencyTable) -> None:
    assert notes_on(table, profiled()) == notes_on(replace(table, rank_grid=4), profiled()) == ()
    (note,) = notes_on(replace(table, rank_grid=8), profiled())
    assert note.startswith("ranks are multiples of 4, and the device's grid is 8: profile with rank_multiple=8")
    assert notes_on(replace(table, rank_grid=8, disturbed=1), profiled())[1:] == (note,)


def test_a_session_that_does_not_open_is_a_plain_error(
    timed: list[bytes | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(model: bytes | str, runtime: Any, feed: Any = None) -> runner.Run:
        raise ValueError("provider 'Fast' does not start here")

    monkeypatch.setattr(runner, "session_run", refused)
    for work in (
        lambda: measure_latency(captured(), profiled()),
        lambda: measured_rank_grid(Runtime()),
        lambda: guard_stage.with_time(captured(), compress("flops=60%"), Runtime()),
    ):
        with pytest.raises(OptionError, match="latency cannot be measured: provider 'Fast' does not start here"):
            work()


def test_times_for_inputs_of_other_shapes_are_refused(timed: list[bytes | str], table: LatencyTable) -> None:
    larger = tdfx.capture(network()[:6], torch.randn(1, 3, 16, 16))
    profile = tdfx.profile(larger, methods=["spatial_svd"])
    smaller = tdfx.capture(network()[:6], INPUT)
    told = r"layer 0 is called on \(1, 3, 16, 16\) there, here on \(1, 3, 12, 12\); profile these inputs"
    with pytest.raises(PlanError, match=told):
        measure_latency(smaller, profile)
    with pytest.raises(PlanError, match="of inputs of other shapes"):
        with_latency(tdfx.profile(smaller, methods=["spatial_svd"]), measure_latency(larger, profile))


def test_layers_that_are_not_float32_are_refused() -> None:
    found = tdfx.capture(nn.Sequential(nn.Linear(64, 64)).double().eval(), torch.randn(2, 64, dtype=torch.float64))
    with pytest.raises(OptionError, match="layer 0 is float64; latency is measured in float32 only"):
        measure_latency(found, tdfx.profile(found))


def test_tables_are_read_back(table: LatencyTable) -> None:
    assert LatencyTable.from_json(table.to_json()) == table
    assert "whole network" in str(table)
    with pytest.raises(PlanError, match="latency table"):
        LatencyTable.from_json("{}")
    with pytest.raises(PlanError, match="two times"):
        replace(table, rows=(*table.rows, table.rows[0]))


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, None])
def test_threads_are_a_number(threads: Any) -> None:
    with pytest.raises(OptionError, match="threads is"):
        Runtime(threads=threads)


# --- devices ---


def test_a_kit_runs_without_torch(tmp_path: Path) -> None:
    folder = write_latency_kit(captured(), profiled(), tmp_path / "kit")
    network = onnx.load(str(folder / "network.onnx"))
    assert (network.opset_import[0].version, network.ir_version) == (18, 8)
    sizes = [path.stat().st_size for path in (folder / "models").iterdir()]
    assert sum(sizes) < 1000 * len(sizes)
    python = os.environ.get("TDFX_DEVICE_PYTHON", sys.executable)
    script = (
        "import runpy, sys; sys.modules.update(torch=None, onnx=None, tdfx=None, scipy=None); "
        f"sys.argv = ['run.py', '--seconds', '0']; runpy.run_path({str(folder / 'run.py')!r}, run_name='__main__')"
    )
    subprocess.run([python, "-W", "error", "-c", script], check=True, cwd=tmp_path, capture_output=True)
    table = LatencyTable.from_json((folder / "latency.json").read_text())
    assert table.structure == timed_structure(profiled())
    assert len(table.rows) == len(profiled().candidates)
    assert all(row.latency_s > 0 for row in table.rows) and table.rank_grid in (1, 2, 4, 8, 16, 32, None)
    assert tdfx.plan(with_latency(profiled(), table), "flops=70%").latency_source == "measured"


def test_a_kit_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise tdfx.ExportError("no")

    monkeypatch.setattr("tdfx.stages.latency.export_onnx", fail)
    with pytest.raises(tdfx.ExportError):
        write_latency_kit(captured(), profiled(), tmp_path / "kit")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / "kit").mkdir()
    assert (write_latency_kit(captured(), profiled(), tmp_path / "kit") / "run.py").exists()


def test_kits_need_a_new_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        write_latency_kit(captured(), profiled(), tmp_path)
    with pytest.raises(InputError, match="cannot make"):
        write_latency_kit(captured(), profiled(), tmp_path / "mine")


# --- timed before they are handed over ---


Ratios = Callable[[list[float]], list[float]]


def test_disturbed_times_are_told_and_not_kept(
    timed: list[bytes | str], ratios: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "waiting", lambda since: 0.5)
    table = measure_latency(captured(), profiled(), cache_dir=tmp_path)
    assert table.disturbed == 5 and "other processes ran while 5 groups" in str(table)  # the network counts as one
    assert replace(table, disturbed=0) == measured_once()
    assert not list(tmp_path.glob("latency-*.json"))
    ratios[:] = [1.0]
    assert any("other processes ran" in note for note in compress("latency=60%").report.notes)


def test_a_provider_that_is_not_there_is_refused() -> None:
    with pytest.raises(OptionError, match=r"provider 'Fast' is not in this ONNX Runtime; expected one of .*CPU"):
        compress("latency=60%", runtime=Runtime(provider="Fast"))


def test_options_of_other_types_are_refused() -> None:
    with pytest.raises(OptionError, match="latency is a str; expected a LatencyTable"):
        compress("latency=60%", latency="latency.json")
    with pytest.raises(OptionError, match=r"runtime is a dict; expected a tdfx\.Runtime"):
        compress("latency=60%", runtime={"threads": 2})
    with pytest.raises(OptionError, match="expected text, and a dictionary of texts"):
        Runtime(config={"session.intra_op.allow_spinning": 1})  # type: ignore[dict-item]
    with pytest.raises(OptionError, match="provider 'Fast' is not in this ONNX Runtime"):
        measure_latency(captured(), profiled(), runtime=Runtime(provider="Fast"))


def test_a_disturbed_rank_grid_is_neither_taken_nor_kept(
    timed: list[bytes | str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = len(sweep())
    monkeypatch.setattr(runner, "waiting", lambda since: 0.5)
    assert measured_rank_grid(Runtime(), tmp_path) == ORT_CPU.rank_grid
    monkeypatch.setattr(runner, "waiting", lambda since: 0.0)
    # The clock of these tests knows no blocks.
    assert [measured_rank_grid(Runtime(), tmp_path) for _ in range(2)] == [1, 1]
    assert len(timed) == 2 * widths
    measured_rank_grid(Runtime(threads=2), tmp_path)
    assert len(timed) == 3 * widths


@pytest.mark.parametrize("pace", [1.0, 2.5])
def test_corrected_times_predict_what_was_measured(table: LatencyTable, pace: float) -> None:
    found = with_latency(profiled(), table)
    chosen = tdfx.plan(found, "latency=60%")
    before_s = chosen.before.latency_s
    assert before_s is not None
    measured = guard_stage.measured_of([pace * before_s] * 5, [pace * 0.72 * before_s] * 5, chosen, Runtime())
    scaled = corrected_times(found, chosen, measured)
    by_candidate = {(c.site, c.method, c.rank): c.cost for c in scaled.candidates}
    again = sum((by_candidate[c.site, c.method, c.rank] for c in chosen.candidates), start=scaled.rest)
    assert again.latency_s == pytest.approx(pace * 0.72 * before_s, rel=1e-4)
    assert scaled.before.latency_s == pytest.approx(pace * before_s, rel=1e-4)
    as_it_is = tuple(candidate for candidate in scaled.candidates if candidate.is_dense)
    dense = replace(chosen, candidates=as_it_is, before=scaled.before, after=scaled.before)
    same = corrected_times(scaled, dense, replace(measured, ratio=1.5))  # no chain, nothing to correct
    for before, after in zip(scaled.candidates, same.candidates, strict=True):
        assert after.cost.latency_s == pytest.approx(before.cost.latency_s, abs=2e-9)


def test_a_real_measurement_end_to_end(tmp_path: Path) -> None:
    result = compress("latency=90%", cache_dir=tmp_path)
    measured = result.report.measured
    assert measured is not None and min(measured.original_s, measured.compressed_s, measured.ratio) > 0
    assert measured.quartiles[0] <= measured.ratio <= measured.quartiles[1]
    assert result.plan.latency_source == "measured"


def test_the_grid_is_measured_where_it_is_not_given(
    timed: list[bytes | str], ratios: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdfx.stages.compress.measured_rank_grid", lambda runtime, cache_dir: 8)
    ratios[:] = [1.0]
    assert tdfx.compress(network(), INPUT, budget="latency=60%", methods=["spatial_svd"]).plan.rank_multiple == 8
