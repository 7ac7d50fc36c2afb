"""Two overlaid digits, each to be read: T = 2, as MultiMNIST. The digits are those that scikit-learn ships."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Bench, EncoderWithHeads, Table, accuracies, classification_losses


SIDE = 12
SIZES = (1500, 500, 1000)


def _images() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32).view(-1, 8, 8) / 16, torch.tensor(labels)


def make_data(seed: int) -> tuple[Table, Table, Table]:
    """Pairs of digits; the three sets share no digit image."""
    pixels, labels = _images()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pools = (order[:900], order[900:1200], order[1200:])
    tables = []
    for part, (pool, size) in enumerate(zip(pools, SIZES, strict=True)):
        generator = torch.Generator().manual_seed(1000 * seed + part)
        first, second = pool[torch.randint(len(pool), (2, size), generator=generator)]
        canvas = torch.zeros(size, SIDE, SIDE)
        canvas[:, :8, :8] = pixels[first]
        canvas[:, SIDE - 8 :, SIDE - 8 :] = torch.maximum(canvas[:, SIDE - 8 :, SIDE - 8 :], pixels[second])
        tables.append(
            Table({"pixel_values": canvas[:, None], "labels_upper": labels[first], "labels_lower": labels[second]})
        )
    return tables[0], tables[1], tables[2]


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    encoder = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (SIDE // 2) ** 2, 64),
        nn.ReLU(),
    )
    return EncoderWithHeads(encoder, {task: nn.Linear(64, 10) for task in ("upper", "lower")})


DIGITS = Bench(
    name="digits",
    tasks=["upper", "lower"],
    make_data=make_data,
    make_model=make_model,
    losses=classification_losses,
    evaluate=accuracies,
    higher_is_better={"top1": True},
    epochs=30,
    batch_size=64,
)
