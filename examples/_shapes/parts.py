"""The shapes world as the factory wants it: a language model, a vision tower, and conversations in LLaVA's layout."""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaForCausalLM

from .world import PALETTE, SYSTEM, ask, draw_scene, render


SHAPES = Path(__file__).parent.parent / "shapes_llava"
TEMPLATE = (
    "{{ bos_token }} "
    + SYSTEM
    + "{% for message in messages %}"
    + "{% if message['role'] == 'user' %} USER :{% for part in message['content'] %}"
    + " {{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %} ASSISTANT :"
    + "{% else %} {{ message['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)


def write_parts(folder: Path) -> None:
    """The tiny LLaVA's language model and vision tower, in `text` and `tower`; its connector is left out."""
    whole, processor = AutoModelForImageTextToText.from_pretrained(SHAPES), AutoProcessor.from_pretrained(SHAPES)
    text = LlamaForCausalLM(whole.config.text_config)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    text.save_pretrained(folder / "text")
    processor.tokenizer.save_pretrained(folder / "text")
    whole.model.vision_tower.save_pretrained(folder / "tower")
    processor.image_processor.save_pretrained(folder / "tower")
    (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")


def write_questions(
    file: Path, number: int, seed: int, palette: dict[str, tuple[int, int, int]] = PALETTE, turns: int = 1
) -> None:
    """Random questions about random scenes, with the pictures in a folder of the file's name."""
    generator = random.Random(seed)
    folder = file.with_suffix("")
    folder.mkdir(parents=True)
    entries = []
    for index in range(number):
        scene = draw_scene(generator)
        asked = [ask(scene, generator) for _ in range(turns)]
        Image.fromarray(render(scene, generator, palette)).save(folder / f"{index}.png")
        conversation = []
        for turn, question in enumerate(asked):
            conversation.append({"from": "human", "value": ("<image>\n" if turn == 0 else "") + question.text})
            conversation.append({"from": "gpt", "value": question.answer})
        entries.append({"id": str(index), "image": f"{folder.name}/{index}.png", "conversations": conversation})
    file.write_text(json.dumps(entries), encoding="utf-8")
