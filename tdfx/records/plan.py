"""A plan: one candidate per site, with all that is needed to carry it out again; JSON that a person can edit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from tdfx.errors import PlanError
from tdfx.records.candidate import Candidate, format_rank
from tdfx.records.cost import Cost
from tdfx.records.layer import Skipped
from tdfx.tables import align, count, seconds

VERSION = 1
MOST_SEED = 2**63 - 1  # torch takes no larger one
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What becomes of every compressible layer.

    Attributes:
        candidates: one per site, in order of execution.
        skipped: layers left as they are, with reasons.
        budget: the budget as asked for.
        before: cost of the whole model as given.
        after: cost of the whole model with these candidates.
        metric: of the candidates' errors.
        planner: what chose them.
        target: runtime whose latency is estimated, or None.
        rank_multiple: grid of the ranks offered.
        trainable: whether BatchNorm and Dropout are kept.
        seed: of the decompositions.
        latency_source: "estimated", "measured", or None without a target.
        structure: fingerprint of the model's names, shapes and options.
        weights: fingerprint of its weights.
        notes: what the user should know, e.g. that ranks off the grid were needed.

    Raises:
        PlanError: a site has several candidates, or a candidate and a skip, or the seed is too large.
    """

    candidates: tuple[Candidate, ...]
    skipped: tuple[Skipped, ...]
    budget: str
    before: Cost
    after: Cost
    metric: str
    planner: str
    target: str | None
    rank_multiple: int
    trainable: bool
    seed: int
    latency_source: str | None
    structure: str
    weights: str
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.seed > MOST_SEED:
            raise PlanError(f"the plan's seed is {self.seed}; expected at most {MOST_SEED}")
        names = [candidate.site for candidate in self.candidates]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise PlanError(f"the plan has more than one candidate for {', '.join(twice)}; keep one each")
        both = [entry.layer for entry in self.skipped if entry.layer in names]
        if both:
            raise PlanError(f"the plan both skips and has a candidate for {', '.join(both)}; keep one of the two")

    def __str__(self) -> str:
        header = ("layer", "method", "rank", "params", "macs", "latency", "error")
        rows = [
            (c.site, c.method, format_rank(c.rank), count(c.cost.params), count(c.cost.macs),
             seconds(c.cost.latency_s), f"{c.error:.4g}")
            for c in self.candidates
        ]  # fmt: skip
        totals = [
            (name, "", "", count(cost.params), count(cost.macs), seconds(cost.latency_s), "")
            for name, cost in (("whole model before", self.before), ("whole model after", self.after))
        ]
        lines = [align(header, [*rows, *totals], right=(3, 4, 5, 6))]
        lines.append(
            f"budget {self.budget}; error is {self.metric}; latency is {self.latency_source or 'not estimated'}"
        )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_json(self) -> str:
        """JSON text with one candidate a line; ``from_json`` gives an equal plan back."""
        values = {"version": VERSION, **asdict(self)}
        rows = {name: values.pop(name) for name in ("candidates", "skipped")}
        text = json.dumps(values, indent=2, allow_nan=False)
        for name, entries in rows.items():
            body = ",\n".join(f"    {json.dumps(entry, allow_nan=False)}" for entry in entries)
            text = f'{text[:-2]},\n  "{name}": [\n{body}\n  ]\n}}' if entries else f'{text[:-2]},\n  "{name}": []\n}}'
        return text + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Reads what ``to_json`` wrote or a person edited.

        Raises:
            PlanError: naming the field that is missing, unknown or of the wrong type, the version, or the site.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"the plan is no JSON: {error}") from error
        if not isinstance(values, dict):
            raise PlanError(f"the plan is a JSON {type(values).__name__}; expected an object")
        version = values.pop("version", None)
        if not _is_int(version) or version != VERSION:
            raise PlanError(f"the plan has version {version!r}; this tdfx reads version {VERSION}: make the plan anew")
        return _read(cls, values, "plan")


def _read(record: type[T], values: object, where: str) -> T:
    """A frozen dataclass from a JSON object, every field checked."""
    if not isinstance(values, dict):
        raise PlanError(f"{where} is {values!r}; expected an object")
    known = {field.name: field for field in fields(record)}  # type: ignore[arg-type]
    unknown = [name for name in values if name not in known]
    missing = [name for name in known if name not in values and name not in ("notes", "caveat")]
    if unknown or missing:
        named = (("unknown", unknown), ("missing", missing))
        problems = "; ".join(f"{what} {', '.join(map(repr, names))}" for what, names in named if names)
        raise PlanError(f"{where}: {problems}; expected are {', '.join(known)}")
    return record(**{name: _value(str(known[name].type), value, f"{where}.{name}") for name, value in values.items()})


def _value(kind: str, value: object, where: str) -> Any:
    optional, kind = kind.endswith(" | None"), kind.removesuffix(" | None")
    if value is None and optional:
        return None
    if kind.startswith("tuple[") or kind == "Rank":
        if not isinstance(value, list):
            raise PlanError(f"{where} is {value!r}; expected a list")
        element = "rank" if kind == "Rank" else kind.removeprefix("tuple[").removesuffix(", ...]")
        return tuple(_value(element, entry, f"{where}[{index}]") for index, entry in enumerate(value))
    if kind in _RECORDS:
        return _read(_RECORDS[kind], value, where)
    convert, expected = _SCALARS[kind]
    if not convert(value):
        raise PlanError(f"{where} is {value!r}; expected {expected}")
    return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    # JSON has no bounds and Python's reader takes NaN and Infinity.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


_RECORDS: dict[str, type] = {"Candidate": Candidate, "Cost": Cost, "Skipped": Skipped}
_SCALARS: dict[str, tuple[Callable[[object], bool], str]] = {
    "str": (lambda value: isinstance(value, str), "a string"),
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "int": (_is_int, "a whole number of 0 or more"),
    "rank": (lambda value: _is_int(value) and value != 0, "a positive whole number"),
    "float": (_is_number, "a finite number of 0 or more"),
}
