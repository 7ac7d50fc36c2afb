"""The model that every method starts from: a small ViT that knows digits 0-4."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from .data import CLASSES, Digits
from .training import Recipe, evaluate, train


LEARNING_RATE = 1e-3


def build(hidden: int, layers: int, seed: int) -> ViTForImageClassification:
    """A ViT for 8x8 grey images in 2x2 patches: 16 patch tokens and the class token."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config)


def pretrain(
    model: PreTrainedModel, digits: Digits, recipe: Recipe, seed: int, on_step: Callable[[], object]
) -> float:
    """Train `model` on digits 0-4 and return its accuracy on the held-out ones."""
    train(model, digits.pretrain, recipe, LEARNING_RATE, seed, on_step)
    return evaluate(model, digits.pretrain_test)[0]


def fresh_task(base: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A copy of `base` with an untrained classifier: the state in which a user starts on a new task."""
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    model.classifier.reset_parameters()
    return model
