"""Unpacks nn.MultiheadAttention into linear layers for q, k, v and output, and scaled_dot_product_attention.

torch's module reads its packed weights directly, so that no layer of it can be seen or replaced. With the projections
W_q, W_k, W_v as layers of their own, the function is the same (Vaswani et al. 2017, section 3.2.2).
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdfx.passes.base import set_submodule

Copies = dict[tuple[int, tuple[int, ...]], nn.Parameter]


def unpack_attention(model: nn.Module, *, trainable: bool = False) -> nn.Module:
    """The model with its attention unpacked; it shares what is not cut in pieces with the one given.

    Attention with ``add_bias_kv`` or ``add_zero_attn`` stays as it is.

    Args:
        model: the model, which is left as it is.
        trainable: keep the dropout of attention weights as a module, which takes attention written out.
    """
    if not any(_is_packed(module) for module in model.modules()):
        return model
    tensors = [*model.parameters(), *model.buffers()]
    unpacked = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    made: dict[int, Attention] = {}
    copies: Copies = {}
    for name, module in [*unpacked.named_modules(remove_duplicate=False)]:
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # its fast path, which reads packed weights
        if _is_packed(module):
            attention = made.get(id(module)) or Attention(module, trainable, copies)
            made[id(module)] = attention
            if not name:
                return attention
            set_submodule(unpacked, name, attention)
    return unpacked


def _is_packed(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
        and module.bias_k is None
        and not module.add_zero_attn
    )


class Attention(nn.Module):
    """Multi-head attention on four linear layers; takes and returns what nn.MultiheadAttention does."""

    in_proj_bias = None  # keeps nn.TransformerEncoderLayer off its fast path

    def __init__(self, packed: nn.MultiheadAttention, trainable: bool, copies: Copies) -> None:
        super().__init__()
        self.embed_dim = packed.embed_dim
        self.num_heads = packed.num_heads
        self.batch_first = packed.batch_first
        weights = (
            packed.in_proj_weight.chunk(3)
            if packed.in_proj_weight is not None
            else (packed.q_proj_weight, packed.k_proj_weight, packed.v_proj_weight)
        )
        biases = (None,) * 3 if packed.in_proj_bias is None else packed.in_proj_bias.chunk(3)
        layers = [_linear(*pair, copies) for pair in zip(weights, biases, strict=True)]
        self.q_proj, self.k_proj, self.v_proj = layers
        self.out_proj = _linear(packed.out_proj.weight, packed.out_proj.bias, copies)
        self.dropout = nn.Dropout(packed.dropout) if trainable and packed.dropout else None
        self.train(packed.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention.forward; weights that are asked for are computed once and mix the values too."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self._heads(self.q_proj(query)), self._heads(self.k_proj(key)), self._heads(self.v_proj(value))
        mask = self._mask(key_padding_mask, attn_mask, q)
        weights = None
        if need_weights or self.dropout is not None:
            scores = _softmax(q, k, mask)
            if self.dropout is not None:
                scores = self.dropout(scores)
            mixed = scores @ v
            if need_weights:
                weights = scores.mean(1) if average_attn_weights else scores
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _heads(self, projected: Tensor) -> Tensor:
        """(batch, length, heads x width) to (batch, heads, length, width)."""
        width = projected.shape[-1] // self.num_heads
        return projected.view(*projected.shape[:-1], self.num_heads, width).transpose(1, 2)

    def _mask(self, padding: Tensor | None, mask: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one to add to the scores (batch, heads, queries, keys); True means left out."""
        padding, mask = (None if m is None else _additive(m, q) for m in (padding, mask))
        if mask is not None and mask.dim() == 3:
            mask = mask.view(-1, self.num_heads, *mask.shape[1:])
        if padding is None:
            return mask
        padding = padding[:, None, None]
        return padding if mask is None else padding + mask


def _linear(weight: Tensor, bias: Tensor | None, copies: Copies) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = _parameter(weight, copies)
    if bias is not None:
        layer.bias = _parameter(bias, copies)
    return layer


def _parameter(value: Tensor, copies: Copies) -> nn.Parameter:
    """A parameter itself, or one with the values of a part of it: the same for the same part, so that ties stay."""
    if isinstance(value, nn.Parameter):
        return value
    key = (value.data_ptr(), tuple(value.shape))
    if key not in copies:
        copies[key] = nn.Parameter(value.detach().clone(), value.requires_grad)
    return copies[key]


def _additive(mask: Tensor, q: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(q.dtype)
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -math.inf)


def _softmax(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return torch.softmax(scores if mask is None else scores + mask, -1)
