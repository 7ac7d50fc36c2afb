"""The shapes world: answers follow from scenes, batches equal the processor's, the model is what its record says."""

import json
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from _shapes.batches import Batches, accuracy, positions
from _shapes.processing import make_processor
from _shapes.world import CELL, COLORS, GRID, PALETTE, SHAPES, SIZE, TASKS, WORDS, ask, draw_scene, prompt, render
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tests.examples.conftest import EXAMPLES


CHECKPOINT = EXAMPLES / "shapes_llava"


def scenes(number=200):
    generator = random.Random(0)
    return [(draw_scene(generator), generator) for _ in range(number)]


def test_a_scene_has_three_different_things_in_different_cells():
    for scene, _ in scenes():
        assert (
            len({t.shape for t in scene})
            == len({t.color for t in scene})
            == len({(t.row, t.column) for t in scene})
            == 3
        )
        assert all(
            t.shape in SHAPES and t.color in COLORS and 0 <= t.row < GRID and 0 <= t.column < GRID for t in scene
        )


@pytest.mark.parametrize("task", TASKS)
def test_answers_follow_from_the_scene(task):
    for scene, generator in scenes():
        question = TASKS[task](scene, generator)
        if question is None:
            continue
        words = question.text.split()
        by_shape, by_color = {t.shape: t for t in scene}, {t.color: t for t in scene}
        named = [by_shape[w] for w in words if w in by_shape]
        if task in ("QueryColor", "ChooseAttr"):
            assert question.answer == named[0].color.capitalize()
        elif task in ("QueryShape", "ChooseCat"):
            colors = [w for w in words if w in COLORS]
            assert question.answer == by_color[colors[0]].shape.capitalize()
        elif task == "QueryAttr":
            assert question.answer == ("Left" if named[0].column < GRID / 2 else "Right")
        elif task == "ChooseRel":
            assert question.answer == ("Left" if named[0].column < named[1].column else "Right")
        else:
            pairs = {(a, b) for a, b in pairwise(words) if a in COLORS and b in SHAPES}
            present = {(t.color, t.shape) for t in scene}
            assert question.answer == ("Yes" if pairs & present else "No")
        if question.options:
            assert question.options[0].capitalize() == question.answer


def test_pictures_show_the_things():
    for scene, generator in scenes(20):
        picture = render(scene, generator).astype(float)
        for thing in scene:
            top, left = thing.row * CELL, thing.column * CELL
            center = picture[top + 3 : top + 5, left + 3 : left + 5].mean((0, 1))
            nearest = min(PALETTE, key=lambda color: np.abs(center - np.array(PALETTE[color])).sum())
            assert nearest == thing.color
        assert picture.shape == (SIZE, SIZE, 3)


def test_every_word_of_every_question_is_known():
    for scene, generator in scenes():
        question = ask(scene, generator)
        assert {*question.text.split(), question.answer} <= {*WORDS}


def test_batches_equal_the_processors_output():
    processor = make_processor()
    generator = random.Random(3)
    scene = draw_scene(generator)
    question = ask(scene, generator)
    picture = render(scene, random.Random(5))
    batches = Batches(processor, 0)
    batches.generator = random.Random(5)
    expected = processor(images=[Image.fromarray(picture)], text=[prompt(question.text)], return_tensors="pt")
    assert batches.encode(f"<s> {prompt(question.text)}") == expected["input_ids"][0].tolist()
    torch.testing.assert_close(batches.pixels([scene]), expected["pixel_values"], atol=1e-6, rtol=1e-5)


def test_labels_are_answers_and_ends_of_turns():
    processor = make_processor()
    batch = Batches(processor, 0).conversations(4, 3)
    words = processor.tokenizer.convert_ids_to_tokens
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        kept = (labels != -100).nonzero().flatten()
        assert torch.equal(ids[kept], labels[kept])
        assert len(kept) == 6
        assert [words(ids[i - 1].item()) for i in kept[::2]] == [":"] * 3 and set(words(ids[kept[1::2]])) == {"</s>"}


def test_positions_do_not_count_padding():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert positions(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def test_the_shipped_model_has_the_accuracy_that_is_written_beside_it():
    record = json.loads((CHECKPOINT / "training.json").read_text())
    model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT).eval()
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    batches = Batches(processor, 123)
    for task, written in record["accuracy"].items():
        number = 256
        margin = 4 * (written * (1 - written) / number) ** 0.5 + 0.02
        assert accuracy(model, batches, number, (task,)) >= written - margin, task


def test_the_shipped_model_is_small():
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 1.5e6


def test_the_shipped_model_answers_through_its_processor():
    model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT).eval()
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    generator = random.Random(1)
    right = 0
    for _ in range(20):
        scene = draw_scene(generator)
        question = ask(scene, generator, ("QueryColor",))
        inputs = processor(
            images=[Image.fromarray(render(scene, generator))], text=[prompt(question.text)], return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        said = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += said.strip() == question.answer
    assert right >= 16
