"""Capture of networks from transformers, torchvision and timm with random weights: tier, layers seen, difference.

Needs the extra ``zoo``. Every network runs a few batches in train mode first, so that BatchNorm has statistics. The
difference is that of the captured graph's outputs from the model's, relative to the largest, before any rewriting;
"batch 3" that at another batch size, "train" that in train mode with the same random numbers.
"""

from __future__ import annotations

import argparse
import copy
import pickle
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import tdfx
from tdfx.contained import plain_attention, quiet
from tdfx.tables import align

Case = tuple[nn.Module, tuple[Tensor, ...], dict[str, Tensor]]
IMAGE = (2, 3, 64, 64)
HEADER = ("network", "tier", "layers", "left alone", "difference", "batch 3", "train", "pickle", "seconds")


def bert() -> Case:
    """Transformers' BERT: forward with decorated keyword arguments."""
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    tokens = torch.randint(0, 1000, (2, 16))
    return BertModel(config), (), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def gpt2() -> Case:
    """Transformers' GPT-2: Conv1D layers, whose weights are transposed, and a tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=64, use_cache=False)
    return GPT2LMHeadModel(config), (), {"input_ids": torch.randint(0, 1000, (2, 16))}


def vit() -> Case:
    """Transformers' ViT."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=64, patch_size=16
    )
    return ViTForImageClassification(config), (), {"pixel_values": torch.randn(IMAGE)}


def segformer() -> Case:
    """Transformers' Segformer: convolutions and attention on reduced sequences."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64], decoder_hidden_size=64)
    return SegformerForSemanticSegmentation(config), (), {"pixel_values": torch.randn(IMAGE)}


def swin() -> Case:
    """Torchvision's Swin: linear functions on the weights of its layers."""
    from torchvision.models import swin_t

    return swin_t(weights=None), (torch.randn(IMAGE),), {}


def resnet18() -> Case:
    """Torchvision's ResNet-18."""
    from torchvision.models import resnet18

    return resnet18(weights=None), (torch.randn(IMAGE),), {}


def mobilevit() -> Case:
    """Timm's MobileViT: sizes from shapes, layers of timm's own."""
    import timm

    return timm.create_model("mobilevit_xxs", pretrained=False), (torch.randn(IMAGE),), {}


NETWORKS: dict[str, Callable[[], Case]] = {
    function.__name__: function for function in (bert, gpt2, vit, segformer, swin, resnet18, mobilevit)
}


def main() -> None:
    """Prints one row per network, and why layers were left alone."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("networks", nargs="*", help=f"of {', '.join(NETWORKS)}; all if left out")
    asked = options.parse_args().networks or list(NETWORKS)
    library = _missing_operators()  # as long as it is held
    rows, reasons = [], []
    for name in asked:
        torch.manual_seed(0)
        with quiet():
            row, skipped = examine(*NETWORKS[name]())
        rows.append((name, *row))
        reasons += [f"{name} {entry.layer}: {entry.reason}" for entry in skipped]
    print(align(HEADER, rows, right=range(2, 9)))
    print(*["", *reasons], sep="\n")
    del library


def examine(
    model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
) -> tuple[tuple[str, ...], tuple[tdfx.Skipped, ...]]:
    """One row of the table, and the layers left alone."""
    for _ in range(3):
        model.train()(*args, **kwargs)
    model.eval()
    started = time.perf_counter()
    captured = tdfx.capture(model, args, kwargs, trainable=True)
    seconds = time.perf_counter() - started
    profiled = tdfx.profile(captured, methods=["svd", "spatial_svd"], target=None)
    module = captured.module
    more = [{name: grown(value) for name, value in kwargs.items()}, tuple(map(grown, args))]
    row = (
        captured.tier,
        str(len(profiled.sites)),
        str(len(profiled.skipped)),
        f"{difference(model, module, args, kwargs):.0e}",
        f"{difference(model, module, more[1], more[0]):.0e}",
        f"{difference(model.train(), module.train(), args, kwargs):.0e}",
        f"{difference(module.eval(), pickle.loads(pickle.dumps(copy.deepcopy(module))), args, kwargs):.0e}",
        f"{seconds:.1f}",
    )
    return row, profiled.skipped


def grown(value: Tensor) -> Tensor:
    """The value with its first row once more."""
    return torch.cat([value, value[:1]])


def difference(one: nn.Module, other: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> float:
    """Largest difference of two networks' outputs, relative to the largest output."""
    worst = 0.0
    outputs = [leaves(network, args, kwargs) for network in (one, other)]
    for wanted, found in zip(*outputs, strict=True):
        worst = max(worst, float((wanted - found).abs().max() / wanted.abs().max()))
    return worst


def leaves(network: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> list[Tensor]:
    """Output tensors, random numbers seeded."""
    torch.manual_seed(1)
    with torch.no_grad(), plain_attention():
        output: Any = network(*args, **kwargs)
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _missing_operators() -> torch.library.Library:
    """The operators that torchvision asks for when it is imported beside a build of torch that it was not made for."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        library.define(schema)
    return library


if __name__ == "__main__":
    main()
