"""One expression about one image, in the form that every loader gives it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


IGNORED = -100  # the label of a sample whose target is not among its candidates

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels


@dataclass(frozen=True)
class Sample:
    """
    Args:
        name (`str`): of the expression; predictions are stored under it.
        image (`str`): name of the image.
        size (`tuple[float, float]`): its width and height in pixels.
        boxes (`tuple[Box, ...]`): of the candidates.
        categories (`tuple[str, ...]`): of the candidates, which their facts are looked up by.
        expression (`str`): what is said of one of them.
        label (`int`): number of that one, or -100 if it is not among the candidates.
        fact (`str`, *optional*): the fact that the expression goes back to.
    """

    name: str
    image: str
    size: tuple[float, float]
    boxes: tuple[Box, ...]
    categories: tuple[str, ...]
    expression: str
    label: int
    fact: str | None = None


# Region features of a sample's candidates, `[candidates, size]`.
Features = Callable[[Sample], Tensor]


def corners(values: Sequence[float]) -> Box:
    """The box of a file's x, y, width and height."""
    x, y, width, height = map(float, values)
    return x, y, x + width, y + height


def geometry(boxes: Sequence[Box], size: tuple[float, float]) -> Tensor:
    """G of appendix A.3, `[boxes, 7]`: corners, width, height and area, relative to the image."""
    ends = torch.tensor(boxes, dtype=torch.float32).view(-1, 4) / torch.tensor([*size, *size])
    width, height = ends[:, 2] - ends[:, 0], ends[:, 3] - ends[:, 1]
    return torch.cat([ends, torch.stack([width, height, width * height], dim=1)], dim=1)
