"""Tiny language models, vision towers and tokenizers of many families, from their configurations."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoModelForCausalLM, CLIPImageProcessor, PreTrainedTokenizerFast


SIZE = 32  # pixels
WORDS = [
    "USER",
    ":",
    "ASSISTANT",
    "A",
    "chat",
    "what",
    "color",
    "is",
    "the",
    "picture",
    "?",
    "red",
    "green",
    "blue",
    "yellow",
    ".",
    "Hello",
    "Hi",
]
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
TEXT_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", _GROUPED),
    "Mistral": ("MistralConfig", _GROUPED),
    "Qwen2": ("Qwen2Config", {**_GROUPED, "tie_word_embeddings": True}),
    "Qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "Phi-2": ("PhiConfig", _TEXT),
    "Phi-3": ("Phi3Config", _GROUPED),
    "Gemma 2": ("Gemma2Config", {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "Gemma 3": ("Gemma3TextConfig", {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "OLMo 2": ("Olmo2Config", _GROUPED),
    "Granite": ("GraniteConfig", {**_GROUPED, "logits_scaling": 4.0}),
    "Cohere": ("CohereConfig", _GROUPED),
    "StableLM": ("StableLmConfig", _GROUPED),
    "SmolLM3": ("SmolLM3Config", _GROUPED),
    "GPT-2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.1}),
    "GPT-NeoX": ("GPTNeoXConfig", _TEXT),
}
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": 8,
}
TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "CLIP": ("CLIPVisionConfig", _TOWER),
    "SigLIP": ("SiglipVisionConfig", _TOWER),
    "DINOv2": ("Dinov2Config", _TOWER),
    "DINOv2 + registers": ("Dinov2WithRegistersConfig", {**_TOWER, "num_register_tokens": 4}),
    "ViT": ("ViTConfig", _TOWER),
    "ConvNeXt": (
        "ConvNextConfig",
        {"hidden_sizes": [8, 16, 32], "depths": [1, 1, 1], "num_stages": 3, "patch_size": 2},
    ),
}
CONNECTORS: dict[str, dict[str, Any] | None] = {
    "mlp2x_gelu": None,
    "linear": None,
    "identity": None,
    "pixel_shuffle": {"factor": 2},
    "resampler": {
        "queries": 4,
        "resampler_depth": 1,
        "resampler_n_heads": 2,
        "resampler_head_dim": 8,
        "num_key_value_heads": 2,
    },
    "qformer": {
        "queries": 4,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    },
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, with the special tokens of ChatML."""
    special = ("<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>")
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        padding_side="left",
    )


def text_model(family: str) -> Any:
    name, options = TEXT_MODELS[family]
    torch.manual_seed(0)
    ids = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoModelForCausalLM.from_config(getattr(transformers, name)(**ids, **options))


def tower(family: str) -> Any:
    name, options = TOWERS[family]
    torch.manual_seed(0)
    return AutoModel.from_config(getattr(transformers, name)(**options))


def images() -> CLIPImageProcessor:
    size = {"height": SIZE, "width": SIZE}
    return CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size)
