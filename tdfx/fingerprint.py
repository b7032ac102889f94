"""Fingerprints that tie a plan to the model it was made for."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from tdfx.layouts import strided_parts


def structure_fingerprint(model: nn.Module) -> str:
    """Hash of all names, classes, options, shapes and dtypes, whatever the weights."""
    state = [(name, tuple(value.shape), str(value.dtype)) for name, value in _tensors(model).items()]
    return _digest(repr((repr(model), state)).encode())


def weights_fingerprint(model: nn.Module) -> str:
    """Hash of the names and bits of all parameters and buffers in the state dict."""
    digest = hashlib.sha256()
    for name, value in _tensors(model).items():
        digest.update(f"{name} {tensor_digest(value)}\n".encode())
    return digest.hexdigest()[:32]


def tensor_digest(tensor: Tensor) -> str:
    """Hash of a tensor's dtype, shape and bits."""
    parts = (part.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for part in strided_parts(tensor))
    bits = b"".join(part.numpy().tobytes() for part in parts)
    return _digest(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + bits)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without what ``get_extra_state`` adds, which may be of any type."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
