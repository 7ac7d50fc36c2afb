"""Language models: which of them a Llava can hold, and the image token that they learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .templates import IMAGE
from .tower import model_class


def check_text(text: Any, tokenizer: Any) -> None:
    """
    Raises:
        `ValueError`: if transformers' Llava can't hold this language model.
    """
    kind = type(text).__name__
    expected = model_class(text.config, "text_model")
    if getattr(text.config, "is_encoder_decoder", False) or type(text.base_model) is not expected:
        raise ValueError(
            f"text_model: Llava builds its decoder with AutoModel, which makes a {expected.__name__} of this "
            f"configuration, but {kind} has a {type(text.base_model).__name__}. Use a decoder-only model."
        )
    width = text.get_input_embeddings().weight.shape[1]
    if width != text.config.hidden_size or not isinstance(text.get_output_embeddings(), nn.Linear):
        raise ValueError(
            f"text_model: {kind} has embeddings of size {width} and hidden states of size {text.config.hidden_size}, "
            "or no linear head. Llava puts image features among the embeddings and needs one size for both."
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"text_model: {type(tokenizer).__name__} is no fast tokenizer, which label masks need. Convert it with "
            "AutoTokenizer.from_pretrained(…, use_fast=True) and save it."
        )


def add_image_token(text: Any, tokenizer: Any) -> int:
    """The tokenizer learns `<image>`, and the embeddings a row for it: the mean of the others."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if IMAGE not in tokenizer.get_vocab() or len(tokenizer.encode(IMAGE, add_special_tokens=False)) != 1:
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]}, replace_extra_special_tokens=False)
    before = text.config.vocab_size
    if len(tokenizer) > before:
        text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for module in (text.get_input_embeddings(), text.get_output_embeddings()):
                module.weight[before:] = module.weight[:before].float().mean(dim=0).to(module.weight.dtype)
                if getattr(module, "bias", None) is not None:
                    module.bias[before:] = module.bias[:before].mean()
    return int(tokenizer.convert_tokens_to_ids(IMAGE))


def is_plain_head(text: Any, head: Any) -> bool:
    """Whether logits are the head's product and nothing more, as in transformers' Llava."""
    scaled = ("logit_scale", "logits_scaling", "final_logit_softcapping")
    return head.bias is None and all(getattr(text.config, name, None) in (None, 1, 1.0) for name in scaled)
