"""KB-Ref in the files of its authors: expression, candidate, image and objects .json, and one file per split."""

from __future__ import annotations

import warnings
from pathlib import Path

from .files import DataFileError, JsonFile
from .samples import Sample


PADDING = "-1"  # images with fewer candidates are filled up with it


class KBRef:
    """
    Args:
        root (`str` or `Path`): the folder.
        skip_bad (`bool`, *optional*, defaults to `False`):
            Leave out expressions whose image or object is not described, and warn. Otherwise they are errors.
    """

    def __init__(self, root: str | Path, skip_bad: bool = False) -> None:
        self.root, self.skip_bad = Path(root), skip_bad
        names = ("expression", "candidate", "image", "objects")
        self.expressions, self.candidates, self.images, self.objects = (
            JsonFile(self.root / f"{name}.json", dict) for name in names
        )

    def split(self, name: str) -> list[Sample]:
        """Samples of `"train"`, `"val"` or `"test"`."""
        wanted = {str(image) for image in JsonFile(self.root / f"{name}.json", list, dict).content}
        samples, bad = [], []
        for key in self.expressions.content:
            if key.partition("_")[0] not in wanted:
                continue
            try:
                samples.append(self.sample(key))
            except DataFileError as error:
                if not self.skip_bad:
                    raise
                bad.append(error)
        if bad:
            warnings.warn(f"{len(bad)} expressions of {name} left out; the first: {bad[0]}", stacklevel=2)
        return samples

    def sample(self, key: str) -> Sample:
        image, _, target = key.partition("_")
        try:
            expression, fact = self.expressions.content[key]
        except ValueError:
            raise self.expressions.error("an expression and its fact are needed", key) from None
        candidates = [str(name) for name in self.candidates.get(image) if str(name) != PADDING]
        if target not in candidates:
            raise self.candidates.error(f"object {target!r} is referred to but is no candidate", image)
        boxes, categories = [], []
        for name in candidates:
            try:
                category, _, x, y, width, height = self.objects.get(image, name)
                boxes.append((float(x), float(y), float(x) + float(width), float(y) + float(height)))
            except (TypeError, ValueError) as error:
                if isinstance(error, DataFileError):
                    raise
                raise self.objects.error("category, name, x, y, width and height are needed", image, name) from None
            categories.append(category)
        try:
            width, height = self.images.get(image)
            size = (float(width), float(height))
        except (TypeError, ValueError) as error:
            if isinstance(error, DataFileError):
                raise
            raise self.images.error("width and height are needed", image) from None
        label = candidates.index(target)
        return Sample(key, image, size, tuple(boxes), tuple(categories), expression, label, fact)
