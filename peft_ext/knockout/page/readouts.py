"""Read-outs of a page: attention of the deciding token, and the words after each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..model.architecture import inspect_model
from ..prompts.image_tokens import image_token_ids
from ..prompts.samples import Prompt
from ..read.lens import residual_stream
from ..read.modality import attention_rows, check_step, modality_attention, modality_groups


@dataclass
class Lens:
    """The logit lens of one sample. Entry 0 is before the first layer, entry l + 1 after layer l."""

    answer: str  # the token whose probability is read
    probability: list[float]  # its probability, `[layers + 1]`
    words: list[list[tuple[str, float]]]  # the most probable tokens and their probabilities, best first


@torch.no_grad()
def top_words(model: nn.Module, tokenizer: Any, prompt: Prompt, norm: bool, top: int) -> Lens:
    """The lens at the position that decides the answer's token."""
    architecture = inspect_model(model)
    states = residual_stream(model, prompt.inputs, prompt.readout)[:, 0]  # [layers + 1, D]
    last = architecture.logits(states[-1:]).argmax(-1) if prompt.answer is None else prompt.answer
    answer = int(last[0])
    probabilities = torch.cat([architecture.logits(state[None], norm=norm).softmax(-1) for state in states]).cpu()
    best = probabilities.topk(min(top, probabilities.shape[1]))
    words = [
        [(tokenizer.decode([number]), value) for number, value in zip(numbers, values, strict=True)]
        for numbers, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return Lens(tokenizer.decode([answer]), probabilities[:, answer].tolist(), words)


@torch.no_grad()
def last_attention(model: Any, prompt: Prompt, image: bool) -> tuple[np.ndarray, list[float]]:
    """Attention of the deciding token, float32 `[layers, tokens]`, mean over heads; and LMAR by layer."""
    engine = "step"
    ids = image_token_ids(model.config) if image else ()
    try:
        check_step(model)
        if int(prompt.inputs["input_ids"][0, -1]) in ids:
            engine = "full"
    except ValueError:
        engine = "full"
    rows = next(iter(attention_rows(model, prompt.inputs, 1, engine)))
    length = prompt.inputs["input_ids"].shape[1]
    found = np.zeros((len(rows), length), dtype=np.float32)
    for layer, row in enumerate(rows):  # [1, heads, keys]; the last ones only in sliding windows
        own = row[0].float().mean(0)[-length:]
        found[layer, length - len(own) :] = own.cpu().numpy()
    if not image:
        return found, []
    on_image, on_text, _ = modality_attention(rows, *modality_groups(prompt.inputs, ids, "exclude"), "mean", False)
    return found, (on_image.mean(-1) / on_text.mean(-1))[0].tolist()
