"""CLEVR as its authors distribute it: rendered images and JSON files of what they show."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


COUNT_START, COUNT_CLASSES = 3, 8
# Upper edges of the distance of the nearest object, as VTAB bins it into six classes.
DEPTH_EDGES = (8.0, 8.5, 9.0, 9.5, 10.0)


class Clevr(Dataset[Any]):
    """
    Number of objects (3 to 10) and distance of the nearest one (six classes), as in VTAB. `<root>` holds
    `images/{train,val}/` and `scenes/CLEVR_{train,val}_scenes.json`.

    Args:
        root (`str`): the folder, usually `CLEVR_v1.0`.
        split (`str`): `"train"` or `"val"`.
        limit (`int`, *optional*): the first so many images; VTAB trains on 1000.
        size (`int`): images are resized to this height and width.
    """

    tasks = ("count", "distance")
    classes = (COUNT_CLASSES, len(DEPTH_EDGES) + 1)

    def __init__(self, root: str, split: str, limit: int | None = None, size: int = 64) -> None:
        path = os.path.join(root, "scenes", f"CLEVR_{split}_scenes.json")
        with open(path, encoding="utf-8") as file:
            scenes = json.load(file)["scenes"][:limit]
        self.files = [os.path.join(root, "images", split, scene["image_filename"]) for scene in scenes]
        self.counts = [len(scene["objects"]) - COUNT_START for scene in scenes]
        nearest = [min(item["pixel_coords"][2] for item in scene["objects"]) for scene in scenes]
        self.distances = np.digitize(nearest, DEPTH_EDGES).tolist()
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        from PIL import Image

        with Image.open(self.files[index]) as image:
            pixels = np.asarray(image.convert("RGB").resize((self.size, self.size)), dtype=np.float32) / 255
        return {
            "pixel_values": torch.from_numpy(pixels).movedim(-1, 0),
            "labels_count": torch.tensor(self.counts[index]),
            "labels_distance": torch.tensor(self.distances[index]),
        }
