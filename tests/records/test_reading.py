from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pytest

from tdfx.errors import InputError, PlanError
from tdfx.records.layer import Call, LayerSpec, Rank, Shape, Site
from tdfx.records.reading import parse, read


@dataclass(frozen=True)
class Part:
    size: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    by_name: dict[str, Part]
    times: dict[str, float]
    padding: Shape | str
    rank: Rank
    kind: Literal["a", "b"]
    anything: Any
    name: str | None


WHOLE = Whole((Part(1),), {"x": Part(2, ("n",))}, {"t": 0.5}, (0, 1), (3,), "a", [None, {"k": -1}], None)


def edited(**changes: object) -> object:
    return json.loads(json.dumps({**asdict(WHOLE), **changes}))


def test_all_kinds_of_fields_are_read() -> None:
    assert read(Whole, edited(), "whole") == WHOLE
    found = read(Whole, edited(padding="same", name="n", kind="b"), "whole")
    assert (found.padding, found.name, found.kind) == ("same", "n", "b")


def test_sites_and_layers_are_read() -> None:
    layer = LayerSpec("c", "conv2d", 3, 4, (3, 3), (1, 1), "same", "zeros", (1, 1), calls=(Call((1, 3, 4, 4), (1,)),))
    for record in (layer, Site.of(layer)):
        assert read(type(record), json.loads(json.dumps(asdict(record))), "x") == record


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": [{"size": -1}]}, r"^w.parts\[0\].size is -1; expected a whole number of 0 or more$"),
        ({"parts": [{"sizes": 1}]}, r"^w.parts\[0\]: unknown 'sizes'; missing 'size'; expected are size, notes$"),
        ({"by_name": []}, r"^w.by_name is \[\]; expected an object$"),
        ({"by_name": {"x": 1}}, r"^w.by_name\['x'\] is 1; expected an object$"),
        ({"times": {"t": "1"}}, r"^w.times\['t'\] is '1'; expected a finite number of 0 or more$"),
        ({"padding": 3}, r"^w.padding is 3; expected a list; or w.padding is 3; expected a string$"),
        ({"padding": None}, r"^w.padding is None; expected a list"),
        ({"rank": [0]}, r"^w.rank\[0\] is 0; expected a positive whole number$"),
        ({"kind": "c"}, r"^w.kind is 'c'; expected one of 'a', 'b'$"),
        ({"kind": ["a"]}, r"^w.kind is \['a'\]; expected one of"),
        ({"name": 1}, r"^w.name is 1; expected a string$"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        read(Whole, edited(**changes), "w")


def test_the_error_is_the_callers() -> None:
    with pytest.raises(InputError, match=r"^w is 3; expected an object$"):
        read(Whole, 3, "w", InputError)
    with pytest.raises(InputError, match=r"^w\.padding is 3; expected a list; or"):
        read(Whole, edited(padding=3), "w", InputError)
    for text in ("{", "[" * 100_000, '{"a": 1' + "1" * 5000 + "}"):
        with pytest.raises(InputError, match=r"^w is no JSON: "):
            parse(text, "w", InputError)
    with pytest.raises(InputError, match=r"^w is a JSON list; expected an object$"):
        parse("[]", "w", InputError)


def test_layers_written_before_there_was_output_padding_are_read() -> None:
    layer = LayerSpec("a", "conv2d", 4, 6, (3, 3), (1, 1), (1, 1), dilation=(1, 1))
    values = json.loads(json.dumps(asdict(layer)))
    del values["output_padding"]
    assert read(LayerSpec, values, "layer") == layer
