"""Tiny decoders of many families, with and without vision, and inputs for them: built from configs, no processors."""

import copy
import functools
from dataclasses import dataclass

import torch
import transformers as hf


IMAGE, VIDEO, PAD, VISION_START, VISION_END = 60, 61, 0, 58, 59
VOCABULARY, LAYERS, WIDTH = 64, 3, 32
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


def text_config(kind="Llama", **options):
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
    return lambda: getattr(hf, f"{kind}ForCausalLM")(text_config(kind, **options))


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


def llava(kind="Llama", **options):
    config = hf.LlavaConfig(
        vision_config=_clip(), text_config=text_config(kind, **options), image_token_id=IMAGE, image_seq_length=16
    )
    return hf.LlavaForConditionalGeneration(config)


def _llava_next():
    config = hf.LlavaNextConfig(
        vision_config=_clip(), text_config=text_config(), image_token_id=IMAGE, image_grid_pinpoints=[[16, 16]],
        image_seq_length=16,
    )  # fmt: skip
    return hf.LlavaNextForConditionalGeneration(config)


def _qwen(kind, **vision):
    text = {**text_config("Qwen2").to_dict(), "rope_parameters": None}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    if kind == "Qwen3VL":
        text["head_dim"] = 8
    for key in ("model_type", "layer_types"):
        text.pop(key, None)
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    ids |= {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    return lambda: getattr(hf, f"{kind}ForConditionalGeneration")(
        getattr(hf, f"{kind}Config")(text_config=text, vision_config={"depth": 2, "num_heads": 2, **vision}, **ids)
    )


_QWEN_VISION = {"hidden_size": 16, "intermediate_size": 24, "patch_size": 4, "out_hidden_size": WIDTH}


def _idefics3(kind):
    return lambda: getattr(hf, f"{kind}ForConditionalGeneration")(
        getattr(hf, f"{kind}Config")(
            vision_config=_VISION, text_config=text_config(), image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD
        )
    )


def _paligemma():
    vision = hf.SiglipVisionConfig(**_VISION, projection_dim=WIDTH)
    config = hf.PaliGemmaConfig(
        vision_config=vision, text_config=text_config("Gemma"), image_token_index=IMAGE, projection_dim=WIDTH,
        hidden_size=WIDTH,
    )  # fmt: skip
    return hf.PaliGemmaForConditionalGeneration(config)


def _gemma3():
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = text_config("Gemma3Text", sliding_window=14, layer_types=kinds)
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**_VISION), text_config=text, image_token_id=IMAGE, mm_tokens_per_image=4
    )
    return hf.Gemma3ForConditionalGeneration(config)


def _images(count):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))


def _pixels(count):
    return {"pixel_values": _images(count)}


def _tiles(count):
    """Images of one tile: the base view, then the tile, each 16 tokens, and a newline after each row of the tile."""
    sizes = torch.tensor([[16, 16]] * count)
    return {"pixel_values": _images(2 * count).view(count, 2, 3, 16, 16), "image_sizes": sizes}


def _nested(count):
    return {"pixel_values": _images(count).unsqueeze(1)}


def _patches(count):
    # 4 x 4 patches of 2 x 4 x 4 x 3 numbers, merged 2 x 2 into four tokens
    numbers = torch.randn(count * 16, 96, generator=torch.Generator().manual_seed(count))
    return {"pixel_values": numbers, "image_grid_thw": torch.tensor([[1, 4, 4]] * count)}


def _types(ids):
    return {"mm_token_type_ids": (ids == IMAGE).int()}


FAMILIES = {
    "llava": Family(llava, 16, _pixels),
    "llava_phi": Family(lambda: llava("Phi"), 16, _pixels),
    "llava_qwen2": Family(lambda: llava("Qwen2"), 16, _pixels),
    "llava_mistral": Family(lambda: llava("Mistral", sliding_window=14), 16, _pixels),
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


@functools.cache
def _built(family):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[family].build().eval()
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:  # so that a forgotten or doubled norm shows
                torch.nn.init.normal_(parameter, 0.0 if "gemma" in family else 1.0, 0.3)
            elif not parameter.any():  # some families start parts at zero
                torch.nn.init.normal_(parameter, std=0.2)
    model.get_output_embeddings().weight.data[IMAGE] = 0.0  # never generated, which would ask for an image
    return model


def build(family="llava", attention=None, dtype=torch.float32):
    """A new model, always with the same weights, in eval mode."""
    model = copy.deepcopy(_built(family))
    if attention is not None:
        decoder = model.get_decoder()
        decoder.config._attn_implementation = attention
    return model.to(dtype)


def _rows(family, texts):
    """Of each sample: tokens before the image, those of the image, and those after it; `None` is text alone."""
    generator, visual = torch.Generator().manual_seed(1), FAMILIES[family].visual

    def draw(count):
        return torch.randint(3, 50, (count,), generator=generator).tolist()

    for lengths in texts:
        before, after = (3, 3) if lengths is None else lengths
        head = draw(before)
        image = [] if lengths is None else [IMAGE] * visual if visual else draw(8)
        yield head, image, draw(after)


def _padded(rows, padding):
    length = max(map(len, rows))
    pads = [[PAD] * (length - len(row)) for row in rows]
    ids = torch.tensor([pad + row if padding == "left" else row + pad for row, pad in zip(rows, pads, strict=True)])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def _with_images(family, batch, images):
    description = FAMILIES[family]
    if images and description.visual:
        batch |= description.pixels(images)
    if description.extra is not None:
        batch |= description.extra(batch["input_ids"])
    return batch


def inputs(family="llava", texts=((3, 4), (5, 4)), padding="right", dtype=torch.float32):
    """One image per row between marked ends and `before` and `after` text tokens; `None` for a row of text only."""
    rows = [
        before + ([VISION_START, *image, VISION_END] if image else []) + after
        for before, image, after in _rows(family, texts)
    ]
    batch = _with_images(family, _padded(rows, padding), sum(lengths is not None for lengths in texts))
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
    return batch


def grouped(family="llava", texts=((3, 7), (5, 7)), padding="left"):
    """
    Inputs and groups (`image`, `question`, `last`), each bool `[batch, sequence]`. A row is `before` tokens, the
    image, then `after` tokens, of which all but the last two are the question.
    """
    rows = list(_rows(family, texts))
    batch = _padded([before + image + after for before, image, after in rows], padding)
    groups = {name: torch.zeros_like(batch["input_ids"], dtype=torch.bool) for name in ("image", "question", "last")}
    for number, (before, image, after) in enumerate(rows):
        start = int(batch["attention_mask"][number].argmax()) + len(before)
        stop = start + len(image) + len(after)
        groups["image"][number, start : start + len(image)] = True
        groups["question"][number, start + len(image) : stop - 2] = True
        groups["last"][number, stop - 1] = True
    return _with_images(family, batch, len(rows)), groups


def prepared(family="llava", attention=None, dtype=torch.float32, **options):
    """A new model, with the inputs and the groups of [`grouped`] for it."""
    return build(family, attention, dtype), *grouped(family, **options)


def row(batch, groups, number, family="llava"):
    """One row of `grouped` without its padding."""
    kept = batch["attention_mask"][number].bool()
    single = {key: value[number : number + 1][:, kept] for key, value in batch.items() if key in _SEQUENCES}
    if FAMILIES[family].visual:
        size = len(batch["input_ids"])
        for key in batch.keys() - _SEQUENCES:
            share = len(batch[key]) // size
            single[key] = batch[key][number * share : (number + 1) * share]
    return single, {name: mask[number : number + 1][:, kept] for name, mask in groups.items()}


_SEQUENCES = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
