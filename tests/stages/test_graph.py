"""A network as a graph: what is shown, in figures and in pictures."""

# Calling a module returns Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tdfx
from tdfx.decompositions import registry
from tdfx.drawing.dot import to_dot
from tdfx.drawing.picture import Box, Picture, color, picture
from tdfx.errors import InputError, OptionError, PlanError
from tdfx.records.capture import Capture
from tdfx.records.plan import Plan


class Branches(nn.Module):
    """Two branches from one stem, joined; a tied head, a product without weights, a layer that is not compressed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.wide, self.thin = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.tied, self.head = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.head.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.depthwise(self.wide(x).relu() + self.thin(x))).flatten(2)
        x = x @ x.transpose(1, 2) / x.shape[1]
        return self.head(self.tied(x).relu())


X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@cache
def captured() -> Capture:
    torch.manual_seed(0)
    return tdfx.capture(Branches().eval(), X)


@cache
def planned() -> Plan:
    profiled = tdfx.profile(captured(), methods=["svd", "spatial_svd"], rank_multiple=1)
    return tdfx.plan(profiled, "flops=60%")


@cache
def shown(with_plan: bool) -> Picture:
    return picture(tdfx.graph(captured(), planned() if with_plan else None))


def test_layers_products_and_joins_are_shown_and_nothing_else() -> None:
    found = shown(False)
    kinds = {box.lines[0]: box.kind for box in found.boxes.values()}
    assert kinds == {
        "x 1x3x16x16": "end", "stem": "dense", "wide": "dense", "thin": "dense", "+": "join", "depthwise": "skipped",
        "matmul": "no weights", "tied": "dense", "head": "dense", "output 1x32x32": "end",
    }  # fmt: skip
    names = {name: box.lines[0] for name, box in found.boxes.items()}
    assert [(names[source], names[user]) for source, user in found.edges] == [
        ("x 1x3x16x16", "stem"), ("stem", "wide"), ("stem", "thin"), ("wide", "+"), ("thin", "+"), ("+", "depthwise"),
        ("depthwise", "matmul"), ("matmul", "tied"), ("tied", "head"), ("head", "output 1x32x32"),
    ]  # fmt: skip


def test_labels_say_shape_rank_and_share() -> None:
    whole = captured().workloads
    macs = sum(workload.macs for workload in whole)
    dense, made = ({box.lines[0]: box for box in shown(flag).boxes.values()} for flag in (False, True))
    part = f"{100 * 9 * 32 * 32 * 256 / macs:.1f}%"
    assert dense["wide"].lines[1] == f"32 to 32, 3 x 3, {part}"
    wide = next(candidate for candidate in planned().candidates if candidate.site == "wide")
    assert made["wide"].kind == wide.method == "spatial_svd"
    after = f"{100 * wide.cost.macs / macs:.1f}%"
    assert made["wide"].lines[1] == f"32 to 32, 3 x 3, spatial_svd {wide.rank[0]}, {part} to {after}"
    assert re.fullmatch(r"Conv2d, \d\.\d%", made["depthwise"].lines[1])
    assert shown(True).title == f"Branches, {100 * planned().after.macs / macs:.1f}% of the FLOPs"


def test_the_slower_branch_is_the_critical_path() -> None:
    critical = {box.lines[0]: box.critical for box in shown(False).boxes.values()}
    assert critical["wide"] and critical["+"] and critical["stem"] and not critical["thin"]
    found = tdfx.graph(captured())
    path = found.critical_path
    assert path is not None and path.total_s == pytest.approx(planned().before.latency_s)
    seconds = {name: entry["operation"].latency_s for name, entry in found.dependencies.nodes.items()}
    assert path.latency_s == pytest.approx(path.total_s - seconds["thin"])


def test_a_plan_brings_its_latencies() -> None:
    plan = planned()
    slow = [replace(c, cost=replace(c.cost, latency_s=1.0 if c.site == "thin" else 0.0)) for c in plan.candidates]
    path = tdfx.graph(captured(), replace(plan, candidates=tuple(slow))).critical_path
    assert path is not None and "thin" in path.nodes and "wide" not in path.nodes
    assert path.latency_s == pytest.approx(1.0, rel=0.01)
    assert tdfx.graph(captured(), plan).macs_after == plan.after.macs


def test_latency_is_not_shown_without_an_estimate() -> None:
    found = tdfx.graph(captured(), target=None)
    assert found.critical_path is None
    assert "critical" not in str(found) and "critical" not in picture(found).about
    assert not any(box.critical for box in picture(found).boxes.values())


def test_figures_are_printed() -> None:
    text = str(tdfx.graph(captured(), planned()))
    assert text.startswith("Branches: 5 layers (")
    assert "1 skipped" in text
    assert "\nshared parameters head, tied" in text
    assert re.search(r"\ncritical path     \S+ ms, \d\d\.\d% of \S+ ms", text)
    assert re.search(r"\nactivation bytes  98.3K at the peak", text)  # the sum and its two terms, 32 KiB each


def test_the_report_has_the_peak_before_and_after() -> None:
    report = tdfx.apply(captured().original, X, planned()).report
    found = report.peak_activation_bytes
    assert found is not None and found.before == tdfx.graph(captured()).peak_activation_bytes
    assert found.after >= found.before
    assert tdfx.Report.from_json(report.to_json()) == report
    older = replace(report, peak_activation_bytes=None)
    text = older.to_json().replace(',\n  "peak_activation_bytes": null', "")
    assert "peak" not in text and tdfx.Report.from_json(text) == older
    assert "activation bytes" in str(report) and "activation bytes" not in str(older)


def test_plans_of_other_models_are_refused() -> None:
    with pytest.raises(PlanError, match="another structure"):
        tdfx.graph(tdfx.capture(nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3)), planned())
    with pytest.raises(PlanError, match="trainable=True, the model captured with False"):
        tdfx.graph(captured(), replace(planned(), trainable=True))
    with pytest.raises(OptionError, match="target"):
        tdfx.graph(captured(), target="abacus")


# Files


def test_every_method_has_a_colour_of_its_own() -> None:
    colors = [color(kind) for kind in (*registry(), "dense", "skipped", "no weights")]
    assert len(set(colors)) == len(colors)


def test_svg_names_every_layer_and_is_the_same_each_time(tmp_path: Path) -> None:
    found = tdfx.graph(captured(), planned())
    for name in ("a.svg", "b.svg"):
        found.draw(tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    texts = ["".join(entry.itertext()).strip() for entry in ElementTree.parse(tmp_path / "a.svg").iter()]
    for box in shown(True).boxes.values():
        assert set(box.lines) <= set(texts)
    assert "spatial_svd (1)" in texts or "spatial_svd (2)" in texts


def test_png_is_drawn(tmp_path: Path) -> None:
    tdfx.graph(captured()).draw(str(tmp_path / "net.PNG"))
    assert (tmp_path / "net.PNG").read_bytes().startswith(b"\x89PNG")


def test_dot_holds_what_is_shown(tmp_path: Path) -> None:
    tdfx.graph(captured(), planned()).draw(tmp_path / "net.dot")
    text = (tmp_path / "net.dot").read_text()
    assert text == to_dot(shown(True))
    for box in shown(True).boxes.values():
        label = "\\n".join(box.lines)
        assert f'  "{box.name}" [label="{label}" ' in text
    assert text.count(" -> ") == len(shown(True).edges)


def test_dot_quotes_what_it_names() -> None:
    box = Box('a"b\\', ('say "hi"', "back\\slash"), "dense")
    text = to_dot(Picture('t"', "about", {box.name: box}, ((box.name, box.name),)))
    assert 'digraph "t\\"" {' in text
    assert '  "a\\"b\\\\" [label="say \\"hi\\"\\nback\\\\slash" ' in text
    assert '  "a\\"b\\\\" -> "a\\"b\\\\";' in text


@pytest.mark.parametrize("name", ["net.pdf", "net", ".svg"])
def test_other_formats_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a name that ends in \.dot, \.svg, \.png"):
        tdfx.graph(captured()).draw(tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_text_takes_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    tdfx.graph(captured()).draw(tmp_path / "net.dot")
    with pytest.raises(InputError, match=r"pip install tdfx\[plots\]"):
        tdfx.graph(captured()).draw(tmp_path / "net.svg")


def test_networks_of_one_function_are_drawn(tmp_path: Path) -> None:
    found = tdfx.graph(tdfx.capture(nn.Sequential(nn.ReLU()), torch.randn(2, 3)))
    assert nx.is_directed_acyclic_graph(found.dependencies) and found.critical_path is None
    found.draw(tmp_path / "net.svg")
    assert [box.kind for box in picture(found).boxes.values()] == ["end", "end"]
    assert str(found).startswith("Sequential: 0 layers, 0 skipped")


class Branching(nn.Module):
    """Layers called in an order that values decide, two of them with one weight. Input (batch, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.tied = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(128, 64)
        self.tied.weight = self.narrow.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.narrow(self.wide(x))
        return self.tied(self.wide(y)) if x.sum() > 0 else y


def test_layers_inside_python_code_are_shown_in_the_order_of_their_calls(tmp_path: Path) -> None:
    captured = tdfx.capture(Branching().eval(), torch.ones(2, 64))
    plan = tdfx.plan(tdfx.profile(captured, target=None), "flops=90%")
    found = tdfx.graph(captured, plan)
    assert (found.peak_activation_bytes, found.critical_path) == (None, None)
    assert "activation bytes  not known: the model was captured in place" in str(found)
    assert found.sharing == (("narrow", "tied"),)
    shown = picture(found)
    assert list(shown.boxes) == ["wide[0]", "narrow[0]", "wide[1]", "tied[0]"]
    assert shown.edges == (("wide[0]", "narrow[0]"), ("narrow[0]", "wide[1]"), ("wide[1]", "tied[0]"))
    assert shown.boxes["wide[1]"].kind == "svd"
    assert found.macs_after < found.macs == sum(workload.macs for workload in captured.workloads)
    found.draw(tmp_path / "found.svg")
