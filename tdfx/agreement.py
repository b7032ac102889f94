"""Whether a graph computes what the model does, on inputs that both are run on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tdfx.contained import plain_attention
from tdfx.errors import CaptureError, VerificationError
from tdfx.inputs import run
from tdfx.passes.verify import relative_difference

# Allowed between the model's outputs and the normalized graph's; folding BatchNorm rounds weights anew.
_RTOL = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def run_plain(model: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> list[Tensor]:
    """Output tensors, without torch's fast path for transformer layers."""
    with plain_attention():
        return run(model, args, kwargs)


def allowed_difference(module: nn.Module, output: Tensor) -> float:
    """How much of its largest value an output may differ by rounding: of its dtype's, or of coarser parameters'."""
    if not output.is_floating_point() and not output.is_complex():
        return 0.0
    return max(_RTOL.get(dtype.to_real(), 0.0) for dtype in {output.dtype, *(p.dtype for p in module.parameters())})


def compare(reference: list[Tensor], found: list[Tensor], module: nn.Module) -> float:
    """The largest difference of two runs' outputs, relative to each output's largest value.

    Args:
        reference: outputs of the model.
        found: outputs of what is to compute the same.
        module: one of the two, whose parameters say how finely it computes.

    Raises:
        CaptureError: they are not equally many.
        VerificationError: one differs by more than ``allowed_difference``, or is NaN in the model itself.
    """
    if len(reference) != len(found):
        raise CaptureError(
            f"the captured graph returns {len(found)} tensors, the model {len(reference)}; return tensors, tuples or "
            "dictionaries of them from forward"
        )
    worst = 0.0
    for index, (wanted, got) in enumerate(zip(reference, found, strict=True)):
        if bool(torch.isnan(wanted).any()):
            raise VerificationError(f"output {index} of the model itself holds NaN on the example inputs; use others")
        absolute, relative = relative_difference(wanted, got)
        allowed = allowed_difference(module, wanted)
        if not relative <= allowed:
            raise VerificationError(
                f"output {index} of the captured graph ({got.dtype}) differs from the model's ({wanted.dtype}) by "
                f"{absolute:.3g} ({relative:.3g} of its largest value, allowed {allowed:.0e}): forward depends on "
                "something that tracing does not see",
                max_abs_diff=absolute,
                max_rel_diff=relative,
            )
        worst = max(worst, relative)
    return worst
