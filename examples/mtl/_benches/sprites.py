"""One shape per image and five questions about it: T = 5 with 1000 images, as VTAB has, and a pretrained encoder."""

from __future__ import annotations

import copy
import functools
import math

import torch
from torch import Tensor, nn

from .base import Bench, EncoderWithHeads, Table, accuracies, classification_losses


SIDE = 32
CLASSES = {"shape": 4, "scale": 6, "orientation": 8, "x": 8, "y": 8}
SIZES = (1000, 500, 1000)
PRETRAINING = {"images": 3000, "epochs": 12, "batch_size": 64, "learning_rate": 1e-3}


def _distance(shape: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Signed distance (about) from the outline of a shape of size one, `[images, SIDE, SIDE]`."""
    circle = (u**2 + 1.7 * v**2).sqrt() - 0.9  # squeezed and shifted: every orientation looks different
    square = torch.maximum(u.abs() - 0.9, v.abs() - 0.5) + 0.0 * u
    triangle = torch.maximum(-v - 0.5, 0.87 * u.abs() + 0.5 * v - 0.5)
    cross = torch.minimum(
        torch.maximum(u.abs() - 0.95, (v - 0.2).abs() - 0.22), torch.maximum(u.abs() - 0.22, v.abs() - 0.95)
    )
    notch = torch.maximum(u - 0.3, v - 0.1)  # breaks the symmetry under half a turn
    shapes = torch.stack([circle, square, triangle, cross], dim=1)
    chosen = shapes.gather(1, shape[:, None, None, None].expand(-1, 1, SIDE, SIDE))[:, 0]
    return torch.where((u > 0) & (v > 0), torch.maximum(chosen, notch), chosen)


def render(labels: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """Anti-aliased grey images with noise, `[images, 1, SIDE, SIDE]`."""
    count = len(labels["shape"])
    axis = (torch.arange(SIDE) + 0.5) / SIDE
    column = {name: label.float()[:, None, None] for name, label in labels.items()}
    size = 0.12 + 0.03 * column["scale"]
    angle = column["orientation"] * (2 * math.pi / CLASSES["orientation"])
    dx = axis[None, None, :] - (0.25 + 0.5 * column["x"] / 7)
    dy = axis[None, :, None] - (0.25 + 0.5 * column["y"] / 7)
    u = (angle.cos() * dx + angle.sin() * dy) / size
    v = (-angle.sin() * dx + angle.cos() * dy) / size
    inside = torch.sigmoid(-_distance(labels["shape"], u, v) * size * SIDE * 2)
    noise = 0.15 * torch.randn(count, SIDE, SIDE, generator=generator)
    return (inside * (0.6 + 0.4 * torch.rand(count, 1, 1, generator=generator)) + noise)[:, None]


def draw(count: int, seed: int) -> Table:
    generator = torch.Generator().manual_seed(seed)
    labels = {task: torch.randint(classes, (count,), generator=generator) for task, classes in CLASSES.items()}
    return Table({"pixel_values": render(labels, generator), **{f"labels_{t}": label for t, label in labels.items()}})


def make_data(seed: int) -> tuple[Table, Table, Table]:
    first, second, third = (draw(size, 100_000 * part + seed) for part, size in enumerate(SIZES, start=1))
    return first, second, third


def _encoder() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 128), nn.ReLU())


@functools.cache
def pretrained_encoder(seed: int) -> nn.Module:
    """An encoder trained to tell shape and scale together (24 classes) of other images."""
    data = draw(int(PRETRAINING["images"]), 900_000 + seed)
    labels = data.columns["labels_shape"] * CLASSES["scale"] + data.columns["labels_scale"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(_encoder(), nn.Linear(128, 24))
        optimizer = torch.optim.Adam(model.parameters(), lr=PRETRAINING["learning_rate"])
        for _ in range(int(PRETRAINING["epochs"])):
            for rows in torch.randperm(len(data)).split(int(PRETRAINING["batch_size"])):
                loss = nn.functional.cross_entropy(model(data.columns["pixel_values"][rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model[0]


def make_model(seed: int) -> nn.Module:
    encoder = copy.deepcopy(pretrained_encoder(seed))
    torch.manual_seed(seed)
    return EncoderWithHeads(encoder, {task: nn.Linear(128, classes) for task, classes in CLASSES.items()})


SPRITES = Bench(
    name="sprites",
    tasks=list(CLASSES),
    make_data=make_data,
    make_model=make_model,
    losses=classification_losses,
    evaluate=accuracies,
    higher_is_better={"top1": True},
    epochs=20,
    batch_size=64,
)
