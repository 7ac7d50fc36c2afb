"""
The invented world's stand-in for UNITER's pretraining: an encoder that has learned which texts mean the same.

UNITER comes pretrained to match texts with images and words with regions. From random weights the classifier learns
nothing in hundreds of steps; after 200 steps of this it does. Only ideas of the training split are used.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from transformers import VisualBertConfig

from ..model.encoders import VisualBertWithRegions
from ..model.processing import CKProcessor
from ..runs.experiment import Task
from ..runs.training import Recipe
from .drawing import FEATURE_SIZE, World, make_tokenizer


# How the world's small models are trained.
WORLD_SEARCH = Recipe(steps=60, batch_size=64, learning_rate=5e-4)
WORLD_RECIPE = Recipe(steps=400, batch_size=8, learning_rate=2e-3)

TEXTS, TEMPERATURE, LEARNING_RATE = 64, 0.2, 4e-3


def small_encoder(vocabulary: int, pad: int) -> VisualBertWithRegions:
    """Two layers of width 64."""
    config = VisualBertConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=pad,
        initializer_range=0.1,  # at 0.02, all texts look alike to so small a model
    ).to_dict()
    VisualBertWithRegions.set_feature_size(config, FEATURE_SIZE)
    return VisualBertWithRegions(VisualBertConfig(**config))


def pretrain(encoder: VisualBertWithRegions, world: World, processor: CKProcessor, steps: int, seed: int) -> None:
    """At [CLS] and at every region, bring an expression's and its fact's output together, and other pairs apart."""
    chance = random.Random(seed)
    samples = world.samples("train", 64)
    optimizer = torch.optim.AdamW(encoder.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        ideas = chance.sample(world.train_ideas, TEXTS)
        texts = [world.expression(idea) for idea in ideas]
        texts += [world.fact(chance.choice(world.names["train"]), idea) for idea in ideas]
        ids, mask = processor.texts(texts)
        # One image for all texts, or the images would give the pairs away.
        regions = processor.regions([chance.choice(samples)], world.features).values()
        cls, at_regions = encoder.encode(ids, mask, *(part.expand(len(texts), *part.shape[1:]) for part in regions))
        hidden = F.normalize(torch.cat([cls[:, None], at_regions], dim=1), dim=-1).transpose(0, 1)
        expressions, facts = hidden.chunk(2, dim=1)  # [1 + regions, TEXTS, hidden]
        cosines = (expressions @ facts.mT / TEMPERATURE).flatten(0, 1)
        loss = F.cross_entropy(cosines, torch.arange(TEXTS).repeat(len(hidden)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def world_task(seed: int, train: int, test: int, pretraining_steps: int = 200, wording: str = "plain") -> Task:
    """The world of this seed as a task, with a pretrained small encoder."""
    torch.manual_seed(seed)
    world, tokenizer = World(seed, wording=wording), make_tokenizer()
    encoder = small_encoder(len(tokenizer), tokenizer.pad_token_id)
    pretrain(encoder, world, CKProcessor(tokenizer), pretraining_steps, seed)

    def make_encoder() -> VisualBertWithRegions:
        copy = VisualBertWithRegions(encoder.config)
        copy.load_state_dict(encoder.state_dict())
        return copy

    samples = world.samples("train", train), world.samples("test", test)
    return Task(*samples, world.facts, world.features, tokenizer, make_encoder, FEATURE_SIZE)
