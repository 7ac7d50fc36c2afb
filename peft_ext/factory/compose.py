"""Compose a vision-language model from a language model, a vision tower and a connector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from .connectors import NATIVE, OWN, connector_options
from .masking import end_of_turn
from .modeling import LlavaFactoryConfig, LlavaFactoryForConditionalGeneration
from .templates import IMAGE, chat_template
from .text import add_image_token, check_text, is_plain_head
from .tower import blank, features, gives_maps, grey, has_class_token, load_tower, pad_to_square


@dataclass
class Composed:
    """
    A vision-language model and its processor, made by [`compose`] or [`load`].

    Attributes:
        model (`PreTrainedModel`):
            The model.
        processor (`LlavaProcessor`):
            Its processor. It pads on the left.
    """

    model: Any
    processor: Any


def load(name: str, **options: Any) -> Composed:
    """
    Load a composed model and its processor.

    Args:
        name (`str`):
            Hub id or folder of a vision-language model.
        **options:
            Passed on to the model's `from_pretrained`.

    Returns:
        [`Composed`]: The model and its processor.
    """
    model = AutoModelForImageTextToText.from_pretrained(name, **options)
    processor = AutoProcessor.from_pretrained(name)
    processor.tokenizer.padding_side = "left"
    return Composed(model, processor)


def compose(
    text_model: str,
    vision_tower: str,
    connector: str = "mlp2x_gelu",
    *,
    connector_config: dict[str, Any] | None = None,
    feature_layer: int = -2,
    template: str = "auto",
    pad: bool = False,
    dtype: str | torch.dtype = "auto",
) -> Composed:
    """
    Put a language model behind a vision tower, with a new connector between them.

    The result is transformers' `LlavaForConditionalGeneration` wherever that class can express it, else
    [`LlavaFactoryForConditionalGeneration`]. Two things are checked before it is returned. Without an image, the model
    gives the logits of the language model. An image becomes as many tokens as the processor makes placeholders for.

    Args:
        text_model (`str`):
            Hub id or folder of a causal language model.
        vision_tower (`str`):
            Hub id or folder of a vision model with patch features or feature maps, or of a CLIP-like pair.
        connector (`str`, *optional*, defaults to `"mlp2x_gelu"`):
            `"mlp2x_gelu"`, `"mlp2x_relu"`, `"mlp2x_silu"`, `"linear"`, `"identity"`, `"pixel_shuffle"`, `"resampler"`
            or `"qformer"`.
        connector_config (`dict`, *optional*):
            Options of the connector: `factor` of `pixel_shuffle`; `queries` of `resampler` and `qformer`, and the
            options of transformers' `Idefics2PerceiverConfig` and `Blip2QFormerConfig`.
        feature_layer (`int`, *optional*, defaults to -2):
            Number of the tower's hidden states that the connector gets. -2 is LLaVA-1.5's choice.
        template (`str`, *optional*, defaults to `"auto"`):
            The chat template; see [`~peft_ext.factory.templates.chat_template`].
        pad (`bool`, *optional*, defaults to `False`):
            Whether to pad images to squares, as LLaVA-1.5's second stage does. Otherwise the tower's processor
            decides; CLIP's crops.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Dtype of all parts. By default it is the language model's own.

    Returns:
        [`Composed`]: The model, in eval mode, and its `LlavaProcessor`.

    Raises:
        `ValueError`: If the parts can't be put together. The message has the reason.
    """
    options = connector_options(connector, connector_config or {})
    text = AutoModelForCausalLM.from_pretrained(text_model, dtype=dtype)
    if dtype == "auto":
        dtype = text.dtype
    tokenizer = AutoTokenizer.from_pretrained(text_model, padding_side="left")
    tower = load_tower(vision_tower, dtype)
    try:
        images = AutoImageProcessor.from_pretrained(vision_tower)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"vision_tower={vision_tower!r} has no image processor ({error}); save one to its folder."
        ) from error
    return assemble(
        text,
        tokenizer,
        tower,
        pad_to_square(images) if pad else images,
        connector,
        connector_config=options,
        feature_layer=feature_layer,
        template=template,
    )


def assemble(
    text: Any,
    tokenizer: Any,
    tower: Any,
    images: Any,
    connector: str = "mlp2x_gelu",
    *,
    connector_config: dict[str, Any] | None = None,
    feature_layer: int = -2,
    template: str = "auto",
) -> Composed:
    """As [`compose`], from parts in memory, which become parts of the result."""
    options = connector_options(connector, connector_config or {})
    check_text(text, tokenizer)
    probe = torch.arange(3, 11).unsqueeze(0) % text.config.vocab_size
    with torch.no_grad():
        expected = text.eval()(input_ids=probe, use_cache=False).logits
    seen = features(tower, images, feature_layer)
    class_token = has_class_token(tower, seen)
    count = seen.shape[1] - class_token
    image_token_id = add_image_token(text, tokenizer)
    head = text.get_output_embeddings()
    native = connector in NATIVE and not gives_maps(tower) and is_plain_head(text, head)
    config_class, model_class = LlavaFactoryConfig, LlavaFactoryForConditionalGeneration
    extra = {"connector": connector, "connector_config": options, "lm_head_bias": head.bias is not None}
    if native:
        config_class, model_class = LlavaConfig, LlavaForConditionalGeneration
        extra = {"projector_hidden_act": NATIVE[connector]}
    tied = head.weight is text.get_input_embeddings().weight
    tied = tied and hasattr(text.base_model, "embed_tokens")  # where transformers' Llava looks for the other one
    text.config.tie_word_embeddings = tied
    config = config_class(
        vision_config=tower.config,
        text_config=text.config,
        image_token_id=image_token_id,
        image_seq_length=OWN[connector][0].count(count, options),
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default" if class_token else "full",
        tie_word_embeddings=tied,
        **extra,
    )
    model = _assemble(model_class, config, text, tower, head, tied)
    processor = _make_processor(tokenizer, images, config, seen.shape[1], template)
    composed = Composed(model, processor)
    _say_where_answers_end(composed, text)
    _check_logits(model, probe, expected)
    _check_image(composed)
    return composed


def _assemble(model_class: Any, config: Any, text: Any, tower: Any, head: nn.Linear, tied: bool) -> Any:
    """The parts in a model; the connector alone is new."""
    with torch.device("meta"):
        model = model_class(config)
    model.model.vision_tower, model.model.language_model = tower, text.base_model
    model.model.multi_modal_projector = _new_connector(config).to(text.dtype)
    weight = head.weight if tied else nn.Parameter(head.weight.detach().clone())
    model.lm_head.weight = weight
    if head.bias is not None:
        model.lm_head.bias = head.bias
    model.generation_config = text.generation_config
    return model.eval()


def _new_connector(config: Any) -> nn.Module:
    """With torch's own initial weights, as LLaVA's code has; for `linear`, see `NATIVE`."""
    if isinstance(config, LlavaFactoryConfig):
        return OWN[config.connector][0](config)
    connector = LlavaMultiModalProjector(config)
    if config.projector_hidden_act == NATIVE["linear"]:
        nn.init.eye_(connector.linear_2.weight)
        nn.init.zeros_(connector.linear_2.bias)
    return connector


def _make_processor(tokenizer: Any, images: Any, config: Any, features: int, template: str) -> Any:
    """
    The processor counts an image's tokens from the pixels: `(height // patch_size) · (width // patch_size)` and some
    more. Where the connector changes their number, that is one patch and what is missing.
    """
    height, width = blank(images).shape[-2:]
    patch = getattr(config.vision_config, "patch_size", None)
    grid = (height // patch) * (width // patch) if isinstance(patch, int) else 0
    keeps = getattr(config, "connector", "linear") not in ("pixel_shuffle", "resampler", "qformer")
    strategy = config.vision_feature_select_strategy
    if keeps and grid and 0 <= features - grid <= 16:
        more = features - grid
    else:
        patch, strategy = max(height, width), "full"
        if height != width:
            raise ValueError(
                f"vision_tower: its images have {height} × {width} pixels; connectors that change the number of "
                "tokens need squares."
            )
        more = config.image_seq_length - 1
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=strategy,
        image_token=IMAGE,
        num_additional_image_tokens=more,
        chat_template=chat_template(template, tokenizer),
    )
    tokenizer.chat_template = processor.chat_template
    return processor


def _say_where_answers_end(composed: Composed, text: Any) -> None:
    """Generation also stops at the token with which the chat template ends an answer."""
    end = end_of_turn(composed.processor)
    settings = composed.model.generation_config
    known = settings.eos_token_id if settings.eos_token_id is not None else text.config.eos_token_id
    known = [known] if isinstance(known, int) else list(known or [])
    settings.eos_token_id = list(dict.fromkeys([*known, end]))
    settings.pad_token_id = composed.processor.tokenizer.pad_token_id


@torch.no_grad()
def _check_logits(model: Any, probe: torch.Tensor, expected: torch.Tensor) -> None:
    """
    Raises:
        `ValueError`: if the composed model is another language model than the one that was given.
    """
    kind = type(model.model.language_model).__name__
    try:
        actual = model(input_ids=probe, use_cache=False).logits[..., : expected.shape[-1]]
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(f"text_model: transformers' Llava can't call a {kind} ({error}).") from error
    difference, size = (actual - expected).abs().max().item(), expected.abs().max().item()
    tolerance = 1e-3 if expected.dtype == torch.float32 else 2e-2
    if not difference <= tolerance * size:
        raise ValueError(
            f"text_model: inside a Llava, {kind} gives other logits than its causal language model (by "
            f"{difference:.2e} of {size:.2e}): something is done to them that Llava does not do. This model can't be "
            "composed."
        )


@torch.no_grad()
def _check_image(composed: Composed) -> None:
    """
    Raises:
        `ValueError`: if the processor leaves another number of tokens than the connector makes.
    """
    model, processor = composed.model, composed.processor
    pixels = blank(processor.image_processor)
    made = model.get_image_features(pixel_values=pixels.to(model.dtype)).pooler_output[0].shape[0]
    ids = processor(images=[grey()], text=[IMAGE], return_tensors="pt")["input_ids"]
    room = int((ids == model.config.image_token_id).sum())
    if made != room or made != model.config.image_seq_length:
        raise ValueError(
            f"The connector makes {made} tokens of an image, the processor leaves {room} and the configuration says "
            f"{model.config.image_seq_length}; this tower's size can't be told to transformers' Llava processor."
        )
