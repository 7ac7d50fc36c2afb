"""SmallNORB as its authors distribute it: binary matrix files."""

from __future__ import annotations

import glob
import gzip
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset


# The files' first four bytes, little-endian, give the type of what follows.
TYPES = {0x1E3D4C55: np.dtype("u1"), 0x1E3D4C54: np.dtype("<i4"), 0x1E3D4C56: np.dtype("<i2")}


def read_matrix(path: str) -> np.ndarray[Any, Any]:
    """
    Read a `.mat` file of NORB's own format, gzipped or not: magic number, number of dimensions, at least three sizes,
    values.

    Raises:
        `ValueError`: if it is not such a file, or is cut short.
    """
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rb") as file:
        content = file.read()
    magic, dimensions = np.frombuffer(content[:8], dtype="<i4").tolist()
    if magic not in TYPES:
        raise ValueError(f"{path} is not one of NORB's matrix files: it begins with {magic:#x}.")
    stored = max(3, dimensions)
    shape = np.frombuffer(content[8 : 8 + 4 * stored], dtype="<i4")[:dimensions].tolist()
    kind = TYPES[magic]
    values = np.frombuffer(content[8 + 4 * stored :], dtype=kind)
    if values.size != int(np.prod(shape)):
        raise ValueError(f"{path} is cut short: {values.size} of {int(np.prod(shape))} values.")
    return values.reshape(shape)


class SmallNORB(Dataset[Any]):
    """
    Azimuth (18 classes) and elevation (9 classes) of toys, seen by the left camera. `<root>` holds the six files
    `smallnorb-*-{training,testing}-{dat,cat,info}.mat[.gz]`.

    Args:
        root (`str`): the folder.
        split (`str`): `"train"` or `"test"`.
        limit (`int`, *optional*): the first so many images; VTAB trains on 1000.
        size (`int`): images are resized from 96 to this height and width.
    """

    tasks = ("azimuth", "elevation")
    classes = (18, 9)

    def __init__(self, root: str, split: str, limit: int | None = None, size: int = 96) -> None:
        kind = {"train": "training", "test": "testing"}[split]
        found = {}
        for part in ("dat", "info"):
            paths = sorted(glob.glob(os.path.join(root, f"smallnorb-*{kind}-{part}.mat*")))
            if not paths:
                raise FileNotFoundError(f"{root} has no smallnorb-*{kind}-{part}.mat; see --help for the layout.")
            found[part] = read_matrix(paths[0])
        self.images = found["dat"][:limit]  # [images, 2 cameras, 96, 96]
        info = found["info"][:limit]  # instance, elevation, azimuth (even numbers), lighting
        self.elevation, self.azimuth = info[:, 1], info[:, 2] // 2
        self.size = size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = torch.from_numpy(self.images[index, 0].astype(np.float32)) / 255
        if self.size != len(image):
            size = (self.size, self.size)
            image = functional.interpolate(image[None, None], size, mode="bilinear", antialias=True)[0, 0]
        return {
            "pixel_values": image.expand(3, *image.shape).clone(),
            "labels_azimuth": torch.tensor(int(self.azimuth[index])),
            "labels_elevation": torch.tensor(int(self.elevation[index])),
        }
