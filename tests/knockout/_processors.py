"""Processors made offline, and models whose image tokens depend on their own patch alone."""

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers


SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<fake_token_around_image>", "<global-img>", "<row_1_col_1>"]
TEXT = [
    "USER: What color is the café's table, red or green? ASSISTANT: Red",
    "Is the mirror to the left or to the right of the bed? Answer with one word.",
    "refrigerators tables and chairs are there in the picture, aren't they?",
]


def tokenizer(kind="bytes", side="left"):
    """A BPE tokenizer: `bytes` as GPT-2's and Llama 3's, `metaspace` as Llama's, or `words` as the shapes world's."""
    if kind == "words":
        made = Tokenizer(models.WordLevel({}, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL)
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind == "metaspace"))
        alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else []
        if kind == "bytes":
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            made.decoder = decoders.ByteLevel()
        else:
            made.pre_tokenizer = pre_tokenizers.Metaspace()
            made.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet)
    made.train_from_iterator(TEXT, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side=side,
    )
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[5:]})
    return fast


SIZE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
PINPOINTS = [[32, 64], [64, 32], [64, 64], [32, 96], [96, 32]]


def _processor(kind, images, words, strategy="default"):
    return kind(
        images,
        words,
        patch_size=4,
        vision_feature_select_strategy=strategy,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def llava(kind="bytes", side="left", strategy="default"):
    return _processor(hf.LlavaProcessor, hf.CLIPImageProcessor(**SIZE), tokenizer(kind, side), strategy)


def llava_padding():
    images = hf.LlavaImageProcessor(**SIZE, do_pad=True, do_center_crop=True)
    return _processor(hf.LlavaProcessor, images, tokenizer())


def llava_next():
    images = hf.LlavaNextImageProcessor(**SIZE, image_grid_pinpoints=PINPOINTS)
    return _processor(hf.LlavaNextProcessor, images, tokenizer())


def gemma3():
    """The mark before the image is another token than the placeholders of its features."""
    made = tokenizer()
    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    made.add_special_tokens({"additional_special_tokens": list(marks.values())})
    for name, mark in marks.items():
        setattr(made, name, mark)
        setattr(made, f"{name}_id", made.convert_tokens_to_ids(mark))
    images = hf.Gemma3ImageProcessor(size={"height": 32, "width": 32})
    return hf.Gemma3Processor(images, made, image_seq_length=16)


class Qwen:
    """Qwen2-VL's image processor with a tokenizer; its own processor class needs torchvision, for videos."""

    def __init__(self):
        self.image_processor = hf.Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=10_000)
        self.tokenizer = tokenizer()
        self.image_token = "<image>"

    def __call__(self, images, text, return_tensors="pt", padding=True):
        made = self.image_processor(images, return_tensors="pt")
        counts = (made["image_grid_thw"].prod(1) // 4).tolist()
        text = [t.replace("<image>", "<image>" * n) for t, n in zip(text, counts, strict=True)]
        tokens = self.tokenizer(text, return_tensors="pt", padding=True)
        image = tokens["input_ids"] == self.tokenizer.convert_tokens_to_ids("<image>")
        return {**tokens, **made, "mm_token_type_ids": image.int()}


def _vision(**options):
    return hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=4,
        **options,
    )  # fmt: skip


def _text(words):
    return hf.LlamaConfig(
        vocab_size=words, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )


def local_model(processor):
    """A model that sees each patch alone: its vision tower is read before the first layer."""
    words, image = len(processor.tokenizer), processor.tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    if isinstance(processor, Qwen):
        vision = {"depth": 0, "embed_dim": 16, "num_heads": 2, "patch_size": 4, "hidden_size": 16}
        text = _text(words).to_dict()
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        text = {key: value for key, value in text.items() if key != "model_type"}
        config = hf.Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=image)
        return hf.Qwen2VLForConditionalGeneration(config).eval()
    options = {
        "vision_config": _vision(),
        "text_config": _text(words),
        "image_token_id": image,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": processor.vision_feature_select_strategy,
    }
    if isinstance(processor, hf.LlavaNextProcessor):
        config = hf.LlavaNextConfig(**options, image_grid_pinpoints=PINPOINTS)
        return hf.LlavaNextForConditionalGeneration(config).eval()
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(**options, image_seq_length=64)).eval()
