"""Random Llama-shaped models and inputs: step times and bytes depend on shapes, not on what the weights know."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def check_heads(hidden: int, heads: int) -> None:
    """
    Raises:
        `ValueError`: if heads would not be alike, or of a width that rotary embeddings can't turn.
    """
    if hidden % heads or (hidden // heads) % 2:
        raise ValueError(f"`hidden` ({hidden}) must split into `heads` ({heads}) of an even width: change --heads")


@dataclass(frozen=True)
class Shape:
    """
    The sizes of a Llama-shaped model and of its batch.

    Args:
        hidden (`int`): Width of the residual stream.
        intermediate (`int`): Width of the MLP.
        layers (`int`): Decoder blocks.
        heads (`int`): Attention heads; `hidden` is a multiple of it.
        kv_heads (`int`, *optional*): Heads of keys and values; as many as `heads` by default.
        vocab (`int`): Vocabulary. Small, so that the head, alike for every method, does not dilute the ratios.
        batch (`int`): Sequences of a batch.
        tokens (`int`): Tokens of a sequence.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int
    batch: int
    tokens: int
    kv_heads: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {value}: pass a larger --{name}")
        check_heads(self.hidden, self.heads)
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"`heads` ({self.heads}) must be a multiple of `kv_heads` ({self.kv_heads})")


# The shapes of published models: what --preset sets.
PRESETS = {
    "llama-7b": {"hidden": 4096, "intermediate": 11008, "layers": 32, "heads": 32, "vocab": 32000},
    "llama-3-8b": {
        "hidden": 4096, "intermediate": 14336, "layers": 32, "heads": 32, "kv_heads": 8, "vocab": 128256,
    },
}  # fmt: skip


def llama(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> nn.Module:
    """A causal LM of the given shape with random weights, every parameter frozen."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads or shape.heads,
        vocab_size=shape.vocab,
        max_position_embeddings=shape.tokens,
        use_cache=False,
    )
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.requires_grad_(False).train()


def token_batch(shape: Shape, device: torch.device, seed: int = 1) -> dict[str, Tensor]:
    """Random token ids, used as their own labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(shape.vocab, (shape.batch, shape.tokens), generator=generator).to(device)  # [batch, tokens]
    return {"input_ids": ids, "labels": ids}


class SingleLinear(nn.Module):
    """One linear layer as a model of its own, so that every method can adapt it by the target name `proj`."""

    def __init__(self, fan_in: int, rows: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.proj = nn.Linear(fan_in, rows, bias=False, dtype=dtype, device=device)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)
