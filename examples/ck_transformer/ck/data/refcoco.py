"""RefCOCO, RefCOCO+ and RefCOCOg as their authors distribute them: refs(<split by>).p and instances.json."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from .files import DataFileError, JsonFile
from .samples import Sample


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
        instances = JsonFile(Path(root) / "instances.json", dict)
        self.categories = {
            instances.get("categories", number, "id"): instances.get("categories", number, "name")
            for number in range(len(instances.get("categories")))
        }
        self.images: dict[int, tuple[str, tuple[float, float]]] = {}
        for number in range(len(instances.get("images"))):
            name, width, height, key = (
                instances.get("images", number, part) for part in ("file_name", "width", "height", "id")
            )
            self.images[key] = name, (float(width), float(height))
        self.annotations: dict[int, list[Any]] = {}
        for number in range(len(instances.get("annotations"))):
            where = ("annotations", number)
            image, key, category, box = (instances.get(*where, p) for p in ("image_id", "id", "category_id", "bbox"))
            if image not in self.images or category not in self.categories or len(box) != 4:
                raise instances.error(
                    "its image or category is not described, or its box has not four numbers", *where
                )
            x, y, width, height = map(float, box)
            self.annotations.setdefault(image, []).append(
                (key, self.categories[category], (x, y, x + width, y + height))
            )

    def split(self, name: str) -> list[Sample]:
        """Samples of `"train"`, `"val"`, `"test"`, `"testA"` or `"testB"`, one per sentence."""
        samples = []
        for number, ref in enumerate(self.refs):
            try:
                if ref["split"] != name:
                    continue
                own = self.annotations[ref["image_id"]]
                label = [key for key, _, _ in own].index(ref["ann_id"])
                sentences = [(sentence["sent_id"], sentence["sent"]) for sentence in ref["sentences"]]
            except (KeyError, TypeError, ValueError) as error:
                raise DataFileError(self.refs_path, f"entry {number}", f"incomplete or unknown: {error}") from None
            image, size = self.images[ref["image_id"]]
            boxes, categories = tuple(box for *_, box in own), tuple(category for _, category, _ in own)
            samples += [Sample(str(key), image, size, boxes, categories, text, label) for key, text in sentences]
        return samples
