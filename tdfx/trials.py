"""A model at other sizes of the dimensions that are to stay free, for graphs to be tried on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from tdfx.agreement import compare, run_plain
from tdfx.contained import quiet, reason
from tdfx.dynamic import Dynamic, free_axes, other_sizes, resized
from tdfx.errors import CaptureError
from tdfx.inputs import run
from tdfx.layouts import equal
from tdfx.signature import Signature


@dataclass(frozen=True)
class Trials:
    """The model as it is called, and at another size of each dimension that is named.

    Attributes:
        example: positional example inputs, those by keyword, and the model's outputs.
        free: names of the free dimensions of each input.
        args: positional inputs of those sizes.
        kwargs: likewise by keyword.
        reference: what the model makes of them; None without names, the batch's aside.
        sizes: in words.
    """

    example: tuple[tuple[Tensor, ...], Mapping[str, Tensor], list[Tensor]]
    free: tuple[dict[int, str], ...]
    args: tuple[Tensor, ...] = ()
    kwargs: Mapping[str, Tensor] = field(default_factory=dict)
    reference: list[Tensor] | None = None
    sizes: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was tried; nothing where no size but the batch's is free."""
        return () if self.reference is None else (f"free sizes: model and graph agree at {self.sizes} too",)

    def agree(self, traced: fx.GraphModule) -> fx.GraphModule:
        """The graph, if it computes what the model does at all sizes, and writes to no buffer.

        Raises:
            CaptureError: it does not.
        """
        args, kwargs, reference = self.example
        buffers = {name: buffer.clone() for name, buffer in traced.named_buffers()}
        try:
            with quiet():
                compare(reference, run_plain(traced, args, kwargs), traced)
        except Exception as error:
            raise CaptureError(f"the graph does not compute what the model does: {reason(error)}") from error
        written = [name for name, buffer in traced.named_buffers() if not equal(buffer, buffers[name])]
        if written:
            raise CaptureError(f"the graph writes to {', '.join(written)} whenever it runs")
        return self.check(traced)

    def check(self, traced: fx.GraphModule) -> fx.GraphModule:
        """The graph, if it computes what the model does at the other sizes.

        Raises:
            CaptureError: it does not.
        """
        if self.reference is None:
            return traced
        try:
            compare(self.reference, run(traced, self.args, self.kwargs), traced)
        except Exception as error:
            raise CaptureError(
                f"the graph is of the example inputs' sizes and not of {self.sizes}: {reason(error)}; leave out of "
                "dynamic what forward needs as a number"
            ) from error
        return traced


def at_other_sizes(
    model: nn.Module,
    signature: Signature,
    dynamic: Dynamic,
    args: tuple[Tensor, ...],
    kwargs: Mapping[str, Tensor],
    reference: list[Tensor],
) -> Trials:
    """Another size of each dimension that ``dynamic`` names beside the batch's, and the model's outputs there.

    Raises:
        OptionError: ``dynamic`` is not understood.
        InputError: it names what is not there, or the model does not run on another size of it.
    """
    inputs = dict(zip(signature.names, (*args, *kwargs.values()), strict=True))
    axes = free_axes(dynamic, inputs)
    free = tuple(axes.get(name, {}) for name in inputs)

    def call(values: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        given = tuple(values.values())
        return given[: len(args)], dict(zip(kwargs, given[len(args) :], strict=True))

    def outputs(values: Mapping[str, Tensor]) -> list[Tensor]:
        return run_plain(model, *call(values))

    others = other_sizes(axes, inputs, outputs)
    if not others:
        return Trials((args, kwargs, reference), free)
    other = resized(axes, inputs, others)
    text = ", ".join(f"{name} = {size}" for name, size in others.items())
    return Trials((args, kwargs, reference), free, *call(other), outputs(other), text)
