"""Make the tiny LLaVA: a vision tower that sees shapes, a connector aligned with words, then instruction tuning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    get_cosine_schedule_with_warmup,
)

from .batches import Batches, accuracy
from .processing import IMAGE_TOKENS
from .world import CELL, GRID, OPEN, SIZE, TASKS, Scene, draw_scene


@dataclass
class Recipe:
    """How long and how fast to train; found by trial on two cores."""

    seed: int = 0
    alignment_steps: int = 400
    alignment_images: int = 64
    steps: int = 2400
    images: int = 24
    turns: int = 6
    learning_rate: float = 2e-3
    open_share: float = 0.18  # of the steps, on open questions alone; without them, training stays at chance


def build(processor: LlavaProcessor, seed: int) -> LlavaForConditionalGeneration:
    """The untrained model, 0.33 M parameters."""
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.12,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=CELL,
        projection_dim=64,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)


def align(model: LlavaForConditionalGeneration, batches: Batches, recipe: Recipe, progress: bool) -> float:
    """
    Teach vision tower and connector what a contrastively trained tower and the first stage of LLaVA's recipe give: a
    patch's embedding is the sum of its words' embeddings (shape and colour) and of its place. Returns the last error.
    """
    embeddings = model.get_input_embeddings().weight.detach()
    places = torch.randn(2 * GRID, embeddings.shape[1]) * embeddings.std()
    parts = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    optimiser = torch.optim.AdamW(parts, lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe.alignment_steps)
    error = torch.tensor(0.0)
    for _ in tqdm(range(recipe.alignment_steps), desc="aligning", disable=not progress):
        scenes = [draw_scene(batches.generator) for _ in range(recipe.alignment_images)]
        features = torch.stack(list(model.model.get_image_features(batches.pixels(scenes)).pooler_output))
        error = nn.functional.mse_loss(features, _targets(scenes, embeddings, places, batches.vocabulary))
        error.backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    for parameter in parts:
        parameter.requires_grad_(False)
    return error.item()


def _targets(scenes: list[Scene], embeddings: Tensor, places: Tensor, vocabulary: dict[str, int]) -> Tensor:
    """`[scenes, patches, D]`."""
    rows, columns = places[:GRID], places[GRID:]
    grid = (rows[:, None] + columns[None]).flatten(0, 1)  # [patches, D]
    targets = grid.repeat(len(scenes), 1, 1)
    for index, scene in enumerate(scenes):
        for thing in scene:
            words = embeddings[vocabulary[thing.shape]] + embeddings[vocabulary[thing.color]]
            targets[index, thing.row * GRID + thing.column] += words
    return targets


def instruct(model: LlavaForConditionalGeneration, batches: Batches, recipe: Recipe, progress: bool) -> None:
    """Train the text model on conversations: open questions first, then all."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimiser, recipe.steps // 20, recipe.steps)
    bar = tqdm(range(recipe.steps), desc="instructing", disable=not progress)
    for step in bar:
        tasks = OPEN if step < recipe.open_share * recipe.steps else tuple(TASKS)
        loss = model(**batches.conversations(recipe.images, recipe.turns, tasks)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def pretrain(
    processor: LlavaProcessor, recipe: Recipe, progress: bool = True
) -> tuple[LlavaForConditionalGeneration, dict]:
    """Build and train; returns the model in eval mode and its record: error and accuracy per task."""
    model = build(processor, recipe.seed).train()
    batches = Batches(processor, recipe.seed)
    error = align(model, batches, recipe, progress)
    instruct(model, batches, recipe, progress)
    model = model.eval().requires_grad_(True)
    held_out = Batches(processor, recipe.seed + 1_000_000)
    scores = {task: accuracy(model, held_out, 512, (task,)) for task in TASKS}
    parameters = sum(p.numel() for p in model.parameters())
    return model, {
        "alignment_error": error,
        "accuracy": scores,
        "questions_per_task": 512,
        "parameters": parameters,
    }
