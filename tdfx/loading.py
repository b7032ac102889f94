"""What the command line names: a model, its weights, example inputs.

Python is run only where the user names it as the model; weights and ``.pt2`` files are read without running any.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pickle
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.export import ExportedProgram

from tdfx.errors import InputError
from tdfx.inputs import as_call
from tdfx.pt2 import load_program
from tdfx.records.inputs import InputSpec

DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
_INPUT = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>[1-9]\d*(?:x[1-9]\d*)*)(?::(?P<dtype>\w+))?", re.ASCII)
_INPUT_FORMS = (
    "expected sizes joined by x, with a dtype other than float32 after a colon, and a name in front for a keyword "
    f"argument: 1x3x224x224, 2x3x8x8:float16 or input_ids=2x128:int64 (dtypes: {', '.join(DTYPES)})"
)
_NAMED = 3  # keys named in a message


def open_model(name: str, weights: Path | None = None) -> nn.Module | ExportedProgram:
    """The model that ``package.module:factory``, ``file.py:factory`` or ``file.pt2`` names, with its weights.

    Args:
        name: as for ``load_model``, or a file that torch.export.save wrote.
        weights: a state dict for the model, as for ``load_weights``; not for ``.pt2`` files, which hold theirs.

    Raises:
        InputError: as for ``load_model``, ``load_weights`` and ``load_program``.
    """
    if is_program(name):
        if weights is not None:
            raise InputError(f"model {name}: a .pt2 file holds its own weights; leave weights {weights} out")
        return load_program(name)
    model = load_model(name)
    if weights is not None:
        load_weights(model, weights)
    return model


def is_program(name: str) -> bool:
    """Whether a name is that of an exported program, which knows example inputs of its own."""
    return name.endswith(".pt2")


def program_inputs(program: ExportedProgram) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The example inputs that a program was exported with.

    Raises:
        InputError: it has none, or they are no tensors.
    """
    if program.example_inputs is None:
        raise InputError("the exported program holds no example inputs; give inputs of the shapes that it takes")
    args, kwargs = program.example_inputs
    return as_call(args, kwargs)


def load_model(name: str) -> nn.Module:
    """The model that ``package.module:factory`` or ``file.py:factory`` names.

    The factory is a callable without arguments that returns a module, or a module itself; dots reach into it. For a
    package the current folder comes first on ``sys.path``, for a file its own folder, and either stays there.

    Raises:
        InputError: nothing of this name can be imported, it raises, or it gives no ``nn.Module``.
    """
    source, _, attribute = name.rpartition(":")
    if not source or not attribute:
        raise InputError(f"model {name!r}: expected package.module:factory or file.py:factory, with a colon")
    module = module_from_file(name, Path(source)) if source.endswith(".py") else module_named(name, source)
    try:
        found = attrgetter(attribute)(module)
    except AttributeError as error:
        offered = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(attribute, offered, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"model {name!r}: {source} has no {attribute!r}{hint}") from error
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise InputError(f"model {name!r}: found a {type(found).__name__}; expected a function or model")
    try:
        model = found()
    except (Exception, SystemExit) as error:
        raise InputError(f"model {name!r}: calling {attribute}() raised {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"model {name!r}: {attribute}() returned a {type(model).__name__}; expected a torch.nn.Module")
    return model


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads a state dict into a model: from ``.safetensors``, or any other name as written by ``torch.save``.

    Raises:
        InputError: the file is missing, cannot be read without running code, or does not fit the model.
    """
    try:
        outcome = model.load_state_dict(_read_state_dict(path), strict=False)
    except RuntimeError as error:  # other shapes
        raise InputError(f"weights {path}: they are of another model: {_some(str(error).splitlines()[1:])}") from error
    different = [
        f"{what} {_some(keys)}"
        for what, keys in (("missing are", outcome.missing_keys), ("unexpected are", outcome.unexpected_keys))
        if keys
    ]
    if different:
        raise InputError(f"weights {path}: they are of another model: {'; '.join(different)}")


def example_inputs(texts: Iterable[str], seed: int = 0) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Example inputs of the shapes that are asked for, positional and by keyword.

    Floating-point inputs are standard normal; integer and boolean ones are zeros and ones, which embeddings of two
    or more rows and masks take.

    Args:
        texts: each ``[name=]shape[:dtype]``, e.g. "1x3x224x224" or "input_ids=2x128:int64"; float32 without a dtype.
        seed: of the values.

    Raises:
        InputError: a text is not understood, a name comes twice, or there is no room for the tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for text in texts:
        match = _INPUT.fullmatch(text)
        if match is None or match["dtype"] not in {None, *DTYPES}:
            raise InputError(f"input {text!r} is not understood; {_INPUT_FORMS}")
        if match["name"] in kwargs:
            raise InputError(f"input {text!r}: {match['name']} is given twice; give each keyword argument once")
        shape = [int(size) for size in match["shape"].split("x")]
        dtype: torch.dtype = DTYPES[match["dtype"] or "float32"]
        value = _draw(text, shape, dtype, generator)
        if match["name"] is None:
            args.append(value)
        else:
            kwargs[match["name"]] = value
    return tuple(args), kwargs


def draw_inputs(specs: Iterable[InputSpec], seed: int = 0) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Inputs as ``example_inputs`` makes them, for specifications that a report holds.

    Raises:
        InputError: a dtype is unknown, or there is no room for the tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for spec in specs:
        if spec.dtype not in DTYPES:
            raise InputError(f"{spec} has an unknown dtype; expected one of {', '.join(DTYPES)}")
        value = _draw(str(spec), list(spec.shape), DTYPES[spec.dtype], generator)
        if spec.name is None:
            args.append(value)
        else:
            kwargs[spec.name] = value
    return tuple(args), kwargs


def _draw(text: str, shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    try:
        if dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(dtype)
        return torch.randint(2, shape, generator=generator).to(dtype)
    except (RuntimeError, TypeError, MemoryError) as error:  # sizes beyond memory, or beyond 64 bits
        raise InputError(f"input {text!r}: no room for a tensor of this shape; give smaller sizes") from error


def module_from_file(name: str, path: Path) -> ModuleType:
    """The module in a file, imported anew; its folder can be imported from too.

    Raises:
        InputError: there is no such file, or importing it fails; names ``name``, what was asked for.
    """
    if not path.is_file():
        raise InputError(f"model {name!r}: there is no file {path}")
    _put_first(path.resolve().parent)
    # A name of its own, so that a model in select.py does not shadow the module of that name.
    spec = importlib.util.spec_from_file_location(f"tdfx_model_{path.stem}", path)
    assert spec is not None  # it is None only for other endings than .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"model {name!r}: importing {path} raised {one_line(error)}") from error
    return module


def module_named(name: str, source: str) -> ModuleType:
    """The module of a dotted name, from the current folder first.

    Raises:
        InputError: it cannot be imported; names ``name``, what was asked for.
    """
    _put_first(Path.cwd())
    try:
        return importlib.import_module(source)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{source}.".startswith(f"{error.name}."):
            where = f"no module {error.name!r} is installed or in the current folder"
            raise InputError(f"model {name!r}: {where}; a file is named with .py, as in net.py:factory") from error
        raise InputError(f"model {name!r}: importing {source} raised {one_line(error)}") from error


def _put_first(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _read_state_dict(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise InputError(f"weights {path}: there is no such file")
    wanted = "expected a state dict, as torch.save(model.state_dict(), path) writes it, or a .safetensors file"
    try:
        with warnings.catch_warnings():  # torch warns of unknown pickles; what follows is an error anyway
            warnings.simplefilter("ignore")
            state: Any = (
                load_file(path)
                if path.suffix == ".safetensors"
                else torch.load(path, map_location="cpu", weights_only=True)
            )
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {found[1]}" if found else "it holds other things than tensors"
        raise InputError(f"weights {path}: refused, since reading it could run code ({reason}); {wanted}") from error
    except Exception as error:
        raise InputError(f"weights {path}: cannot be read ({one_line(error)}); {wanted}") from error
    if not isinstance(state, Mapping):
        raise InputError(f"weights {path}: found a {type(state).__name__}; {wanted}")
    inner = [str(key) for key, value in state.items() if isinstance(value, Mapping)]
    if inner:
        raise InputError(f"weights {path}: found a checkpoint with dictionaries in it ({_some(inner)}); {wanted}")
    strange = [str(key) for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if strange:
        raise InputError(f"weights {path}: found entries that are no named tensors ({_some(strange)}); {wanted}")
    return state


def _some(entries: Sequence[str]) -> str:
    named = ", ".join(entry.strip() for entry in entries[:_NAMED])
    return named if len(entries) <= _NAMED else f"{named} and {len(entries) - _NAMED} more"


def one_line(error: BaseException) -> str:
    """Type and first line of an exception."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
