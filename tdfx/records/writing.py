"""Writes frozen dataclasses as JSON that a person can read and edit."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict
from typing import Any


def to_text(record: Any, version: int, rows: Collection[str]) -> str:
    """JSON text of a record, which ``read_text`` reads: version and fields first, long lists after them.

    Args:
        record: the dataclass.
        version: of the format.
        rows: fields that hold many entries; each entry gets a line of its own.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    values = {"version": version, **asdict(record)}
    lists = {name: values.pop(name) for name in rows}
    text = json.dumps(values, indent=2, allow_nan=False)
    for name, entries in lists.items():
        body = ",\n".join(f"    {json.dumps(entry, allow_nan=False)}" for entry in entries)
        text = f'{text[:-2]},\n  "{name}": [\n{body}\n  ]\n}}' if entries else f'{text[:-2]},\n  "{name}": []\n}}'
    return text + "\n"
