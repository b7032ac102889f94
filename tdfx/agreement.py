"""Whether a graph computes what the model does, and its gradients, on inputs that both are run on."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tdfx.contained import plain_attention, quiet, reason
from tdfx.errors import CaptureError, VerificationError
from tdfx.inputs import run, tensors
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


def compare_gradients(
    model: nn.Module, traced: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]
) -> None:
    """Compares the gradients that parameters of both get from the same random gradient of the outputs.

    They differ where forward does more than a graph shows: torch.no_grad, or autograd functions of its own.

    Raises:
        CaptureError: they differ by more than ten times ``allowed_difference``; names parameters.
    """
    try:
        wanted = _gradients(model, args, kwargs)
    except Exception:
        return  # the model does not train as it is, in eval mode
    try:
        found = _gradients(traced, args, kwargs)
    except Exception as error:
        raise CaptureError(f"the graph has no gradients where the model has: {reason(error)}") from error
    sizes = {key: float(value.abs().max()) for key, value in wanted.items() if value.numel()}
    largest = max(filter(math.isfinite, sizes.values()), default=0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    strange = []
    for key in sizes.keys() & found.keys():
        if not math.isfinite(sizes[key]):
            continue
        # What is zero but for rounding is so in comparison with the other gradients.
        rounding = 100 * torch.finfo(wanted[key].dtype).eps * largest
        allowed = max(10 * allowed_difference(traced, wanted[key]) * sizes[key], rounding)
        if not float((wanted[key] - found[key]).abs().max()) <= allowed:
            strange.append(names[key])
    if strange:
        raise CaptureError(
            f"the graph's gradients at {', '.join(sorted(strange)[:3])} are not the model's: forward uses "
            "torch.no_grad or autograd functions of its own, which a graph does not hold"
        )


def _gradients(module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """By identity of the parameter; zeros where nothing comes to it."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with torch.enable_grad(), plain_attention(), quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        copies = pytree.tree_map_only(Tensor, torch.clone, (tuple(args), dict(kwargs)))
        outputs = [value for value in tensors(module(*copies[0], **copies[1])) if value.requires_grad]
        torch.manual_seed(0)
        weights = [torch.randn_like(value) for value in outputs]
        found = torch.autograd.grad(outputs, parameters, weights, allow_unused=True)
    pairs = zip(parameters, found, strict=True)
    return {id(p): torch.zeros_like(p) if value is None else _strided(value) for p, value in pairs}


def _strided(value: Tensor) -> Tensor:
    return value if value.layout is torch.strided else value.to_dense()
