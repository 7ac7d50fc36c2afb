"""One combination: composed, trained for some steps, saved and loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments

from peft_ext.factory import Composed, LlavaFactoryForConditionalGeneration
from peft_ext.factory.compose import assemble
from peft_ext.factory.data import Collator
from peft_ext.factory.parts import prepare
from peft_ext.factory.train import LlavaTrainer

from .parts import CONNECTORS, SIZE, images, text_model, tokenizer, tower


STEPS = 5


def compose(text: str, vision: str, connector: str) -> Composed:
    layer = -1 if vision == "ConvNeXt" else -2
    options = CONNECTORS[connector]
    return assemble(
        text_model(text),
        tokenizer(),
        tower(vision),
        images(),
        connector,
        connector_config=options,
        feature_layer=layer,
    )


def rows() -> list[dict[str, Any]]:
    """Two conversations: one of two turns, and one of text alone."""
    picture = Image.new("RGB", (SIZE, SIZE), (200, 30, 30))
    colours = [
        {"role": "user", "content": "<image> what color is the picture ?"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "blue ?"},
        {"role": "assistant", "content": "Hi"},
    ]
    greeting = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    return [{"messages": colours, "images": [picture]}, {"messages": greeting}]


def check(text: str, vision: str, connector: str, folder: Path) -> str:
    """
    One combination: the class that it became, or why it can't be.

    Raises:
        `AssertionError`: if its loss does not fall, or the loaded model is not the saved one.
    """
    try:
        composed = compose(text, vision, connector)
    except ValueError as error:
        return str(error)
    losses = train(composed, folder)
    assert losses[-1] < losses[0], f"{text}, {vision}, {connector}: losses {losses}"
    batch = Collator(composed.processor)(rows())
    with torch.no_grad():
        expected = composed.model.eval()(**batch).logits
    composed.model.save_pretrained(folder)
    composed.processor.save_pretrained(folder)
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(loaded) is type(composed.model)
    again = Collator(AutoProcessor.from_pretrained(folder))(rows())
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    with torch.no_grad():
        assert torch.equal(loaded(**again).logits, expected), f"{text}, {vision}, {connector}: other logits"
    return "own" if isinstance(loaded, LlavaFactoryForConditionalGeneration) else "llava"


def train(composed: Composed, folder: Path) -> list[float]:
    """Losses of five steps on one batch, everything trained."""
    model = prepare(composed.model, "full", "full", "full")
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    data: Any = rows()
    trainer = LlavaTrainer(model, arguments, Collator(composed.processor), data)
    trainer.pop_callback(transformers.PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
