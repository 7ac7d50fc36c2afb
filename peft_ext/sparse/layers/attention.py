"""`nn.MultiheadAttention`: its module multiplies by the projections' weights without calling a layer, so it is
computed here, with an adapted linear layer for each projection."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...hf.adapter_state import without_wrappers
from ...hf.internals import BaseTunerLayer
from ..bases.projection import PROJECTIONS, Projection
from .attention_inputs import check_attention_inputs
from .base_attributes import BaseAttributes
from .linear import SparseLinear


class SparseMultiheadAttention(BaseAttributes, nn.Module, BaseTunerLayer):
    """
    An `nn.MultiheadAttention` with sparse adapters on its projections of queries, keys, values and outputs.

    The attention's packed input projection counts as three, as in models with separate ones. While no adapter is
    active, or while they are merged, the attention module itself runs.

    Args:
        base_layer (`nn.MultiheadAttention`): the module to adapt.
        linear (`type`): the method's class for linear layers.
    """

    adapter_layer_names: tuple[str, ...] = ()  # they are on the projections
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.MultiheadAttention, linear: type[SparseLinear]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.in_features, self.out_features = base_layer.embed_dim, base_layer.embed_dim
        for name in PROJECTIONS:
            setattr(self, name, linear(Projection(base_layer, name)))

    @property
    def _qkv_same_embed_dim(self) -> bool:
        return self.base_layer._qkv_same_embed_dim  # torch's encoder reads it

    @property
    def projections(self) -> dict[str, SparseLinear]:
        """The adapted projections by name."""
        return {name: self._modules[name] for name in PROJECTIONS}  # type: ignore[misc]

    # ------------------------------------------------------------------ PEFT's verbs, which reach the projections too

    @property
    def merged_adapters(self) -> list[str]:
        """Adapters merged into any projection."""
        return list(dict.fromkeys(name for layer in self.projections.values() for name in layer.merged_adapters))

    @property
    def active_adapter(self) -> str | list[str]:
        """That of the projections, which is what PEFT sets."""
        first: Any = self.projections["q_proj"]
        return first.active_adapter

    def _get_available_adapters(self) -> set[str]:
        return {name for layer in self.projections.values() for name in layer.deltas}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing to do: PEFT merges the projections, which it visits as well."""

    def unmerge(self) -> None:
        """Nothing to do: PEFT unmerges the projections, which it visits as well."""

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The attention module without its adapters."""
        if merge:
            for layer in self.projections.values():
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer

    def scale_layer(self, scale: float) -> None:
        """Nothing: the projections are layers of their own."""

    def unscale_layer(self, scale: float | None = None) -> None:
        """Nothing: the projections are layers of their own."""

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
        output = self.projections["out_proj"](heads.transpose(1, 2).flatten(-2))  # [batch, queries, embed_dim]
        if not batched:
            return output[0], None if weights is None else weights[0]
        return output if base.batch_first else output.transpose(0, 1), weights

    def _is_idle(self) -> bool:
        """Whether the attention module can run as it is."""
        layers = self.projections.values()
        if any(layer._forward_pre_hooks for layer in layers):  # a mixed batch: each sample has its adapter
            return False
        if self.disable_adapters:
            for layer in layers:
                if layer.merged:
                    layer.unmerge()
            return True
        return all(layer.merged or not set(layer.active_adapters) & set(layer.deltas) for layer in layers)

    def _check(self, query: Tensor) -> None:
        base = self.base_layer
        if query.is_nested:
            raise TypeError(
                "Nested tensors are not supported by an adapted nn.MultiheadAttention. Make the encoder with "
                "nn.TransformerEncoder(..., enable_nested_tensor=False)."
            )
        if base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base):
            raise NotImplementedError(
                "The nn.MultiheadAttention has hooks or a replaced forward (as offloading installs), which would not "
                "run while adapters are active. Put hooks on the adapted module around it, or keep it on one device."
            )

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys and values `[batch, heads, tokens, head_dim]`, and one mask to add to the scores."""
        base: Any = self.base_layer
        q, k, v = (self.projections[name](x) for name, x in zip(PROJECTIONS, (query, key, value), strict=False))
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
        return q, k, v, _sum(masks)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores: boolean ones exclude where they are true."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)
    return mask.to(dtype)


def _sum(masks: Sequence[Tensor]) -> Tensor | None:
    return sum(masks[1:], masks[0]) if masks else None


def attention_biases(model: nn.Module, bias: str) -> Iterator[tuple[str, Tensor]]:
    """
    Names in the state dict and parameters (while FSDP has them unsharded, plain tensors) of the biases in attention
    modules that a config's `bias` trains and PEFT does not find.

    Args:
        model (`nn.Module`): the adapted model.
        bias (`str`): `"none"`, `"all"`, or `"<method>_only"`, which means those of adapted modules.
    """
    if bias == "none":
        return
    for name, module in model.named_modules():
        base: Any = module
        path = name
        if isinstance(module, SparseMultiheadAttention):
            base, path = module.base_layer, f"{name}.base_layer"
        elif bias != "all" or not isinstance(module, nn.MultiheadAttention):
            continue
        path = without_wrappers(path)
        for key, tensor in (("in_proj_bias", base.in_proj_bias), ("out_proj.bias", base.out_proj.bias)):
            if tensor is not None:
                yield f"{path}.{key}" if path else key, tensor
