"""Reads ``.pt2`` files of torch.export.save without running code from them.

torch.export.load unpickles where a file asks for it, evaluates expressions for sizes and resolves operators by name, so
that a file could hold a program of any kind (its documentation warns of that). What is read here is checked before: no
pickled weights or objects, no libraries, expressions made of symbols and arithmetic, operators of torch alone.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from tdfx.contained import quiet, reason
from tdfx.errors import InputError

_DATA = re.compile(
    r"[^/]+/(\.?data/version|\.data/serialization_id|byteorder|archive_format|archive_version|version"
    r"|models/model\.json|data/sample_inputs/model\.pt|data/(weights|constants)/[\w.]+)"
)
_OPERATOR = re.compile(r"torch\.ops\.(aten|higher_order)\.\w+(\.\w+)?|_?operator\.\w+|math\.\w+|torch\.(_?sym_\w+)")
_WORDS = (
    "Symbol|Integer|Float|Rational|Mul|Add|Pow|Min|Max|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|IntTrueDiv|ToFloat"
    "|TruncToInt|CeilToInt|FloorToInt|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|Equality|Unequality|LessThan|StrictLessThan"
    "|GreaterThan|StrictGreaterThan|positive|integer|nonnegative|precision|True|False|true|false"
)
_EXPRESSION = re.compile(rf"(?:'[a-z]\d+'|'[-+.e\d]+'|-?\d+|[(),= ]|\b(?:{_WORDS})\b)*")


def load_program(path: str | Path) -> ExportedProgram:
    """The exported program in a ``.pt2`` file.

    Raises:
        InputError: the file is missing or broken, or reading it could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"model {path}: there is no such file; expected one that torch.export.save wrote")
    content = path.read_bytes()  # what is checked is what is read
    try:
        _check(content)
        with quiet():
            program: ExportedProgram = torch.export.load(io.BytesIO(content))
    except _RefusedError as error:
        raise InputError(
            f"model {path}: refused, since reading it could run code ({error}); export the model anew"
        ) from None
    except Exception as error:
        raise InputError(
            f"model {path}: cannot be read ({reason(error)}); expected a file that torch.export.save of torch "
            f"{torch.__version__} wrote"
        ) from error
    return program


class _RefusedError(Exception):
    """What in a file is no plain data."""


def _check(content: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in archive.namelist():
            if not _DATA.fullmatch(name):
                raise _RefusedError(f"it holds {name!r}")
            if name.endswith(".json"):
                for value in _objects(json.loads(archive.read(name))):
                    _check_object(value)
            if name.endswith("/model.pt"):
                _check_tensors(archive.read(name))


def _check_object(value: dict[str, Any]) -> None:
    if value.get("use_pickle", False) is not False:
        raise _RefusedError("it asks for pickle")
    if {"target", "inputs", "outputs"} <= value.keys() and not _OPERATOR.fullmatch(str(value["target"])):
        raise _RefusedError(f"it calls {value['target']!r}")
    if "expr_str" in value and not _EXPRESSION.fullmatch(str(value["expr_str"])):
        raise _RefusedError(f"a size is {str(value['expr_str'])[:60]!r}")


def _check_tensors(content: bytes) -> None:
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise _RefusedError("its example inputs are no plain tensors") from error


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All objects of nested JSON."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(inner)
