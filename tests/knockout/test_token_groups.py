"""find_token_groups: spans are where their text is, boxes where the image tokens are that depend on them."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from peft_ext.knockout import find_token_groups, image_token_norms

from . import _processors as make
from ._reference import decoder_embeddings


PROMPT = "USER: <image>\n{} ASSISTANT:"
QUESTIONS = [
    "What color is the café's table, red or green?",
    "Is the mirror to the left or to the right of the bed?",
]


def picture(width, height, box=None, seed=0):
    """Noise, with other noise inside a box."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if box is not None:
        left, top, right, bottom = box
        pixels[top:bottom, left:right] = 255 - pixels[top:bottom, left:right]
    return Image.fromarray(pixels)


def prepare(processor, questions, images):
    text = [PROMPT.format(question) for question in questions]
    return processor(images=images, text=text, return_tensors="pt", padding=True)


def text_of(processor, inputs, mask, row=0):
    return processor.tokenizer.decode(inputs["input_ids"][row][mask[row]])


def squeeze(text):
    return "".join(text.split())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["bytes", "metaspace", "words"])
def test_spans_hold_their_text(kind, side):
    processor = make.llava(kind, side)
    inputs = prepare(processor, QUESTIONS, [picture(40, 40)] * 2)
    spans = [
        {"question": QUESTIONS[0], "true_option": "red", "false_option": "green", "objects": ["table"]},
        {"question": QUESTIONS[1], "true_option": "left", "false_option": "right", "objects": ["mirror", "bed"]},
    ]
    groups = find_token_groups(processor, inputs, spans=spans)
    for row, span in enumerate(spans):
        for name, phrases in span.items():
            for phrase in [phrases] if isinstance(phrases, str) else phrases:
                # a tokenizer may glue punctuation to a word, but no other word
                found = squeeze(text_of(processor, inputs, groups[name], row))
                assert squeeze(phrase) in found
                assert len(found) <= len(squeeze("".join(phrases))) + 2
    attended = inputs["attention_mask"].bool()
    assert torch.equal(groups["image"], inputs["input_ids"] == processor.image_token_id)
    assert torch.equal(groups["text"], attended & ~groups["image"])
    assert torch.equal(groups["options"], groups["true_option"] | groups["false_option"])
    assert torch.equal(groups["question_without_options"], groups["question"] & ~groups["options"])
    assert torch.equal(groups["question_without_objects"], groups["question"] & ~groups["objects"])
    last = attended.shape[1] - 1 - attended.flip(1).int().argmax(1)
    assert torch.equal(groups["last"].int().argmax(1), last) and groups["last"].sum() == 2
    for mask in groups.values():
        assert mask.dtype == torch.bool and mask.shape == inputs["input_ids"].shape and not (mask & ~attended).any()


def test_tokens_of_part_of_a_character_belong_to_it():
    processor = make.llava("bytes")
    inputs = prepare(processor, ["Is it 猫 or 犬?"], [picture(40, 40)])
    groups = find_token_groups(processor, inputs, spans={"cat": "猫", "dog": "犬"})
    assert text_of(processor, inputs, groups["cat"]).strip() == "猫"
    assert text_of(processor, inputs, groups["dog"]).strip() == "犬"
    assert groups["cat"].sum() > 1  # no merge was learnt for it
    assert not (groups["cat"] & groups["dog"]).any()


def test_every_occurrence():
    processor = make.tokenizer()
    inputs = processor("the bed is in the bed room", return_tensors="pt")
    once = find_token_groups(processor, inputs, spans={"it": "bed"})["it"]
    all_of_them = find_token_groups(processor, inputs, spans={"it": "bed"}, occurrence="all")["it"]
    assert (once & ~all_of_them).sum() == 0 and all_of_them.sum() == 2 * once.sum()


def test_the_question_comes_after_the_image_and_options_inside_it():
    processor = make.llava()
    text = "red or green? USER: <image>\nred or green? Answer red or green. ASSISTANT:"
    inputs = processor(images=[picture(40, 40)], text=[text], return_tensors="pt")
    spans = {"question": "red or green?", "true_option": "red", "false_option": "green", "anywhere": "green"}
    groups = find_token_groups(processor, inputs, spans=spans)
    image = groups["image"].nonzero()[:, 1]
    assert groups["question"].nonzero()[:, 1].min() > image.max()
    assert not (groups["options"] & ~groups["question"]).any()


PROCESSORS = {
    "crop": make.llava,
    "class token": lambda: make.llava(strategy="full"),
    "pad": make.llava_padding,
    "any resolution": make.llava_next,
    "qwen": make.Qwen,
}
# Sizes of which the processors' resizing keeps pixel edges where they are, so that a token sees a box or does not.
SIZES = {"crop": (32, 32), "class token": (32, 32), "pad": (32, 16), "any resolution": (64, 32), "qwen": (48, 32)}
BOXES = [(8, 8, 16, 16), (0, 0, 4, 4), (20, 4, 32, 12), (3, 5, 6, 7)]


@pytest.mark.parametrize("box", BOXES, ids=str)
@pytest.mark.parametrize("name", PROCESSORS)
def test_related_patches_are_the_tokens_that_see_the_box(name, box):
    """Changing the box changes these tokens' embeddings and no others, in a model without vision layers."""
    processor = PROCESSORS[name]()
    model, (width, height) = make.local_model(processor), SIZES[name]
    inputs, changed = (prepare(processor, ["red?"], [picture(width, height, b)]) for b in (None, box))
    with torch.no_grad():
        moved = decoder_embeddings(model, changed) - decoder_embeddings(model, inputs)
    moved = moved.abs().amax(-1) > 1e-6
    left, top, right, bottom = box
    groups = find_token_groups(
        processor, inputs, image=picture(width, height), boxes=[(left, top, right - left, bottom - top)]
    )
    related = groups["related_patches"]
    if name == "any resolution":  # the first view is shrunk: colours spread to tokens that hardly hold the box
        first = groups["image"] & (groups["image"].cumsum(1) <= 64)
        assert not (related & first & ~moved).any()
        moved, related = moved & ~first, related & ~first
    assert moved.any() and torch.equal(related, moved)
    patches = groups["related_patches"] | groups["other_patches"]
    assert not (groups["related_patches"] & groups["other_patches"]).any()
    newline = groups.get("newline", torch.zeros_like(patches))
    rest = groups["image"] & ~patches & ~newline
    assert rest.sum() == (1 if name == "class token" else 0)
    same = find_token_groups(processor, inputs, image=picture(width, height), boxes=[box], box_format="xyxy")
    assert torch.equal(same["related_patches"], groups["related_patches"])


@pytest.mark.parametrize("size", [(64, 16), (16, 64), (32, 32), (96, 24)], ids=str)
def test_patches_of_oblong_images_are_where_they_are(size):
    """Of 4 x 16 patches the number is a square too, but their grid is none."""
    processor, (width, height) = make.llava(), size
    processor.image_processor.do_center_crop = False
    processor.image_processor.size = {"height": height, "width": width}
    image = picture(width, height)
    inputs = prepare(processor, ["red?"], [image])
    groups = find_token_groups(processor, inputs, image=image, boxes=[(4, 8, 8, 4)])
    expected = torch.zeros(height // 4, width // 4, dtype=torch.bool)
    expected[2, 1:3] = True
    assert torch.equal(groups["related_patches"][groups["image"]], expected.flatten())


def test_image_tokens_that_are_no_patches_have_no_boxes():
    class Idefics2Processor(type(make.llava())):
        """As the original, by its name."""

    processor, image = make.llava(), picture(32, 32)
    inputs = prepare(processor, ["red?"], [image])
    processor.__class__ = Idefics2Processor
    with pytest.raises(ValueError, match="Idefics2Processor's model are learned queries, not patches"):
        find_token_groups(processor, inputs, image=image, boxes=[(8, 8, 16, 16)])


def test_unknown_words_are_no_image():
    """A tokenizer without the placeholder gives the token for unknown words in its stead."""

    class Processor:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=make.tokenizer().backend_tokenizer, unk_token="<unk>")
        image_token = "<no such token>"

    inputs = {"input_ids": torch.tensor([[4, Processor.tokenizer.unk_token_id, 5]])}
    assert "image" not in find_token_groups(Processor, inputs)


def test_gemma_3_s_image_is_its_features_not_the_mark_before_them():
    processor, image = make.gemma3(), picture(32, 32)
    inputs = processor(images=[image], text=["<start_of_image>red?"], return_tensors="pt")
    groups = find_token_groups(processor, inputs, image=image, boxes=[(8, 8, 16, 16)])
    assert torch.equal(groups["image"], inputs["token_type_ids"] == 1) and groups["image"].sum() == 16
    assert groups["related_patches"].sum() == 4 and groups["other_patches"].sum() == 12


@pytest.mark.parametrize("size", [(64, 32), (50, 30), (31, 97), (64, 64), (20, 20)], ids=str)
def test_newlines_are_the_model_s_newline_tokens(size):
    processor = make.llava_next()
    model = make.local_model(processor)
    torch.nn.init.constant_(model.model.image_newline, 7.0)
    inputs = prepare(processor, ["red?"], [picture(*size)])
    with torch.no_grad():
        expected = (decoder_embeddings(model, inputs) == 7.0).all(-1)
    assert expected.any() and torch.equal(find_token_groups(processor, inputs)["newline"], expected)


@pytest.mark.parametrize("name", ["crop", "pad", "any resolution", "qwen"])
def test_coverage_is_the_box_s_share(name):
    """Of an image of any size the related tokens cover about as much as the box does."""
    processor = PROCESSORS[name]()
    image, box = picture(120, 120), (30, 24, 60, 48)
    inputs = prepare(processor, ["red?"], [image])
    groups = find_token_groups(processor, inputs, image=image, boxes=[box], threshold=0.5)
    share = groups["related_patches"].sum() / (groups["related_patches"] | groups["other_patches"]).sum()
    assert abs(float(share) - 0.2) < 0.08


def test_batches_equal_single_rows():
    processor = make.llava_next()
    images, boxes = [picture(64, 32), picture(31, 97)], [[(5, 5, 20, 20)], [(1, 60, 20, 20), (2, 2, 8, 8)]]
    spans = [{"question": question} for question in QUESTIONS]
    inputs = prepare(processor, QUESTIONS, images)
    together = find_token_groups(processor, inputs, image=images, spans=spans, boxes=boxes)
    for row in range(2):
        single = prepare(processor, QUESTIONS[row : row + 1], images[row : row + 1])
        alone = find_token_groups(processor, single, image=images[row], spans=spans[row], boxes=boxes[row])
        length = single["input_ids"].shape[1]
        assert set(alone) == set(together)
        for name, mask in alone.items():
            assert torch.equal(together[name][row, -length:], mask[0])
            assert not together[name][row, :-length].any()


def test_a_box_that_is_cropped_away_is_an_error_and_padding_keeps_it():
    image, box = picture(96, 32), [(0, 0, 10, 10)]
    processor = make.llava()
    with pytest.raises(ValueError, match="crops the image"):
        find_token_groups(processor, prepare(processor, ["red?"], [image]), image=image, boxes=box)
    processor = make.llava_padding()
    groups = find_token_groups(processor, prepare(processor, ["red?"], [image]), image=image, boxes=box)
    assert groups["related_patches"].any()


def test_high_norms_are_left_out():
    processor = make.llava()
    model, image = make.local_model(processor), picture(32, 32)
    inputs = prepare(processor, ["red?"], [image])
    plain = find_token_groups(processor, inputs, image=image, boxes=[(8, 8, 16, 16)])
    norms = image_token_norms(model, inputs, plain["image"])
    with torch.no_grad():
        features = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[0][0, 1:]
    torch.testing.assert_close(norms[plain["image"]], features.norm(dim=-1))
    threshold = float(norms[plain["related_patches"]].median())
    groups = find_token_groups(processor, inputs, image=image, boxes=[(8, 8, 16, 16)], norms=norms, max_norm=threshold)
    high = plain["image"] & (norms > threshold)
    assert torch.equal(groups["high_norm_patches"], high)
    for name in ("related_patches", "other_patches"):
        assert torch.equal(groups[name], plain[name] & ~high)
    embedded = image_token_norms(model, inputs, plain["image"], at="decoder")
    with torch.no_grad():
        expected = decoder_embeddings(model, inputs).norm(dim=-1)
    torch.testing.assert_close(embedded, expected * plain["image"])
