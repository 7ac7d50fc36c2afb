"""One training run of an image classifier with `transformers.Trainer`, and the evaluation that goes with it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from .data import Images


EVALUATION_BATCH = 512
WARMUP_SHARE = 0.1


@dataclass(frozen=True)
class Recipe:
    """What all runs of a comparison share; only the learning rate and the seed differ between runs."""

    epochs: int
    batch_size: int

    def steps(self, images: Images) -> int:
        return self.epochs * -(-len(images) // self.batch_size)


class OnStep(TrainerCallback):
    """Calls a function after each optimiser step: many short runs share one progress bar that way."""

    def __init__(self, function: Callable[[], object]):
        self.function = function

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.function()


def train(
    model: nn.Module,
    images: Images,
    recipe: Recipe,
    learning_rate: float,
    seed: int,
    on_step: Callable[[], object] = lambda: None,
) -> None:
    """Train what requires gradients in `model`: AdamW without weight decay, cosine schedule with warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=recipe.epochs,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=round(WARMUP_SHARE * recipe.steps(images)),
            weight_decay=0.0,
            seed=seed,
            use_cpu=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            label_names=["labels"],
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=images, callbacks=[OnStep(on_step)])
        trainer.remove_callback(PrinterCallback)  # would print one dict per run into the table
        trainer.train()


@torch.no_grad()
def predict(model: nn.Module, images: Images) -> torch.Tensor:
    """Logits of all `images`, in evaluation mode."""
    model.eval()
    parts = images.pixel_values.split(EVALUATION_BATCH)
    return torch.cat([model(pixel_values=part).logits for part in parts])  # [count, classes]


def evaluate(model: nn.Module, images: Images) -> tuple[float, float]:
    """Accuracy and mean cross-entropy."""
    logits = predict(model, images)
    accuracy = (logits.argmax(-1) == images.labels).double().mean().item()
    return accuracy, nn.functional.cross_entropy(logits, images.labels).item()
