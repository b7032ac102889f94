"""The functions, methods and attributes that a saved graph may call: those that compute with tensors.

A file names them; nothing is imported or looked up for it outside these lists, and no function on them reads or
writes files, runs code or shows memory that is not a tensor's.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import get_overridable_functions

from tdfx.errors import InputError

_OPERATORS = (
    "abs add and_ contains eq floordiv ge getitem gt index inv invert is_ is_not le lshift lt matmul mod mul ne neg "
    "not_ or_ pos pow rshift sub truediv truth xor iadd iand ifloordiv ilshift imatmul imod imul ior ipow irshift isub "
    "itruediv ixor"
)
_FACTORIES = (
    "arange as_tensor complex empty empty_like empty_strided eye fill full full_like linspace logspace normal ones "
    "ones_like promote_types rand rand_like randint randint_like randn randn_like randperm range result_type "
    "scalar_tensor tensor tril_indices triu_indices vander zeros zeros_like hann_window hamming_window _assert "
    "_sym_sqrt sym_float sym_int sym_ite sym_max sym_min sym_not sym_sum broadcast_shapes is_tensor sigmoid tanh"
)
_PYTHON = "hardsigmoid hardswish sigmoid softmin tanh upsample upsample_bilinear upsample_nearest"
_MATH = "ceil floor sqrt trunc"
_METHODS = "new_empty new_full new_ones new_tensor new_zeros sigmoid stride tanh unflatten"
_NO_METHODS = (
    "apply_ backward const_data_ptr data_ptr is_set_to map_ map2_ module_load numpy pin_memory record_stream "
    "register_hook register_post_accumulate_grad_hook resize resize_ resize_as resize_as_ resize_as_sparse_ "
    "retain_grad set_ share_memory_ sparse_resize_ sparse_resize_and_clear_ storage storage_type untyped_storage"
)
_ATTRIBUTES = (
    "H T data device dtype imag is_complex is_cpu is_cuda is_floating_point is_leaf is_sparse itemsize layout mH mT "
    "nbytes ndim real requires_grad shape"
)
# Operators of aten with an underscore that exported graphs hold; others may trust their arguments.
_ATEN = (
    "__and__ __lshift__ __or__ __rshift__ __xor__ _adaptive_avg_pool2d _adaptive_avg_pool3d _assert_async "
    "_assert_scalar _assert_tensor_metadata _cdist_forward _log_softmax _native_batch_norm_legit "
    "_native_batch_norm_legit_no_training _safe_softmax _scaled_dot_product_flash_attention_for_cpu _softmax "
    "_to_copy _unsafe_view _weight_norm"
)
# Functions that trust indices or packed data in their arguments, and could be led outside of a tensor by them.
_TRUSTING = re.compile(
    "sparse|quantiz|fbgemm|mkldnn|cudnn|miopen|nested|jagged|packed|segment_reduce|lu_solve|lu_unpack|ldl_solve|ormqr|q_per"
)
DICT = "builtins.dict"
_NO_ATEN = "data from_file rename rename_ set_data tofile"


def function_name(function: Callable[..., Any]) -> str:
    """The name a function is saved under; that of ``dict`` for classes that hold a model's outputs by name.

    Raises:
        InputError: it is no function that computes with tensors.
    """
    if isinstance(function, torch._ops.OpOverload):
        name = str(function)
        if find_function(name) is function:
            return name
    if holds_outputs(function):
        return DICT
    try:
        return _names()[id(function)]
    except KeyError as error:
        raise InputError(
            f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)} is no function of "
            "torch that computes with tensors"
        ) from error


def holds_outputs(function: object) -> bool:
    """Whether a graph calls a class of a user's own to return outputs by name."""
    return isinstance(function, type) and (is_dataclass(function) or issubclass(function, Mapping))


def find_function(name: object) -> Callable[..., Any]:
    """The function of a name that ``function_name`` gave.

    Raises:
        InputError: there is none.
    """
    found = _functions().get(name) if isinstance(name, str) else None
    if found is not None:
        return found
    parts = name.split(".") if isinstance(name, str) else []
    if len(parts) == 3 and parts[0] == "aten" and _is_aten(parts[1]) and parts[2] != "data":
        overload = getattr(getattr(torch.ops.aten, parts[1], None), parts[2], None)
        if isinstance(overload, torch._ops.OpOverload):
            return overload
    raise InputError(f"{name!r} is no function of torch that computes with tensors")


@cache
def methods() -> frozenset[str]:
    """Names of the methods of tensors that may be called."""
    names = {getattr(method, "__name__", "_") for method in get_overridable_functions()[torch.Tensor]}
    names = {name for name in names if not name.startswith("_") and callable(getattr(torch.Tensor, name, None))}
    names = {name for name in names if not _TRUSTING.search(name)}
    return frozenset((names | set(_METHODS.split())) - {"new", *_NO_METHODS.split()})


@cache
def attributes() -> frozenset[str]:
    """Names of the attributes of tensors, and of tuples of them that torch returns, that may be read."""
    fields = {name for kind in torch.return_types.all_return_types for name in getattr(kind, "__match_args__", ())}
    return frozenset(fields | set(_ATTRIBUTES.split()))


def _is_aten(name: str) -> bool:
    if _TRUSTING.search(name):
        return False
    if name.startswith("_"):
        return name in _ATEN.split()
    return name not in _NO_ATEN.split() and not name.startswith(("resize", "set_", "sparse_resize", "record_stream"))


@cache
def _functions() -> dict[str, Callable[..., Any]]:
    overridable = get_overridable_functions()
    named: dict[str, Callable[..., Any]] = {DICT: dict}
    for module, names in ((operator, _OPERATORS), (torch, _FACTORIES), (F, _PYTHON), (math, _MATH)):
        named |= {f"{module.__name__}.{name}": getattr(module, name) for name in names.split()}
    for namespace in (F, torch, torch.linalg, torch.fft, torch.special):
        known = {id(function) for function in (*overridable[namespace], *overridable[torch.functional])}
        public = {name: value for name, value in vars(namespace).items() if name[0] != "_" and callable(value)}
        for name, value in public.items():
            out_of_place = public.get(name.removesuffix("_"))  # those that write into their argument are not listed
            if id(out_of_place) in known and not isinstance(value, type) and not _TRUSTING.search(name):
                named.setdefault(f"{namespace.__name__}.{name}", value)
    return named


@cache
def _names() -> dict[int, str]:
    return {id(function): name for name, function in reversed(_functions().items())}
