"""The processor of the tiny LLaVA: words to numbers, pictures to pixels. Made offline, saved with the model."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from .world import CELL, GRID, SIZE, WORDS


SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
IMAGE_TOKENS = GRID * GRID


def make_processor() -> LlavaProcessor:
    """One token per word; `<image>` becomes one token per patch."""
    words = [*SPECIAL, *dict.fromkeys(WORDS)]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    fast.image_token = "<image>"
    size = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size=size, do_convert_rgb=True, image_mean=[0.2] * 3, image_std=[0.25] * 3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=fast,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
