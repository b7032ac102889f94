"""Runs a graph and shows every call of a layer, whether a node makes it or Python code that a node runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from tdfx.contained import plain_attention
from tdfx.passes.capture import has_torch_forward
from tdfx.passes.in_place import InPlace, run_root, sharing


class LayerInterpreter(fx.Interpreter):
    """Base of passes that observe layers, or change what they put out.

    Python code runs on a copy that shares the parameters, so that what it writes to itself is gone afterwards.
    """

    def call_layer(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], forward: Callable[..., Any]) -> Any:
        """One call of the module of this qualified name; what is returned takes the place of its output.

        Args:
            name: as ``self.module`` has it.
            args: positional arguments.
            kwargs: arguments by keyword.
            forward: computes the output.
        """
        return forward(*args, **kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.call_layer(target, args, kwargs, self.fetch_attr(target))

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is not run_root:
            return super().call_function(target, args, kwargs)
        assert isinstance(self.module, InPlace)
        root = sharing(self.module.root)
        for name, module in root.named_modules():
            if name and is_layer(module):
                module.forward = partial(self._forward, name, module.forward)
        with plain_attention():
            return run_root(root, *args[1:], **kwargs)

    def _forward(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.call_layer(name, args, kwargs, forward)


def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The input of a layer, which takes one; None for a module that takes none."""
    return next(iter((*args, *kwargs.values())), None)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is one of torch's, or has none inside, and computes with parameters or buffers of its own."""
    if isinstance(module, torch.jit.ScriptModule) or not (module._parameters or module._buffers):
        return False
    return has_torch_forward(module) or not module._modules
