"""scikit-learn's handwritten digits, split into a task to pretrain on and a task to adapt to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import Dataset


CLASSES = 5  # per task: digits 0-4 to pretrain on, 5-9 to adapt to
SPLIT_SEED = 0  # every method and every seed sees the same split


class Images(Dataset[dict[str, torch.Tensor]]):
    """
    Images and labels in memory, served in the form that `transformers` models and `Trainer` take.

    Args:
        pixel_values (`torch.Tensor`): Images, `[count, 1, 8, 8]`.
        labels (`torch.Tensor`): Classes counted from 0, `[count]`.
        shift (`int`, *optional*, defaults to 0):
            Every second image served, at random, is moved by up to this many pixels each way.
    """

    def __init__(self, pixel_values: torch.Tensor, labels: torch.Tensor, shift: int = 0):
        self.pixel_values = pixel_values
        self.labels = labels
        self.shift = shift

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = self.pixel_values[index]  # [1, 8, 8]
        if self.shift and torch.rand(()) < 0.5:
            # rolled, not padded: the digits fill the 8 rows, and a lost row costs more than a stray one
            offsets = torch.randint(-self.shift, self.shift + 1, (2,)).tolist()
            image = image.roll(offsets, dims=(1, 2))
        return {"pixel_values": image, "labels": self.labels[index]}

    def batch(self, count: int) -> dict[str, torch.Tensor]:
        """The first `count` images as one batch."""
        return {"pixel_values": self.pixel_values[:count], "labels": self.labels[:count]}


@dataclass(frozen=True)
class Digits:
    """The two tasks. `test` is for the final models only; everything that is chosen is chosen on `validation`."""

    pretrain: Images
    pretrain_test: Images
    train: Images
    validation: Images
    test: Images

    def sizes(self) -> dict[str, int]:
        return {name: len(part) for name, part in vars(self).items()}


def _split(images: Images, share: float) -> tuple[Images, Images]:
    """Two disjoint parts with the same class frequencies; the second holds `share` of the images."""
    first, second = train_test_split(
        range(len(images)), test_size=share, stratify=images.labels.numpy(), random_state=SPLIT_SEED
    )
    return tuple(Images(images.pixel_values[part], images.labels[part]) for part in (first, second))  # type: ignore[return-value]


def load() -> Digits:
    """Load the 1797 digits: 0-4 in 3:1 for pretraining, 5-9 in 2:1:2 for training, validation and test."""
    raw = load_digits()
    pixel_values = torch.as_tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # 0..16 -> -1..1
    labels = torch.as_tensor(raw.target)
    low = labels < CLASSES
    pretrain, pretrain_test = _split(Images(pixel_values[low], labels[low]), 0.25)
    pretrain.shift = 1
    rest, test = _split(Images(pixel_values[~low], labels[~low] - CLASSES), 0.4)
    train, validation = _split(rest, 1 / 3)
    return Digits(pretrain, pretrain_test, train, validation, test)
