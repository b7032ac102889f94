"""A network with inputs, and what makes a comparison of its outputs mean something."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

BATCH = 2
TRAIN_RUNS = 3


@dataclass(frozen=True)
class Case:
    """A network and example inputs, batch first.

    Attributes:
        model: the network.
        args: positional inputs.
        kwargs: inputs by keyword.
    """

    model: nn.Module
    args: tuple[Tensor, ...] = ()
    kwargs: Mapping[str, Tensor] = field(default_factory=dict)


Factory = Callable[[], Case]


def images(size: int = 64, channels: int = 3) -> Tensor:
    """(2, channels, size, size)."""
    return torch.randn(BATCH, channels, size, size)


def clips(frames: int, size: int) -> Tensor:
    """(2, 3, frames, size, size)."""
    return torch.randn(BATCH, 3, frames, size, size)


def tokens(length: int = 16, vocabulary: int = 100) -> Tensor:
    """(2, length), whole numbers from 3: the first ones often mean padding and ends."""
    return torch.randint(3, vocabulary, (BATCH, length))


def _average_of_pairs(norm: nn.modules.batchnorm._BatchNorm, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Gives all channels the mean variance where each has one value a sample: two may be alike by chance."""
    if inputs[0].numel() == BATCH * inputs[0].shape[1] and norm.running_var is not None:
        norm.running_var.fill_(float(norm.running_var.mean()))


def enliven(case: Case) -> None:
    """Makes every part of a network count in its outputs, as it does in a trained one; leaves it in eval mode.

    Parameters that start as one constant (biases of 0, scales of residual branches of 1e-6 or 0) get values that
    differ, scales and biases of BatchNorm values around 1, matrices and kernels that start near 0 a size that keeps
    that of their inputs, and a few runs in train mode give BatchNorm its statistics. With biases of 0 differences,
    those of rounding too, would grow exponentially in depth where a ReLU follows, less so nearer to where it is linear
    (Yang et al. 2019, A Mean Field Theory of Batch Normalization, arXiv 1902.08129).
    """
    norms = [module for module in case.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for norm in norms:
            if norm.affine:
                norm.weight.fill_(1.0)
                norm.bias.fill_(1.0)
        for parameter in case.model.parameters():
            if (
                parameter.is_floating_point()
                and parameter.numel() > 1
                and bool((parameter == parameter.view(-1)[0]).all())
            ):
                constant = float(parameter.view(-1)[0])
                parameter.normal_(1.0 if 0 < abs(constant) < 1 else constant, 0.1)
            elif parameter.is_floating_point() and parameter.dim() > 1 and parameter.numel() > len(parameter):
                wanted = (len(parameter) / parameter.numel()) ** 0.5
                parameter.mul_(max(1.0, wanted / max(float(parameter.std()), 1e-6)))
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = None  # the mean of all runs: a trained network's hold nothing of the first 0 and 1
            norm.reset_running_stats()
        handles = [norm.register_forward_hook(_average_of_pairs) for norm in norms]
        case.model.train()
        for _ in range(TRAIN_RUNS):
            case.model(*case.args, **case.kwargs)
        for handle in handles:
            handle.remove()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    case.model.eval()
