"""A LLaVA from its parts: any text model, any vision tower with hidden states, and a new MLP connector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)


IMAGE = "<image>"


@dataclass
class Composed:
    """A model with its processor."""

    model: Any
    processor: Any


def load(name: str) -> Composed:
    """A whole vision-language model, by Hub id or folder."""
    return Composed(AutoModelForImageTextToText.from_pretrained(name), AutoProcessor.from_pretrained(name))


def compose(text_model: str, vision_tower: str, layer: int = -2) -> Composed:
    """
    Put a text model behind a vision tower, with a new connector between them (two linear layers with GELU).

    Args:
        text_model (`str`): Hub id or folder of a causal language model.
        vision_tower (`str`): Hub id or folder of a CLIP- or SigLIP-like model.
        layer (`int`): the tower's layer whose hidden states are used, as in `LlavaConfig.vision_feature_layer`.
    """
    text = AutoModelForCausalLM.from_pretrained(text_model)
    tower = AutoModel.from_pretrained(vision_tower)
    tower = getattr(tower, "vision_model", tower)
    tokenizer = AutoTokenizer.from_pretrained(text_model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if IMAGE not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
        text.resize_token_embeddings(max(len(tokenizer), text.config.vocab_size))
    vision = tower.config
    has_class_token = "class_embedding" in dict(tower.named_parameters()) or hasattr(
        getattr(tower, "embeddings", None), "class_embedding"
    )
    strategy = "default" if has_class_token else "full"
    config = LlavaConfig(
        vision_config=vision,
        text_config=text.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict(), strict=False)
    model.model.language_model.load_state_dict(text.get_decoder().state_dict())
    model.lm_head.load_state_dict(text.get_output_embeddings().state_dict())
    processor = LlavaProcessor(
        image_processor=AutoImageProcessor.from_pretrained(vision_tower),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=strategy,
        image_token=IMAGE,
        num_additional_image_tokens=1 if has_class_token else 0,
    )
    return Composed(model.to(text.dtype), processor)


def forget_connector(composed: Composed) -> Composed:
    """The same parts with a connector that has not been trained: where the two-stage recipe begins."""
    for module in composed.model.model.multi_modal_projector.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return composed
