"""What torchvision asks for when it is imported beside a build of torch that it was not made for."""

from __future__ import annotations

import contextlib
from functools import cache

import torch


@cache
def define_missing_operators() -> torch.library.Library:
    """Defines them, for as long as the cache holds what is returned.

    Call it before the first import of torchvision, timm or transformers.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # a torchvision that fits has them
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
