"""Tiny models of transformers' architectures, each made from one row of a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig


VOCABULARY, TOKENS, SAMPLES = 48, 8, 2

# Given to every architecture that knows them.
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "d_model": 16, "n_embd": 16, "dim": 16, "embedding_size": 16,
    "word_embed_proj_dim": 16, "intermediate_size": 24, "moe_intermediate_size": 24, "ffn_dim": 24, "d_ff": 24,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_decoder_layers": 2, "num_attention_heads": 2, "num_heads": 2, "n_head": 2, "n_heads": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32, "n_positions": 32, "n_ctx": 32,
    "state_size": 4, "conv_kernel": 3, "ssm_state_size": 4, "mamba_d_state": 4, "mamba_expand": 2,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "image_size": 16, "patch_size": 4, "num_channels": 3, "num_labels": 3, "num_mel_bins": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    "dropout": 0.0, "activation_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    "dropout_rate": 0.0, "drop_path_rate": 0.0, "layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
    "classifier_dropout": 0.0, "classifier_dropout_prob": 0.0, "feat_proj_dropout": 0.0, "final_dropout": 0.0,
    "initializer_range": 0.1, "layer_scale_init_value": 1.0, "layerscale_value": 1.0,
    "mask_time_prob": 0.0, "apply_spec_augment": False, "attn_implementation": "eager",
}  # fmt: skip

HEADS = {
    "decoder": "AutoModelForCausalLM",
    "encoder": "AutoModelForSequenceClassification",
    "encoder-decoder": "AutoModelForSeq2SeqLM",
    "vision": "AutoModelForImageClassification",
    "speech": "AutoModelForAudioClassification",
}


@dataclass(frozen=True)
class Architecture:
    """
    One row.

    Args:
        kind (`str`): what it computes, and so its inputs.
        options (`dict`): of its config, beside the common ones; `...` leaves a common one out.
        head (`str`): the model's class, where it is not the kind's.
        inputs (`dict`): shapes of inputs per sample, where they are not the kind's.
        idle (`str`): pattern of layers that these inputs give no gradient.
        why (`str`): the reason for that.
        linear (`bool`): whether the model has linear layers beside its head.
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    head: str | None = None
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    idle: str = "-"
    why: str = ""
    linear: bool = True

    def build(self, name: str) -> nn.Module:
        """A model with random weights, none of which is zero."""
        known = AutoConfig.for_model(name)
        names = {*known.to_dict(), *known.attribute_map}
        options = {key: value for key, value in COMMON.items() if key in names} | self.options
        config = AutoConfig.for_model(name, **{key: value for key, value in options.items() if value is not ...})
        torch.manual_seed(0)
        kind = getattr(transformers, self.head or HEADS[self.kind])
        model = kind(config) if issubclass(kind, nn.Module) else kind.from_config(config)
        for parameter in model.parameters():  # what starts at zero would pass no gradient on
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        return model.eval()

    def batch(self) -> dict[str, torch.Tensor]:
        """Inputs of the model."""
        torch.manual_seed(1)
        if self.inputs:
            return {key: torch.randn(SAMPLES, *shape) for key, shape in self.inputs.items()}
        if self.kind == "vision":
            return {"pixel_values": torch.randn(SAMPLES, 3, 16, 16)}
        if self.kind == "speech":
            return {"input_values": torch.randn(SAMPLES, 400)}
        ids = torch.randint(3, VOCABULARY, (SAMPLES, TOKENS))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {**batch, "decoder_input_ids": ids.flip(1)} if self.kind == "encoder-decoder" else batch
