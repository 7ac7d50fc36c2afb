"""The fact-aware part of the classifier: what a candidate looks like, joined with what is known of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .config import CKTransformerConfig


class IntegrationBlock(nn.Module):
    """
    Multi-head attention from f_i^e (query) to F_i^f (keys and values), and a feed-forward layer.

    The thesis names these two parts (section 3.3.2). The order is BERT's: each is followed by residual and layer norm.
    """

    def __init__(self, config: CKTransformerConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        inner = config.intermediate_size or 4 * hidden
        self.attention = nn.MultiheadAttention(hidden, config.num_heads, dropout=config.dropout, batch_first=True)
        self.attention_norm = nn.LayerNorm(hidden)
        self.feed_forward = nn.Sequential(nn.Linear(hidden, inner), ACT2FN["gelu"], nn.Linear(inner, hidden))
        self.output_norm = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, query: Tensor, facts: Tensor, is_padding: Tensor) -> Tensor:
        attended, _ = self.attention(query, facts, facts, key_padding_mask=is_padding, need_weights=False)
        query = self.attention_norm(query + self.dropout(attended))
        return self.output_norm(query + self.dropout(self.feed_forward(query)))


class Integrator(nn.Module):
    """M blocks. A candidate without facts attends to a learned null in their place."""

    def __init__(self, config: CKTransformerConfig) -> None:
        super().__init__()
        self.null = nn.Embedding(1, config.hidden_size)
        self.blocks = nn.ModuleList([IntegrationBlock(config) for _ in range(config.num_blocks)])

    def forward(self, query: Tensor, facts: Tensor, is_fact: Tensor) -> Tensor:
        """
        Args:
            query (`Tensor`): f_i^e, of shape `[batch, candidates, hidden]`.
            facts (`Tensor`): F_i^f, of shape `[batch, candidates, K, hidden]`.
            is_fact (`Tensor`): bool of shape `[batch, candidates, K]`, false where there is no such fact.

        Returns:
            `Tensor`: f_i^t, of shape `[batch, candidates, hidden]`.
        """
        is_fact = is_fact.flatten(0, 1)  # [rows, K]
        null = self.null.weight.expand(len(is_fact), 1, -1)
        keys = torch.cat([null, facts.flatten(0, 1)], dim=1)  # [rows, 1 + K, hidden]
        is_padding = torch.cat([is_fact.any(1, keepdim=True), ~is_fact], dim=1)
        hidden = query.reshape(len(keys), 1, -1)
        for block in self.blocks:
            hidden = block(hidden, keys, is_padding)
        return hidden.view_as(query)
