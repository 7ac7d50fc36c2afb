"""Training of both models with transformers' Trainer, and predictions."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from ..data.samples import Features, Sample
from ..knowledge.facts import FactBase
from ..model.processing import CandidateFacts, CKProcessor


@dataclass(frozen=True)
class Recipe:
    """AdamW with the thesis's learning rate and sizes (appendix A.5); it does not name a schedule."""

    steps: int = 10_000
    batch_size: int = 64
    learning_rate: float = 6e-5
    warmup: float = 0.1
    seed: int = 0


def fit(
    model: Any,
    data: Sequence[Any],
    collate: Callable[[list[Any]], Any],
    recipe: Recipe,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Train what requires gradients, with AdamW unless there is an optimizer."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=round(recipe.warmup * recipe.steps),
            weight_decay=0.01,
            seed=recipe.seed,
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=False,
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=recipe.steps < 1000,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
        )
        optimizers = (optimizer, None)  # the schedule is the Trainer's
        trainer = Trainer(
            model=model, args=arguments, train_dataset=data, data_collator=collate, optimizers=optimizers
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()


class SearchCollator:
    """Pairs of expression and fact: the true one, or for half of the samples a random one (section 3.3.1)."""

    def __init__(self, processor: CKProcessor, features: Features, base: FactBase, seed: int) -> None:
        self.processor, self.features = processor, features
        self.facts = list(dict.fromkeys(fact for own in base.facts.values() for fact in own))
        self.random = random.Random(seed)

    def __call__(self, samples: list[Sample]) -> dict[str, Any]:
        facts, labels = [], []
        for sample in samples:
            fact = sample.fact
            if self.random.random() < 0.5:
                fact = self.random.choice(self.facts)
            facts.append(fact)
            labels.append(float(fact == sample.fact))
        ids, mask = self.processor.texts([sample.expression for sample in samples])
        fact_ids, fact_mask = self.processor.texts(facts)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "fact_input_ids": fact_ids,
            "fact_attention_mask": fact_mask,
            **self.processor.regions(samples, self.features),
            "labels": torch.tensor(labels),
        }


class ClassifierCollator:
    """Samples with their candidates' facts, as `[(sample, facts), …]`."""

    def __init__(self, processor: CKProcessor, features: Features) -> None:
        self.processor, self.features = processor, features

    def __call__(self, items: Sequence[tuple[Sample, CandidateFacts]]) -> dict[str, Any]:
        samples, facts = zip(*items, strict=True)
        return dict(self.processor(samples, self.features, facts))


@torch.no_grad()
def predict(model: Any, items: Sequence[Any], collate: ClassifierCollator, batch_size: int = 32) -> list[int]:
    """The candidate with the highest score, for each item."""
    model.eval()
    chosen: list[int] = []
    for start in range(0, len(items), batch_size):
        batch = {name: value.to(model.device) for name, value in collate(items[start : start + batch_size]).items()}
        chosen += model(**batch).logits.argmax(-1).tolist()
    return chosen
