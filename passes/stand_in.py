"""What takes a layer's place inside Python code, and which layers nothing can take the place of.

Code that calls a layer may ask it for its options too, or read its weight: nn.MultiheadAttention does so with the
weight of ``out_proj``, nn.TransformerEncoderLayer in eval mode with all of them. A chain has no such weight. Made up
from the factors it would be right, and what is computed with it as slow as before; so it is refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tdfx.contained import plain_attention, reason
from tdfx.errors import CaptureError
from tdfx.inputs import run
from tdfx.passes.base import call_chain, exchange
from tdfx.passes.capture import has_hooks, has_stock_forward
from tdfx.passes.describe_parameters import LIKE, NEW
from tdfx.passes.in_place import sharing

MAPPED = "forward calls it inside torch.vmap, where its inputs are not seen; call it on the whole batch"
_GETTERS = (
    "dtype", "device", "shape", "ndim", "requires_grad", "is_leaf", "layout", "is_cpu", "is_cuda", "is_mps", "is_xpu",
    "is_meta", "is_mkldnn", "is_sparse", "is_quantized", "is_nested", "itemsize", "nbytes",
)  # fmt: skip
_METHODS = (
    "size",
    "dim",
    "numel",
    "nelement",
    "is_floating_point",
    "is_complex",
    "element_size",
    "get_device",
    "__len__",
)
_DESCRIPTIONS = frozenset(getattr(Tensor, name).__get__ for name in _GETTERS) | {
    getattr(Tensor, name) for name in _METHODS
}

_NEW = tuple(getattr(Tensor, name) for name in NEW)
_LIKE = tuple(getattr(Tensor, name) for name in LIKE)


class Described(Tensor):
    """Shape, dtype and device of a layer's parameter; what else is done with it is for the layer's stand-in to answer.

    torch's fused transformer layers leave tensors of other classes than torch's own alone, and call the layers.
    """

    stand_in: StandIn
    parameter: str

    @staticmethod
    def of(stand_in: StandIn, parameter: str, shape: Sequence[int]) -> Described:
        """The parameter of this name and shape, else like those that compute in its place."""
        like = next(stand_in.parameters())
        made: Described = torch.Tensor._make_wrapper_subclass(
            Described, shape, dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
        )
        made.stand_in, made.parameter = stand_in, parameter
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Described({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        is_model = func in _NEW or (func in _LIKE and not isinstance(args[0], Described))
        args, kwargs = pytree.tree_map_only(Described, _kind if is_model else _read, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return cls.__torch_function__(func, types, args, kwargs)


def _kind(described: Described) -> Tensor:
    return torch.empty(0, dtype=described.dtype, device=described.device)


def _read(described: Described) -> Tensor:
    return described.stand_in.read(described.parameter)


class StandIn(nn.Sequential):
    """A chain in the place of a layer, with the layer's options; the layer's parameters are described, not there.

    Args:
        layer: what it stands for.
        method: under which name the chain is held.
        chain: what computes instead.
    """

    def __init__(self, layer: nn.Module, method: str, chain: nn.Module) -> None:
        super().__init__(OrderedDict({method: chain}))
        vars(self).update({name: value for name, value in vars(layer).items() if name not in vars(self)})
        self.stands_for = type(layer).__name__
        self._described = {name: None if p is None else tuple(p.shape) for name, p in layer._parameters.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (chain,) = self.children()
        return call_chain(chain, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        described = vars(self).get("_described", {})
        if name not in described:
            return super().__getattr__(name)
        return None if described[name] is None else Described.of(self, name, described[name])

    def read(self, name: str) -> Tensor:
        """What code gets that computes with this parameter of the layer.

        Raises:
            CaptureError: the layer is gone.
        """
        raise CaptureError(
            f"forward computes with the {name} of a {self.stands_for} layer that was compressed to a chain of layers "
            "and has none; call the layer instead, or exclude it from compression"
        )


class _Probe(StandIn):
    """A layer behind what will stand in its place; notes whether anything else than calls of it is made.

    Attributes:
        reads: names of the parameters that were computed with.
        is_passed_by: whether the layer was called by a reference that does not lead through here.
        is_mapped: whether it was called inside torch.vmap.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer, "layer", layer)
        self.reads: set[str] = set()
        self.is_passed_by = self.is_mapped = False
        self._is_inside = False
        self._compute = layer.forward
        layer.forward = self._called

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._is_inside = True
        self.is_mapped |= torch._C._functorch.maybe_current_level() is not None
        try:
            return self.get_submodule("layer")(*args, **kwargs)
        finally:
            self._is_inside = False

    def read(self, name: str) -> Tensor:
        self.reads.add(name)
        return self.get_submodule("layer").get_parameter(name)

    def obstacle(self) -> str | None:
        """Why nothing can take the layer's place, None if something can."""
        if self.reads:
            return (
                f"forward computes with its {' and '.join(sorted(self.reads))} directly; only calls of it are replaced"
            )
        if self.is_passed_by:
            return "forward calls it by a reference that is none of the model's submodules; register it as one"
        return MAPPED if self.is_mapped else None

    def _called(self, *args: Any, **kwargs: Any) -> Any:
        self.is_passed_by |= not self._is_inside
        return self._compute(*args, **kwargs)


def fixed_layers(model: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> dict[str, str]:
    """The Linear and convolution layers that nothing can take the place of, with reasons; found by trying it.

    Args:
        model: as it is run; it stays as it is.
        args: positional example inputs.
        kwargs: example inputs by keyword.
    """
    layers = {name: module for name, module in model.named_modules() if has_stock_forward(module)}
    hooked = {name: "it has hooks, without which the model does not run" for name in layers if has_hooks(layers[name])}
    with plain_attention():
        reference = run(sharing(model), args, kwargs)
    try:
        found = _tried(model, layers, args, kwargs, reference)
    except Exception:
        found = {}
        for name in layers:
            try:
                found |= _tried(model, {name}, args, kwargs, reference)
            except CaptureError as error:
                found[name] = str(error)
            except Exception as error:
                found[name] = f"forward does not run with another module in its place: {reason(error)}"
    return found | hooked


def _tried(
    model: nn.Module,
    names: Collection[str],
    args: tuple[Tensor, ...],
    kwargs: Mapping[str, Tensor],
    reference: Sequence[Tensor],
) -> dict[str, str]:
    copied = sharing(model)
    probes = {name: _Probe(copied.get_submodule(name)) for name in names}
    for name, probe in probes.items():
        exchange(copied, name, probe)
    with plain_attention():
        found = run(copied, args, kwargs)
    if len(found) != len(reference) or not all(map(torch.equal, found, reference)):
        raise CaptureError(
            "forward computes something else with another module in its place, as code that asks for its class does; "
            "call it whatever it is"
        )
    return {name: why for name, probe in probes.items() if (why := probe.obstacle()) is not None}
