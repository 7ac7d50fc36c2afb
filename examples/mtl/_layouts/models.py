"""Encoders of whole images, and heads for the tasks of a data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from _benches.scenes import Decoder, Encoder
from torch import Tensor, nn


class VisionEncoder(nn.Module):
    """A transformers vision model, down to one vector per image."""

    mean: Tensor
    std: Tensor

    def __init__(self, folder: str) -> None:
        super().__init__()
        from transformers import AutoModel

        self.model = AutoModel.from_pretrained(folder)
        self.width = self.model.config.hidden_size
        self.size = self.model.config.image_size
        processor = Path(folder) / "preprocessor_config.json"
        settings = json.loads(processor.read_text()) if processor.exists() else {}
        for name in ("mean", "std"):
            values = settings.get(f"image_{name}", [0.5, 0.5, 0.5])
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=(pixel_values - self.mean) / self.std).last_hidden_state.mean(1)


class Pooled(nn.Module):
    """The coarsest features of the convolutional encoder, averaged over the image."""

    width = 64
    size = 64

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.encoder(pixel_values)[-1].mean((2, 3))


def make_heads(data: Any, width: int) -> dict[str, nn.Module]:
    """A decoder or a linear layer per task."""
    if "segmentation" in data.tasks:
        channels = {"segmentation": data.classes, "depth": 1, "normal": 3}
        return {task: Decoder(channels[task]) for task in data.tasks}
    classes = getattr(data, "classes", [1] * len(data.tasks))
    return {task: nn.Linear(width, count) for task, count in zip(data.tasks, classes, strict=True)}
