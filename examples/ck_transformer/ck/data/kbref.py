"""KB-Ref in the files of its authors: expression, candidate, image and objects .json, and one file per split."""

from __future__ import annotations

import warnings
from pathlib import Path

from .files import DataFileError, JsonFile
from .samples import Sample, corners


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
        with self.expressions.expecting("pair of expression and fact", key):
            expression, fact = self.expressions.content[key]
        candidates = [str(name) for name in self.candidates.get(image) if str(name) != PADDING]
        if target not in candidates:
            raise self.candidates.error(f"object {target!r} is referred to but is no candidate", image)
        boxes, categories = [], []
        for name in candidates:
            with self.objects.expecting("category, name, x, y, width and height", image, name):
                category, _, *box = self.objects.get(image, name)
                boxes.append(corners(box))
                categories.append(category)
        with self.images.expecting("width and height", image):
            width, height = map(float, self.images.get(image))
        label = candidates.index(target)
        return Sample(key, image, (width, height), tuple(boxes), tuple(categories), expression, label, fact)
