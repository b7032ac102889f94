"""How far a network's outputs are from those of the network it should compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tdfx.errors import InputError, OptionError

OUTPUTS = ("auto", "logits", "values")


def resolve_output(output: str, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> str:
    """What a network's outputs are, by their shapes if that is left open.

    Args:
        output: "logits" (of classes), "values" (to be met as they are), or "auto": logits where the first float output
            is (samples, classes) and no input has that very shape, or (samples, positions, classes) and all inputs
            are integers; otherwise values.
        outputs: of one run.
        inputs: of that run.

    Returns:
        "logits" or "values".

    Raises:
        OptionError: the name is unknown, or the outputs have no classes to be logits of.
        InputError: there is no float output.
    """
    if output not in OUTPUTS:
        raise OptionError(f"output is {output!r}; expected {', '.join(OUTPUTS)}")
    first = next(iter(floats(outputs)), None)
    if first is None:
        raise InputError("the network returns no float tensor; expected one that can be compared")
    classes = first.shape[_class_dim(first)] if first.dim() >= 2 else 0
    if output == "logits" and classes < 2:
        raise OptionError(
            f'output is "logits", but the first has shape {tuple(first.shape)}; expected at least 2 classes'
        )
    if output != "auto":
        return output
    if first.dim() == 2:
        is_logits = classes >= 2 and all(value.shape != first.shape for value in inputs)
    else:
        is_logits = first.dim() == 3 and classes >= 2 and not floats(inputs)
    return "logits" if is_logits else "values"


def divergence(
    reference: Sequence[Tensor], found: Sequence[Tensor], output: str, variances: Sequence[Tensor] | None = None
) -> Tensor:
    """Divergence of outputs from the reference; differentiable in what was found.

    Args:
        reference: outputs of the original on some samples; those that are no floats are left out.
        found: outputs of another network on the same samples.
        output: "logits" for the KL divergence KL(softmax(reference) || softmax(found)) in nats of the first float
            output, mean over samples and positions, with classes last in (n, C) and (n, T, C) and at 1 in (n, C, H, W);
            "values" for half the mean squared error over the variance, mean over outputs.
        variances: for "values", ``variance`` of each float output on all data where these samples are few; None for
            that of the reference.

    Returns:
        A scalar, 0 where both agree.
    """
    pairs = list(zip(floats(reference), floats(found), strict=True))
    if output == "logits":
        wanted, got = (value.double() if value.dtype == torch.float64 else value.float() for value in pairs[0])
        dim = _class_dim(wanted)
        logs = F.log_softmax(wanted, dim)
        return (logs.exp() * (logs - F.log_softmax(got, dim))).sum(dim).mean()
    scales = [variance(wanted) for wanted, _ in pairs] if variances is None else variances
    errors = [F.mse_loss(got, wanted) / scale for (wanted, got), scale in zip(pairs, scales, strict=True)]
    return torch.stack(errors).mean() / 2


def variance(values: Tensor) -> Tensor:
    """Mean square of (n, ...) about the mean over samples; 1 where that is 0."""
    found = (values - values.mean(0)).square().mean()
    return torch.where(found > 0, found, torch.ones_like(found))


def floats(values: Sequence[Tensor]) -> list[Tensor]:
    """Those that hold floating-point numbers for samples, not one number for all."""
    return [value for value in values if value.is_floating_point() and value.dim()]


def _class_dim(logits: Tensor) -> int:
    return 1 if logits.dim() >= 4 else -1
