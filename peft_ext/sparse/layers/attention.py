"""`nn.MultiheadAttention`: its module multiplies by the projections' weights without calling a layer, so it is
computed here, with an adapted linear layer for each projection."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bases.projection import PROJECTIONS, Projection
from .attention_inputs import check_attention_inputs
from .composite import SparseComposite
from .linear import SparseLinear


class SparseMultiheadAttention(SparseComposite):
    """
    An `nn.MultiheadAttention` with sparse adapters on its projections of queries, keys, values and outputs, each in a
    layer of the class `linear`.

    The attention's packed input projection counts as three, as in models with separate ones. While no adapter is
    active, or while they are merged, the attention module itself runs.
    """

    def __init__(self, base_layer: nn.MultiheadAttention, linear: type[SparseLinear]) -> None:
        super().__init__(base_layer, {name: linear(Projection(base_layer, name)) for name in PROJECTIONS})
        self.in_features, self.out_features = base_layer.embed_dim, base_layer.embed_dim

    @property
    def _qkv_same_embed_dim(self) -> bool:
        return self.base_layer._qkv_same_embed_dim  # torch's encoder reads it

    # ------------------------------------------------------------------ forward

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
        """As `nn.MultiheadAttention.forward`, with the same arguments and results."""
        base: Any = self.base_layer
        if self._is_idle():
            return base(
                query, key, value, key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
                average_attn_weights=average_attn_weights, is_causal=is_causal,
            )  # fmt: skip
        self._check(query)
        check_attention_inputs(base, query, key, value, key_padding_mask, attn_mask)
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not base.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v, mask = self._project(query, key, value, key_padding_mask, attn_mask)
        dropout = base.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)  # [batch, heads, queries, keys]
            weights = F.dropout(weights, dropout) if dropout else weights
            heads = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.parts["out_proj"](heads.transpose(1, 2).flatten(-2))  # [batch, queries, embed_dim]
        if not batched:
            return output[0], None if weights is None else weights[0]
        return output if base.batch_first else output.transpose(0, 1), weights

    def _is_idle(self) -> bool:
        if any(layer._forward_pre_hooks for layer in self.parts.values()):
            return False  # a mixed batch: each sample has its adapter
        return super()._is_idle()

    def _check(self, query: Tensor) -> None:
        if query.is_nested:
            raise TypeError(
                "Nested tensors are not supported by an adapted nn.MultiheadAttention. Make the encoder with "
                "nn.TransformerEncoder(..., enable_nested_tensor=False)."
            )
        self._check_called_whole()

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys and values `[batch, heads, tokens, head_dim]`, and one mask to add to the scores."""
        base: Any = self.base_layer
        q, k, v = (self.parts[name](x) for name, x in zip(PROJECTIONS, (query, key, value), strict=False))
        extra = 0  # tokens added to keys and values, which everyone may look at
        if base.bias_k is not None:
            k, v = (torch.cat([x, b.expand(len(x), 1, -1)], 1) for x, b in ((k, base.bias_k), (v, base.bias_v)))
            extra += 1
        if base.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(len(x), 1, x.shape[-1])], 1) for x in (k, v))
            extra += 1
        q, k, v = (x.unflatten(-1, (base.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        masks = []
        if attn_mask is not None:  # [queries, keys] or [batch * heads, queries, keys]
            whole = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, base.num_heads))
            masks.append(F.pad(_additive(whole, q.dtype), (0, extra)))
        if key_padding_mask is not None:  # [batch, keys]
            masks.append(F.pad(_additive(key_padding_mask, q.dtype), (0, extra))[:, None, None])
        return q, k, v, sum(masks[1:], masks[0]) if masks else None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores: boolean ones exclude where they are true."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)
    return mask.to(dtype)
