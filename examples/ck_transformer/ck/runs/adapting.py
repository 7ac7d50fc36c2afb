"""Adapters on a trained CK-Transformer: to other worlds, through files, and back."""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import set_seed

from peft_ext import GPSConfig, NeuroAdaConfig, gradient_scores

from ..knowledge.retrieval import EncoderEmbedder, top_facts
from ..model.classifier import CKTransformer
from ..model.processing import CKProcessor
from ..world.drawing import World
from .comparison import accuracy, correct
from .training import ClassifierCollator, Recipe, fit, predict


HEAD = ["integrator", "scorer"]
TARGETS = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"  # the linear layers of VisualBERT's encoder
HEAD_RATE = 1e-3  # of integrator and scorer, for every method
RATES = {"neuroada": 9e-2, "gps": 9e-2, "lora": 9e-3, "full": 3e-3}  # of the rest: the middle of three


@dataclass(frozen=True)
class Target:
    """A world to adapt to: samples with their facts, and how to make batches of them."""

    train: list[Any]
    test: list[Any]
    collate: ClassifierCollator


def target(seed: int, search: EncoderEmbedder, processor: CKProcessor, train: int, test: int) -> Target:
    """A world whose facts are worded in another way, with `train` and `test` samples."""
    world = World(seed, wording="other")
    embed = EncoderEmbedder(search.model, search.processor, world.features)
    items = []
    for split, count in (("train", train), ("test", test)):
        samples = world.samples(split, count)
        found = top_facts(embed, samples, world.facts, processor.num_facts)
        items.append(list(zip(samples, found, strict=True)))
    return Target(*items, ClassifierCollator(processor, world.features))


def adapted(name: str, model: CKTransformer, own: Target) -> Any:
    """The model to train. GPS ranks entries by the gradient of the model's own loss on the new world."""
    shared = {"target_modules": TARGETS, "modules_to_save": HEAD}
    if name == "neuroada":
        return get_peft_model(model, NeuroAdaConfig(k=1, **shared))
    if name == "gps":
        batches = [own.collate(own.train[start : start + 16]) for start in range(0, len(own.train), 16)]
        config = GPSConfig(k=1, **shared)
        return get_peft_model(model, config.with_scores(gradient_scores(model, batches, "model", progress=False)))
    if name == "lora":
        return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, **shared))
    return model


def parts(model: Any) -> tuple[list[Any], list[Any]]:
    """The trained parameters of integrator and scorer, and the others."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for name, p in named if any(part in name for part in HEAD)]
    return head, [p for name, p in named if not any(part in name for part in HEAD)]


def optimizer_of(model: Any, rate: float) -> torch.optim.AdamW:
    head, rest = parts(model)
    return torch.optim.AdamW([{"params": head, "lr": HEAD_RATE}, {"params": rest, "lr": rate}])


def score(model: Any, own: Target) -> float:
    predicted = predict(model, own.test, own.collate)
    return accuracy(correct([sample for sample, _ in own.test], predicted))


@torch.no_grad()
def check_files(model: Any, base: CKTransformer, own: Target) -> int:
    """Save, load and merge, compare the scores, and return the size of the weights' file."""
    batch = own.collate(own.test[:8])
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if isinstance(model, PeftModel):
            loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder).merge_and_unload()
        else:
            loaded = type(model).from_pretrained(folder)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    torch.testing.assert_close(loaded.eval()(**batch).logits, model(**batch).logits, atol=1e-4, rtol=1e-4)
    return size


def row(name: str, base: CKTransformer, targets: Sequence[Target], recipe: Recipe, trials: int) -> dict[str, Any]:
    """One method: the learning rate chosen on the first target, accuracies on the others."""

    def trained(own: Target, rate: float) -> Any:
        set_seed(recipe.seed)
        model = adapted(name, copy.deepcopy(base), own)
        fit(model, own.train, own.collate, recipe, optimizer_of(model, rate))
        return model

    rates = [RATES[name] * 3.0 ** (number - trials // 2) for number in range(trials)]
    rate = max(rates, key=lambda value: score(trained(targets[0], value), targets[0])) if trials > 1 else rates[0]
    models = [(trained(own, rate), own) for own in targets[1:]]
    scores = [score(model, own) for model, own in models]
    head, rest = (sum(p.numel() for p in part) for part in parts(models[0][0]))
    return {
        "method": name,
        "learning_rate": rate,
        "encoder_parameters": rest,
        "head_parameters": head,
        "mean": statistics.fmean(scores),
        "deviation": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        "file_bytes": check_files(*models[0][:1], base, models[0][1]),
    }
