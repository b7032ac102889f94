"""The matrix that an embedding's table is multiplied with: a row for each output, one-hot or a sum of one-hot rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def one_hot(
    layer: nn.Embedding | nn.EmbeddingBag,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """Inputs of every output of one call, arguments as the layer takes them.

    Returns:
        (outputs, rows of the table), sparse, coalesced, float64, on the CPU; its product with the table is the layer's
        output, dimensions before the last one flattened.
    """
    indices, rows = input.flatten().cpu().long(), layer.num_embeddings
    if isinstance(layer, nn.Embedding):
        return _matrix(torch.arange(len(indices)), indices, torch.ones(len(indices)), (len(indices), rows))
    if offsets is None:
        bags, count = torch.arange(input.shape[0]).repeat_interleave(input.shape[1]), input.shape[0]
    else:
        starts = offsets.cpu().long()
        count = len(starts) - 1 if layer.include_last_offset else len(starts)
        bags = torch.searchsorted(starts[:count].contiguous(), torch.arange(len(indices)), right=True) - 1
    weights = torch.ones(len(indices)) if per_sample_weights is None else per_sample_weights.flatten().cpu()
    if layer.padding_idx is not None:
        kept = indices != layer.padding_idx
        indices, bags, weights = indices[kept], bags[kept], weights[kept]
    if layer.mode == "mean":
        weights = weights / torch.bincount(bags, minlength=count)[bags]
    return _matrix(bags, indices, weights, (count, rows))


def _matrix(outputs: Tensor, rows: Tensor, weights: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_coo_tensor(
        torch.stack([outputs, rows]), weights.double(), shape, check_invariants=True
    ).coalesce()
