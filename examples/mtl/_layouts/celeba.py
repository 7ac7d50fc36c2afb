"""CelebA as its authors distribute it: images, and text files of attributes and of the partition."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


PARTITION = {"train": 0, "val": 1, "test": 2}


class CelebA(Dataset[Any]):
    """
    Binary attributes of faces. `<root>` holds `img_align_celeba/`, `list_attr_celeba.txt` (a count, the attributes'
    names, then a file name and ±1 per attribute in each line) and `list_eval_partition.txt`.

    Args:
        root (`str`): the folder.
        split (`str`): `"train"`, `"val"` or `"test"`.
        attributes (`int`): the first so many attributes are the tasks; the thesis takes 10.
        size (`int`): images are resized to this height and width.
    """

    def __init__(self, root: str, split: str, attributes: int = 10, size: int = 64) -> None:
        if split not in PARTITION:
            raise ValueError(f"split={split!r} must be one of {', '.join(PARTITION)}.")
        with open(os.path.join(root, "list_attr_celeba.txt"), encoding="utf-8") as file:
            file.readline()  # the number of images
            names = file.readline().split()
            rows = [line.split() for line in file if line.strip()]
        with open(os.path.join(root, "list_eval_partition.txt"), encoding="utf-8") as file:
            part = {name: int(number) for name, number in (line.split() for line in file if line.strip())}
        if not 1 <= attributes <= len(names):
            raise ValueError(f"attributes={attributes} must lie between 1 and {len(names)}.")
        self.tasks = tuple(names[:attributes])
        kept = [row for row in rows if part.get(row[0]) == PARTITION[split]]
        self.files = [os.path.join(root, "img_align_celeba", row[0]) for row in kept]
        values = [[int(value) for value in row[1 : attributes + 1]] for row in kept]
        self.labels = (torch.tensor(values).view(len(kept), attributes) > 0).float()  # [images, attributes]
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        from PIL import Image

        with Image.open(self.files[index]) as image:
            pixels = np.asarray(image.convert("RGB").resize((self.size, self.size)), dtype=np.float32) / 255
        labels = {f"labels_{task}": self.labels[index, i] for i, task in enumerate(self.tasks)}
        return {"pixel_values": torch.from_numpy(pixels).movedim(-1, 0), **labels}
