"""NYUv2 and CityScapes as the MTAN authors distribute them: one `.npy` file per image and label."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


IGNORED = -100


def _numbered(folder: str) -> list[str]:
    """File numbers of a folder of `.npy` files, in order."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder} does not exist; see --help for the layout that is expected.")
    names = [name[:-4] for name in os.listdir(folder) if name.endswith(".npy")]
    if not names:
        raise FileNotFoundError(f"{folder} has no .npy files; see --help for the layout that is expected.")
    return sorted(names, key=int)


class NYUv2(Dataset[Any]):
    """
    NYUv2 with 13 classes, 288 × 384, as `<root>/{train,val}/{image,label,depth,normal}/<number>.npy`.

    Files hold the image `[height, width, 3]` in 0..1, classes `[height, width]` (-1: none), depth `[height, width, 1]`
    in metres (0: none) and normals `[height, width, 3]` (0: none).

    Args:
        root (`str`): the folder with `train` and `val`.
        split (`str`): `"train"` (795 images) or `"val"` (654, the test set of the literature).
    """

    tasks = ("segmentation", "depth", "normal")
    classes = 13

    def __init__(self, root: str, split: str) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"split={split!r} must be 'train' or 'val'.")
        self.folder = os.path.join(root, split)
        self.numbers = _numbered(os.path.join(self.folder, "image"))

    def __len__(self) -> int:
        return len(self.numbers)

    def _read(self, kind: str, index: int) -> Tensor:
        path = os.path.join(self.folder, kind, f"{self.numbers[index]}.npy")
        return torch.from_numpy(np.load(path).astype(np.float32))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        label = self._read("label", index).long()
        return {
            "pixel_values": self._read("image", index).movedim(-1, 0),
            "labels_segmentation": label.masked_fill(label < 0, IGNORED),
            "labels_depth": self._read("depth", index).movedim(-1, 0),
            "labels_normal": self._read("normal", index).movedim(-1, 0),
        }


class CityScapes(NYUv2):
    """
    CityScapes with 7 classes and inverse depth, 128 × 256, as `<root>/{train,val}/{image,label,depth}/<number>.npy`;
    or `label_7` and `depth` where that is what the folder has.
    """

    tasks = ("segmentation", "depth")
    classes = 7

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        kind = "label_7" if os.path.isdir(os.path.join(self.folder, "label_7")) else "label"
        label = self._read(kind, index).long()
        depth = self._read("depth", index)
        return {
            "pixel_values": self._read("image", index).movedim(-1, 0),
            "labels_segmentation": label.masked_fill(label < 0, IGNORED),
            "labels_depth": depth.movedim(-1, 0) if depth.ndim == 3 else depth[None],
        }
