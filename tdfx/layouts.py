"""Tensors of other layouts than strided, as the adjacency matrix of a graph network, by what they consist of."""

from __future__ import annotations

import torch
from torch import Tensor

_COMPRESSED = {
    torch.sparse_csr: (Tensor.crow_indices, Tensor.col_indices),
    torch.sparse_bsr: (Tensor.crow_indices, Tensor.col_indices),
    torch.sparse_csc: (Tensor.ccol_indices, Tensor.row_indices),
    torch.sparse_bsc: (Tensor.ccol_indices, Tensor.row_indices),
}


def strided_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The strided tensors that a tensor holds: itself, or indices and values of a sparse one."""
    if tensor.layout is torch.strided:
        return (tensor,)
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in _COMPRESSED:
        return (*(indices(tensor) for indices in _COMPRESSED[tensor.layout]), tensor.values())
    return (tensor.to_dense(),)


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one layout hold the same."""
    return all(map(torch.equal, strided_parts(one), strided_parts(other)))
