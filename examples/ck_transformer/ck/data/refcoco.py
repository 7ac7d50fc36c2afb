"""RefCOCO, RefCOCO+ and RefCOCOg as their authors distribute them: refs(<split by>).p and instances.json."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import DataFileError, JsonFile
from .samples import Box, Sample, corners


class _PlainUnpickler(pickle.Unpickler):
    """Lists, dicts, numbers and texts are all that such a file holds. Anything else could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


class RefCOCO:
    """
    Candidates of an image are all of its annotations.

    Args:
        root (`str` or `Path`): the folder, such as `refcoco+`.
        split_by (`str`, *optional*, defaults to `"unc"`): whose splits: `unc`, `google` or `umd`.
    """

    def __init__(self, root: str | Path, split_by: str = "unc") -> None:
        self.refs_path = Path(root) / f"refs({split_by}).p"
        try:
            self.refs = _PlainUnpickler(io.BytesIO(self.refs_path.read_bytes()), encoding="utf-8").load()
        except (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise DataFileError(self.refs_path, "whole file", f"no list of references ({error})") from None
        if not isinstance(self.refs, list):
            raise DataFileError(self.refs_path, "whole file", f"a {type(self.refs).__name__}, no list of references")
        self.instances = JsonFile(Path(root) / "instances.json", dict)
        self.categories = {key: name for _, (key, name) in self.rows("categories", "id", "name")}
        self.images: dict[int, tuple[str, tuple[float, float]]] = {}
        for number, (key, name, width, height) in self.rows("images", "id", "file_name", "width", "height"):
            with self.instances.expecting("image with width and height", "images", number):
                self.images[key] = name, (float(width), float(height))
        self.annotations: dict[int, list[tuple[int, str, Box]]] = {}
        for number, (key, image, category, box) in self.rows("annotations", "id", "image_id", "category_id", "bbox"):
            with self.instances.expecting("annotation with a known category and a box", "annotations", number):
                own = self.annotations.setdefault(image, [])
                own.append((key, self.categories[category], corners(box)))

    def rows(self, part: str, *names: str) -> Iterator[tuple[int, list[Any]]]:
        """Number and values of each entry in a part of instances.json."""
        for number in range(len(self.instances.get(part))):
            yield number, [self.instances.get(part, number, name) for name in names]

    def split(self, name: str) -> list[Sample]:
        """Samples of `"train"`, `"val"`, `"test"`, `"testA"` or `"testB"`, one per sentence."""
        samples = []
        for number, ref in enumerate(self.refs):
            try:
                if ref["split"] != name:
                    continue
                own = self.annotations[ref["image_id"]]
                label = [key for key, _, _ in own].index(ref["ann_id"])
                image, size = self.images[ref["image_id"]]
                sentences = [(sentence["sent_id"], sentence["sent"]) for sentence in ref["sentences"]]
            except (KeyError, TypeError, ValueError) as error:
                raise DataFileError(self.refs_path, f"entry {number}", f"incomplete or unknown: {error}") from None
            boxes, categories = tuple(box for *_, box in own), tuple(category for _, category, _ in own)
            samples += [Sample(str(key), image, size, boxes, categories, text, label) for key, text in sentences]
        return samples
