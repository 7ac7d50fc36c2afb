"""Labels against masks made by hand: what stands between ⟦ and ⟧ is learned."""

import re

import pytest
from PIL import Image

from peft_ext.factory.data import Collator, sample_of
from peft_ext.factory.masking import IGNORED, encode, end_of_turn
from tests.factory._tokenizers import processor


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
TURNS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "and what color?"},
    {"role": "assistant", "content": "blue and green"},
]
BY_HAND = {
    "vicuna": f"<s>{SYSTEM}USER: <image>\nwhat is it? ASSISTANT:⟦ red</s>⟧"
    "USER: and what color? ASSISTANT:⟦ blue and green</s>⟧",
    "plain": "<s><image>\n⟦red</s>⟧⟦blue and green</s>⟧",
    "chatml": "<|im_start|>user\n<image>\nwhat is it?<|im_end|>\n<|im_start|>assistant\n⟦red<|im_end|>⟧\n"
    "<|im_start|>user\nand what color?<|im_end|>\n<|im_start|>assistant\n⟦blue and green<|im_end|>⟧\n",
    "llama3": "<s><|start|>user<|end|>\n\n<image>\nwhat is it?<|eot|><|start|>assistant<|end|>\n\n⟦red<|eot|>⟧"
    "<|start|>user<|end|>\n\nand what color?<|eot|><|start|>assistant<|end|>\n\n⟦blue and green<|eot|>⟧",
    "gemma": "<s><turn>user\n<image>\nwhat is it?<|eot|>\n<turn>model\n⟦red<|eot|>⟧\n"
    "<turn>user\nand what color?<|eot|>\n<turn>model\n⟦blue and green<|eot|>⟧\n",
    "mistral": "<s>[INST] <image>\nwhat is it? [/INST]⟦ red</s>⟧[INST] and what color? [/INST]⟦ blue and green</s>⟧",
}


def by_hand(text, words, image_tokens):
    """Ids and labels of a marked text, piece by piece."""
    ids, labels = [], []
    for piece in re.split(r"(⟦.*?⟧)", text, flags=re.DOTALL):
        learned = piece.startswith("⟦")
        numbers = words.encode(piece.strip("⟦⟧"), add_special_tokens=False)
        image = words.convert_tokens_to_ids("<image>")
        numbers = [n for number in numbers for n in [number] * (image_tokens if number == image else 1)]
        ids += numbers
        labels += numbers if learned else [IGNORED] * len(numbers)
    return ids, labels


@pytest.mark.parametrize("merges", [0, 60])
@pytest.mark.parametrize("template", BY_HAND)
def test_labels_equal_masks_made_by_hand(template, merges):
    made = processor(template, merges)
    assert encode(made, TURNS, [4]) == by_hand(BY_HAND[template], made.tokenizer, 4)


@pytest.mark.parametrize("template, end", [("vicuna", "</s>"), ("chatml", "<|im_end|>"), ("gemma", "<|eot|>")])
def test_the_token_that_ends_an_answer(template, end):
    made = processor(template)
    assert end_of_turn(made) == made.tokenizer.convert_tokens_to_ids(end)


def test_templates_that_rewrite_earlier_turns_or_never_end_are_refused():
    with pytest.raises(ValueError, match=r"changes earlier turns.*turn 1.*'chatml'"):
        encode(processor("forgetful"), TURNS, [4])
    made = processor("vicuna")
    made.chat_template = made.chat_template.replace("+ eos_token", "")
    with pytest.raises(ValueError, match="ends an answer with 'i', which is no special token"):
        end_of_turn(made)


def test_a_batch_has_the_processors_ids_and_no_labels_on_padding():
    """Two images, one, and none: ids as the processor makes them of the same text."""
    made = processor("vicuna", 60)
    red, blue = (Image.new("RGB", (20, 30), colour) for colour in ("red", "blue"))
    one = {"conversations": [{"from": "human", "value": "what is it?\n<image>"}, {"from": "gpt", "value": "red"}]}
    two = {"conversations": [{"from": "human", "value": "<image> or <image> ?"}, {"from": "gpt", "value": "blue"}]}
    rows = [one | {"images": [red]}, two | {"images": [red, blue]}, {"question": "Hello", "answer": "Hi"}]
    batch = Collator(made)(rows)
    texts = [made.apply_chat_template(sample_of(row).messages) for row in rows]
    assert "USER: <image>\nwhat is it? ASSISTANT" in texts[0] and "<image>\nor<image>\n?" in texts[1]
    options = {"padding": True, "padding_side": "right", "add_special_tokens": False, "return_tensors": "pt"}
    expected = made(images=[red, red, blue], text=texts, **options)
    for key in ("input_ids", "attention_mask", "pixel_values"):
        assert (batch[key] == expected[key]).all(), key
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    learned = [made.tokenizer.decode(row[row != IGNORED]) for row in batch["labels"]]
    assert learned == [" red</s>", " blue</s>", " Hi</s>"]


def test_long_conversations_are_cut_but_never_an_image():
    made = processor("chatml")
    ids, labels = encode(made, TURNS, [4], max_length=40)
    assert (ids, labels) == tuple(each[:40] for each in encode(made, TURNS, [4]))
    with pytest.raises(ValueError, match="max_length=3 cuts an image"):
        encode(made, TURNS, [4], max_length=3)
    with pytest.warns(UserWarning, match="max_length=10 cuts all answers"):
        Collator(made, max_length=10)([{"messages": TURNS, "images": [Image.new("RGB", (9, 9))]}])


@pytest.mark.parametrize("images, word", [(0, "more"), (2, "fewer")])
def test_another_number_of_images_is_refused(images, word):
    with pytest.raises(ValueError, match=f"{word} '<image>' than its {images} images"):
        encode(processor("plain"), TURNS, [4] * images)
