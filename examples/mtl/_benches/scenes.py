"""Rendered scenes with what every pixel shows, how far it is and which way it faces: T = 3, as NYUv2."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .base import Bench, Table, outputs_of
from .dense_metrics import HIGHER_IS_BETTER, METRICS, dense_losses


SIDE = 24
SPHERES = 4
SIZES = (400, 150, 300)
FAR = 10.0
SKY, GROUND, MATTE, BRIGHT = range(4)


def render(count: int, seed: int) -> dict[str, Tensor]:
    """Ray-cast a ground plane and up to four spheres of two kinds under one light."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    axis = (torch.arange(SIDE) + 0.5) / SIDE - 0.5
    rays = torch.stack(
        [axis.expand(SIDE, SIDE), -axis[:, None].expand(SIDE, SIDE) - 0.1, torch.ones(SIDE, SIDE)]
    )  # [3, SIDE, SIDE], z forward
    rays = functional.normalize(rays, dim=0)[None]  # [1, 3, SIDE, SIDE]
    up = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1)
    # The camera is one above the ground.
    depth = torch.where(rays[:, 1] < -1e-3, -1.0 / rays[:, 1], FAR).expand(count, SIDE, SIDE)
    label = torch.where(depth < FAR, GROUND, SKY)
    depth = depth.clamp(max=FAR)
    normal = torch.where((label == GROUND)[:, None], up, 0.0)
    normal = torch.where((label == SKY)[:, None], -rays, normal)
    shade = torch.where(label == GROUND, 0.5, 0.9)
    kinds = torch.randint(2, (count, SPHERES), generator=generator)
    shown = torch.rand(count, SPHERES, generator=generator) < 0.8
    radius = uniform(0.3, 0.8, SPHERES)
    centre = torch.stack([uniform(-1.5, 1.5, SPHERES), radius - 1.0, uniform(2.0, 6.0, SPHERES)], dim=-1)
    for i in range(SPHERES):
        middle = centre[:, i, :, None, None]  # [count, 3, 1, 1]
        along = (rays * middle).sum(1)
        square = along**2 - (middle**2).sum(1) + radius[:, i, None, None] ** 2
        distance = along - square.clamp(min=0).sqrt()
        hit = (square > 0) & (distance > 0) & (distance < depth) & shown[:, i, None, None]
        outward = (rays * distance[:, None] - middle) / radius[:, i, None, None, None]
        depth = torch.where(hit, distance, depth)
        normal = torch.where(hit[:, None], outward, normal)
        label = torch.where(hit, MATTE + kinds[:, i, None, None], label)
        shade = torch.where(hit, 0.45 + 0.4 * kinds[:, i, None, None].float(), shade)
    light = functional.normalize(torch.stack([uniform(-1, 1), uniform(0.3, 1), uniform(-1, -0.2)], dim=1), dim=1)
    lambert = (normal * light[:, :, None, None]).sum(1).clamp(min=0)
    bright = torch.where(label == SKY, shade, shade * (0.35 + 0.65 * lambert))
    tint = uniform(0.7, 1.0, 3)[:, :, None, None]
    image = bright[:, None] * tint + 0.05 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return {
        "pixel_values": image,
        "labels_segmentation": label,
        "labels_depth": depth[:, None],
        "labels_normal": functional.normalize(normal, dim=1),
    }


def make_data(seed: int) -> tuple[Table, Table, Table]:
    first, second, third = (Table(render(n, 100_000 * part + seed)) for part, n in enumerate(SIZES, start=1))
    return first, second, third


class Encoder(nn.Module):
    """Three scales of features."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(_block(3, 16), _block(16, 16))
        self.middle = nn.Sequential(_block(16, 32, stride=2), _block(32, 32))
        self.coarse = nn.Sequential(_block(32, 64, stride=2), _block(64, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        full = self.fine(x)
        half = self.middle(full)
        return full, half, self.coarse(half)


class Decoder(nn.Module):
    """Back to the image's size, with a look at the finer scales."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.middle = _block(64 + 32, 32)
        self.fine = _block(32 + 16, 16)
        self.last = nn.Conv2d(16, channels, 1)

    def forward(self, features: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        full, half, quarter = features
        half = self.middle(torch.cat([functional.interpolate(quarter, scale_factor=2.0), half], dim=1))
        return self.last(self.fine(torch.cat([functional.interpolate(half, scale_factor=2.0), full], dim=1)))


def _block(before: int, after: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride=stride, padding=1), nn.ReLU())


class UNet(nn.Module):
    """A shared encoder and a decoder per task."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        channels = {"segmentation": 4, "depth": 1, "normal": 3}
        self.heads = nn.ModuleDict({task: Decoder(width) for task, width in channels.items()})

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        features = self.encoder(pixel_values)
        return {task: head(features) for task, head in self.heads.items()}


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return UNet()


def evaluate(model: nn.Module, data: Table) -> dict[str, dict[str, float]]:
    outputs = outputs_of(model, data)
    return {task: METRICS[task](prediction, data.columns[f"labels_{task}"]) for task, prediction in outputs.items()}


SCENES = Bench(
    name="scenes",
    tasks=["segmentation", "depth", "normal"],
    make_data=make_data,
    make_model=make_model,
    losses=dense_losses,
    evaluate=evaluate,
    higher_is_better=HIGHER_IS_BETTER,
    epochs=12,
    batch_size=16,
)
