"""Outputs in classes that torch knows nothing of, as the cache of a language model: their tensors, and the rest."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor, fx

from tdfx.errors import CaptureError

_OF_PYTHON_AND_TORCH = ("builtins", "torch")
_SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)


def taken_apart(value: Any) -> tuple[str, list[Tensor]] | None:
    """An object without its tensors, and these in order; None for one that has none or cannot be taken apart.

    What is left is a text, since a graph holds no bytes.

    Raises:
        CaptureError: what is left is made of sizes that are to stay free, and would be of one size alone.
    """
    if type(value).__module__.partition(".")[0] in _OF_PYTHON_AND_TORCH or callable(value):
        return None
    file = io.BytesIO()
    pickler = _Pickler(file)
    try:
        pickler.dump(value)
    except CaptureError:
        raise
    except Exception:  # any code of the object's own
        return None
    return (file.getvalue().hex(), pickler.found) if pickler.found else None


def put_together(rest: str, *tensors: Any) -> Any:
    """The object again, with these tensors; ``rest`` is of this process or of a pickle that is being read."""
    proxy = next((tensor for tensor in tensors if isinstance(tensor, fx.Proxy)), None)
    if proxy is not None:  # pickled graphs are traced anew
        return proxy.tracer.create_proxy("call_function", put_together, (rest, *tensors), {})
    return _Unpickler(rest, tensors).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.found: list[Tensor] = []

    def persistent_id(self, obj: Any) -> int | None:
        if isinstance(obj, _SIZES):
            raise CaptureError("an output holds sizes of the inputs in an object that is no container of tensors")
        if not isinstance(obj, Tensor):
            return None
        self.found.append(obj)
        return len(self.found) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, rest: str, tensors: tuple[Any, ...]) -> None:
        super().__init__(io.BytesIO(bytes.fromhex(rest)))
        self.tensors = tensors

    def persistent_load(self, pid: int) -> Any:
        return self.tensors[pid]
