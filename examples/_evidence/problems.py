"""What is learned: a pretrained encoder with a new head, and a data set in three fixed parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from pretrained import data, encoders
from pretrained.data import Labelled
from pretrained.encoders import Encoder
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from . import stand_ins


SPLIT_SEED = 0
MAX_TOKENS = 32  # longer sentences are left out: nothing is truncated, and a step stays short
POOL = 1000  # samples kept for training; training sets of n are the first n of them
VALIDATION, TEST = 300, 600
SCALING_SAMPLES = 64


class Pooling(nn.Module):
    """One vector per sample: the mean over its positions, or its first or last one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind not in ("mean", "first", "last"):
            raise ValueError(f"pooling={kind!r} must be 'mean', 'first' or 'last'")
        self.kind = kind

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """`hidden` is `[batch, positions, width]`, `mask` `[batch, positions]` with ones first."""
        if mask is None:
            mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        if self.kind == "mean":
            weights = mask[..., None].to(hidden.dtype)
            return (hidden * weights).sum(1) / weights.sum(1)  # [batch, width]
        place = mask.sum(1) - 1 if self.kind == "last" else torch.zeros_like(mask[:, 0])
        return hidden[torch.arange(len(hidden), device=hidden.device), place]


class Classifier(nn.Module):
    """
    An encoder, pooling and one linear layer, on features scaled so that those of the pretrained encoder are 1 on
    average (root mean square): a head then learns as fast on one encoder as on another.

    Dropout is off: with sixty steps it is noise in the comparison, and without it the frozen features of a probe can
    be computed once.
    """

    scale: Tensor

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder.model
        self.pooling = Pooling(encoder.pooling)
        self.head = nn.Linear(encoder.width, classes)
        self.register_buffer("scale", torch.ones(()))
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def features(self, attention_mask: Tensor | None = None, **inputs: Tensor) -> Tensor:
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        return self.scale * self.pooling(self.encoder(**inputs).last_hidden_state, attention_mask)  # [batch, width]

    @torch.no_grad()
    def reset_head(self, seed: int) -> None:
        """Small random weights, no bias: logits begin near 0."""
        drawn = torch.randn(self.head.weight.shape, generator=torch.Generator().manual_seed(seed))
        self.head.weight.copy_(0.004 * drawn)
        self.head.bias.zero_()
        self.head.float()  # also on an encoder of 16 bits

    @torch.no_grad()
    def set_scale(self, samples: dict[str, Tensor]) -> None:
        """Scale by what the encoder makes of these samples."""
        inputs = {name: value.to(self.scale.device) for name, value in samples.items() if name != "labels"}
        self.scale.fill_(1.0)
        self.scale.copy_(self.features(**inputs).square().mean().rsqrt())

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> SequenceClassifierOutput:
        logits = self.head(self.features(**inputs).to(self.head.weight.dtype))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


@dataclass(frozen=True)
class Part:
    """
    Some samples.

    Attributes:
        inputs: token ids per sentence, or images `[count, channels, height, width]`.
        labels: `[count]`.
        lengths: tokens per sentence, 0 for images; batches are made of neighbours in length.
        padding: token id.
    """

    inputs: list[list[int]] | Tensor
    labels: Tensor
    lengths: list[int]
    padding: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Part:
        return Part(self.inputs[:count], self.labels[:count], self.lengths[:count], self.padding)

    def chosen(self, indices: Sequence[int]) -> Part:
        rows = torch.tensor(indices)
        inputs: Any = self.inputs
        inputs = inputs[rows] if isinstance(inputs, Tensor) else [inputs[index] for index in indices]
        return Part(inputs, self.labels[rows], [self.lengths[index] for index in indices], self.padding)

    def by_length(self) -> list[int]:
        """Indices of all samples, the shortest first."""
        return sorted(range(len(self)), key=self.lengths.__getitem__)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The model's arguments; sentences are padded to the longest of the batch."""
        rows = torch.tensor(indices)
        if isinstance(self.inputs, Tensor):
            return {"pixel_values": self.inputs[rows], "labels": self.labels[rows]}
        sentences = [self.inputs[index] for index in indices]
        lengths = torch.tensor([len(sentence) for sentence in sentences])
        ids = torch.full((len(sentences), int(lengths.max())), self.padding)
        for row, sentence in zip(ids, sentences, strict=True):
            row[: len(sentence)] = torch.tensor(sentence)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": self.labels[rows]}

    def epoch(self, batch_size: int, generator: torch.Generator) -> list[list[int]]:
        """All samples once, in random batches of sentences of similar length."""
        order = torch.randperm(len(self), generator=generator).tolist()
        chunk = 8 * batch_size
        batches = []
        for start in range(0, len(order), chunk):
            near = sorted(order[start : start + chunk], key=self.lengths.__getitem__)
            batches += [near[place : place + batch_size] for place in range(0, len(near), batch_size)]
        return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]


@dataclass(frozen=True)
class Problem:
    """A pretrained model and a data set. The test part is for the final runs alone."""

    base: Classifier
    train: Part
    validation: Part
    test: Part
    width: int


def encoded(samples: Labelled, encoder: Encoder, image_size: int | None) -> Part:
    """Samples as the encoder takes them; sentences of more than `MAX_TOKENS` are left out."""
    if encoder.is_text:
        ids = encoder.tokenizer(samples.inputs)["input_ids"]
        kept = [index for index, sentence in enumerate(ids) if 0 < len(sentence) <= MAX_TOKENS]
        whole = Part(ids, samples.labels, [len(sentence) for sentence in ids], encoder.tokenizer.pad_token_id)
        return whole.chosen(kept)
    images: Any = samples.inputs.float() / 255  # type: ignore[union-attr]
    if image_size:
        images = nn.functional.interpolate(images, (image_size, image_size), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (encoder.mean, encoder.std))
    return Part((images.expand(-1, 3, -1, -1) - mean) / std, samples.labels, [0] * len(images))


@lru_cache(maxsize=4)
def load(
    model: str, source: str, image_size: int | None = None, pooling: str | None = None, dtype: str = "float32"
) -> Problem:
    """
    Args:
        model (`str`): see `pretrained.encoders.load`.
        source (`str`): see `pretrained.data.load`.
        image_size (`int`, *optional*): height and width that images are scaled to.
        pooling (`str`, *optional*), dtype (`str`, *optional*, defaults to `"float32"`): of a model that is not ours.
    """
    is_made = model in stand_ins.ENCODERS
    encoder = stand_ins.encoder(model) if is_made else encoders.load(model, pooling, getattr(torch, dtype))
    samples = stand_ins.data(source) if source.startswith(stand_ins.PREFIX) else data.load(source)
    part = encoded(samples, encoder, image_size)
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    held_out = VALIDATION + TEST
    pool = min(POOL, len(part) - held_out)
    if pool < 1:
        raise ValueError(f"{source} has {len(part)} usable samples; {held_out} are held out for validation and test")
    bounds = [0, pool, pool + VALIDATION, pool + held_out]
    train, validation, test = (part.chosen(order[a:b]) for a, b in pairwise(bounds))
    base = Classifier(encoder, samples.classes).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    base.reset_head(0)
    base.set_scale(train.batch(range(min(SCALING_SAMPLES, len(train)))))
    return Problem(base, train, validation, test, encoder.width)
