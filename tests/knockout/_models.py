"""Tiny decoders of many families, with and without vision, and inputs for them: built from configs."""

from dataclasses import dataclass

import torch
import transformers as hf


IMAGE, VIDEO, PAD = 60, 61, 0
VOCABULARY, LAYERS, WIDTH = 64, 4, 32
_IDS = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}


@dataclass
class Family:
    """`build` makes the model; `visual` placeholders per image, none for a text model; what goes with the ids."""

    build: object
    visual: int = 0
    pixels: object = None  # function: number of images -> dict of arguments
    extra: object = None  # function: input_ids -> dict of arguments
    causal: bool = True
    sdpa: bool = True


def _text(kind="Llama", **options):
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        **_IDS,
    }
    if kind.startswith("Gemma") or kind == "Qwen3":
        defaults["head_dim"] = 8
    if kind == "Gemma2":
        defaults |= {"query_pre_attn_scalar": 8, "sliding_window": 12}
    return getattr(hf, f"{kind}Config")(**{**defaults, **options})


def _causal_lm(kind, **options):
    return lambda: getattr(hf, f"{kind}ForCausalLM")(_text(kind, **options))


def _gpt2():
    sizes = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 128}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **_IDS, initializer_range=0.1))


_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def _clip():
    return hf.CLIPVisionConfig(**_VISION, projection_dim=WIDTH, initializer_range=0.1)


def _llava(kind="Llama", **options):
    return lambda: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=_clip(), text_config=_text(kind, **options), image_token_id=IMAGE, image_seq_length=16
        )
    )


def _llava_next():
    return hf.LlavaNextForConditionalGeneration(
        hf.LlavaNextConfig(
            vision_config=_clip(),
            text_config=_text(),
            image_token_id=IMAGE,
            image_grid_pinpoints=[[16, 16]],
            image_seq_length=16,
        )
    )


def _qwen(kind, **vision):
    text = {**_text("Qwen2").to_dict(), "rope_parameters": None}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    if kind == "Qwen3VL":
        text["head_dim"] = 8
    for key in ("model_type", "layer_types"):
        text.pop(key, None)
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 58, "vision_end_token_id": 59}
    return lambda: getattr(hf, f"{kind}ForConditionalGeneration")(
        getattr(hf, f"{kind}Config")(text_config=text, vision_config={"depth": 2, "num_heads": 2, **vision}, **ids)
    )


_QWEN_VISION = {"hidden_size": 16, "intermediate_size": 24, "patch_size": 4, "out_hidden_size": WIDTH}


def _idefics3(kind):
    return lambda: getattr(hf, f"{kind}ForConditionalGeneration")(
        getattr(hf, f"{kind}Config")(
            vision_config=_VISION, text_config=_text(), image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD
        )
    )


def _paligemma():
    vision = hf.SiglipVisionConfig(**_VISION, projection_dim=WIDTH)
    return hf.PaliGemmaForConditionalGeneration(
        hf.PaliGemmaConfig(
            vision_config=vision,
            text_config=_text("Gemma"),
            image_token_index=IMAGE,
            projection_dim=WIDTH,
            hidden_size=WIDTH,
        )
    )


def _gemma3():
    text = _text("Gemma3Text", sliding_window=14, layer_types=["sliding_attention", "full_attention"] * 2)
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            vision_config=hf.SiglipVisionConfig(**_VISION),
            text_config=text,
            image_token_id=IMAGE,
            mm_tokens_per_image=4,
        )
    )


def _images(count):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))


def _pixels(count):
    return {"pixel_values": _images(count)}


def _tiles(count):
    return {
        "pixel_values": _images(2 * count).view(count, 2, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 16]] * count),
    }


def _nested(count):
    return {"pixel_values": _images(count).unsqueeze(1)}


def _patches(count):
    # 4 x 4 patches of 2 x 4 x 4 x 3 numbers, merged 2 x 2 into four tokens
    numbers = torch.randn(count * 16, 96, generator=torch.Generator().manual_seed(count))
    return {"pixel_values": numbers, "image_grid_thw": torch.tensor([[1, 4, 4]] * count)}


def _types(ids):
    return {"mm_token_type_ids": (ids == IMAGE).int()}


FAMILIES = {
    "llava": Family(_llava(), 16, _pixels),
    "llava_mistral": Family(_llava("Mistral", sliding_window=14), 16, _pixels),
    "llava_next": Family(_llava_next, 36, _tiles),
    "qwen2_vl": Family(
        _qwen("Qwen2VL", embed_dim=16, mlp_ratio=2, patch_size=4, hidden_size=WIDTH), 4, _patches, _types
    ),
    "qwen2_5_vl": Family(
        _qwen("Qwen2_5_VL", **_QWEN_VISION, window_size=16, fullatt_block_indexes=[1]), 4, _patches, _types
    ),
    "qwen3_vl": Family(
        _qwen("Qwen3VL", **_QWEN_VISION, num_position_embeddings=16, deepstack_visual_indexes=[0]), 4, _patches, _types
    ),
    "idefics3": Family(_idefics3("Idefics3"), 4, _nested),
    "smolvlm": Family(_idefics3("SmolVLM"), 4, _nested),
    "paligemma": Family(_paligemma, 16, _pixels, lambda ids: {"token_type_ids": torch.zeros_like(ids)}, causal=False),
    "gemma3": Family(_gemma3, 4, _pixels, lambda ids: {"token_type_ids": (ids == IMAGE).int()}),
    "llama": Family(_causal_lm("Llama")),
    "qwen2": Family(_causal_lm("Qwen2")),
    "qwen3": Family(_causal_lm("Qwen3")),
    "mistral": Family(_causal_lm("Mistral", sliding_window=6)),
    "gemma": Family(_causal_lm("Gemma")),
    "gemma2": Family(_causal_lm("Gemma2"), sdpa=False),
    "gpt2": Family(_gpt2),
}
VISION = [name for name, family in FAMILIES.items() if family.visual]
CAUSAL = [name for name, family in FAMILIES.items() if family.causal]


def build(family="llava", attention=None, dtype=torch.float32):
    """A new model, always with the same weights, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[family].build().eval()
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:  # so that a forgotten or doubled norm shows
                torch.nn.init.normal_(parameter, 0.0 if "gemma" in family else 1.0, 0.3)
            elif not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
    if attention is not None:
        decoder = model.get_decoder()
        decoder.config._attn_implementation = attention
    return model.to(dtype)


def inputs(family="llava", texts=((3, 7), (5, 7)), padding="left", image_first=True):
    """
    Inputs and groups (`image`, `question`, `last`), each bool `[batch, sequence]`. A row is `before` tokens, the
    image, then `after` tokens, of which all but the last two are the question.
    """
    description = FAMILIES[family]
    generator = torch.Generator().manual_seed(1)
    rows = []
    for before, after in texts:
        row = torch.randint(3, 50, (before,), generator=generator).tolist()
        visual = (
            [IMAGE] * description.visual
            if description.visual
            else torch.randint(3, 50, (8,), generator=generator).tolist()
        )
        rows.append((row, visual, torch.randint(3, 50, (after,), generator=generator).tolist()))
    length = max(sum(map(len, row)) for row in rows)
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros_like(ids)
    groups = {name: torch.zeros_like(ids, dtype=torch.bool) for name in ("image", "question", "last")}
    for number, (before, visual, after) in enumerate(rows):
        tokens = before + visual + after
        start = length - len(tokens) if padding == "left" else 0
        stop = start + len(tokens)
        ids[number, start:stop] = torch.tensor(tokens)
        mask[number, start:stop] = 1
        at = start + len(before)
        groups["image"][number, at : at + len(visual)] = True
        groups["question"][number, at + len(visual) : stop - 2] = True
        groups["last"][number, stop - 1] = True
    batch = {"input_ids": ids, "attention_mask": mask}
    if description.visual:
        batch |= description.pixels(len(rows))
    if description.extra is not None:
        batch |= description.extra(ids)
    return batch, groups


def row(batch, groups, number, family="llava"):
    """One row of `inputs` without its padding."""
    kept = batch["attention_mask"][number].bool()
    single = {key: value[number : number + 1][:, kept] for key, value in batch.items() if key in _SEQUENCES}
    if FAMILIES[family].visual:
        size = len(batch["input_ids"])
        for key in batch.keys() - _SEQUENCES:
            share = len(batch[key]) // size
            single[key] = batch[key][number * share : (number + 1) * share]
    return single, {name: mask[number : number + 1][:, kept] for name, mask in groups.items()}


_SEQUENCES = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
