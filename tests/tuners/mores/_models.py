"""Tiny vision-language models, one of each family, with inputs for them: built from configs, without processors."""

from dataclasses import dataclass, field

import torch
import transformers as hf


IMAGE, VIDEO, PAD, VISION_START, VISION_END = 60, 61, 0, 58, 59
VOCABULARY = 64
LAYERS, WIDTH = 3, 32


@dataclass
class Family:
    """How to build a model and inputs: `visual` placeholders per image, and what goes with `input_ids`."""

    build: object
    visual: int
    pixels: object  # function: number of images -> dict of arguments
    extra: object = None  # function: input_ids -> dict of arguments
    options: dict = field(default_factory=dict)


def _text(kind="llama", **options):
    classes = {
        "llama": hf.LlamaConfig,
        "phi": hf.PhiConfig,
        "qwen2": hf.Qwen2Config,
        "mistral": hf.MistralConfig,
        "gemma": hf.GemmaConfig,
    }
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind == "gemma":
        defaults["head_dim"] = 8
    return classes[kind](**{**defaults, **options})


def _clip():
    return hf.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        projection_dim=WIDTH,
        initializer_range=0.2,
    )


def _siglip(**options):
    return hf.SiglipVisionConfig(
        **{
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
            **options,
        }
    )


def _llava(kind="llama", layers=LAYERS):
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=_clip(),
            text_config=_text(kind, num_hidden_layers=layers),
            image_token_index=IMAGE,
            image_token_id=IMAGE,
            image_seq_length=16,
        )
    )


def _llava_next():
    return hf.LlavaNextForConditionalGeneration(
        hf.LlavaNextConfig(
            vision_config=_clip(),
            text_config=_text(),
            image_token_index=IMAGE,
            image_token_id=IMAGE,
            image_grid_pinpoints=[[16, 16]],
            image_seq_length=16,
        )
    )


_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_QWEN_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": _MROPE,
}
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def _qwen2_vl():
    vision = {"depth": 2, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4, "hidden_size": WIDTH}
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(text_config=dict(_QWEN_TEXT), vision_config=vision, **_QWEN_IDS)
    )


def _qwen2_5_vl():
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 24,
        "patch_size": 4,
        "out_hidden_size": WIDTH,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(text_config=dict(_QWEN_TEXT), vision_config=vision, **_QWEN_IDS)
    )


def _qwen3_vl():
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 24,
        "patch_size": 4,
        "out_hidden_size": WIDTH,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    return hf.Qwen3VLForConditionalGeneration(
        hf.Qwen3VLConfig(text_config={**_QWEN_TEXT, "head_dim": 8}, vision_config=vision, **_QWEN_IDS)
    )


def _idefics3(kind):
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    config = getattr(hf, f"{kind}Config")(
        vision_config=vision, text_config=_text(), image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


def _paligemma():
    config = hf.PaliGemmaConfig(
        vision_config=_siglip(projection_dim=WIDTH),
        text_config=_text("gemma"),
        image_token_index=IMAGE,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    return hf.PaliGemmaForConditionalGeneration(config)


def _gemma3():
    text = hf.Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.2,
        sliding_window=64,
        pad_token_id=PAD,
    )
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(vision_config=_siglip(), text_config=text, image_token_id=IMAGE, mm_tokens_per_image=4)
    )


def _images(count):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))


def _patches(count):
    # 4 x 4 patches of 2 x 4 x 4 x 3 numbers, merged 2 x 2 into four tokens
    numbers = torch.randn(count * 16, 96, generator=torch.Generator().manual_seed(count))
    return {"pixel_values": numbers, "image_grid_thw": torch.tensor([[1, 4, 4]] * count)}


def _types(ids):
    return {"mm_token_type_ids": (ids == IMAGE).int()}


FAMILIES = {
    **{
        f"llava_{kind}": Family(lambda kind=kind: _llava(kind), 16, lambda n: {"pixel_values": _images(n)})
        for kind in ("llama", "phi", "qwen2", "mistral")
    },
    # An image of one tile: the base view, then the tile, each 16 tokens, and a newline after each row of the tile.
    "llava_next": Family(
        _llava_next,
        36,
        lambda n: {
            "pixel_values": _images(2 * n).view(n, 2, 3, 16, 16),
            "image_sizes": torch.tensor([[16, 16]] * n),
        },
    ),
    "qwen2_vl": Family(_qwen2_vl, 4, _patches, _types),
    "qwen2_5_vl": Family(_qwen2_5_vl, 4, _patches, _types),
    "qwen3_vl": Family(_qwen3_vl, 4, _patches, _types),
    "idefics3": Family(lambda: _idefics3("Idefics3"), 4, lambda n: {"pixel_values": _images(n).unsqueeze(1)}),
    "smolvlm": Family(lambda: _idefics3("SmolVLM"), 4, lambda n: {"pixel_values": _images(n).unsqueeze(1)}),
    "paligemma": Family(
        _paligemma,
        16,
        lambda n: {"pixel_values": _images(n)},
        lambda ids: {"token_type_ids": torch.zeros_like(ids)},
    ),
    "gemma3": Family(
        _gemma3, 4, lambda n: {"pixel_values": _images(n)}, lambda ids: {"token_type_ids": (ids == IMAGE).int()}
    ),
}


def build(family="llava_llama", dtype=torch.float32):
    """A new model, always with the same weights, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[family].build().eval()
        for parameter in model.parameters():  # some families start parts at zero
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def inputs(family="llava_llama", texts=((3, 4), (5, 4)), padding="right", dtype=torch.float32):
    """One image per row between `before` and `after` text tokens; `None` for a row of text only."""
    description = FAMILIES[family]
    generator = torch.Generator().manual_seed(1)
    rows, images = [], 0
    for lengths in texts:
        before, after = lengths if lengths is not None else (3, 3)
        row = torch.randint(3, 50, (before,), generator=generator).tolist()
        if lengths is not None:
            row += [VISION_START, *[IMAGE] * description.visual, VISION_END]
            images += 1
        rows.append(row + torch.randint(3, 50, (after,), generator=generator).tolist())
    longest = max(map(len, rows))
    pads = [[PAD] * (longest - len(row)) for row in rows]
    ids = torch.tensor([pad + row if padding == "left" else row + pad for row, pad in zip(rows, pads, strict=True)])
    batch = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    if images:
        batch |= description.pixels(images)
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
    if description.extra is not None:
        batch |= description.extra(ids)
    return batch
