"""Detected boxes in the place of annotated ones (thesis, table 3.2 and appendix A.5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from .files import JsonFile
from .samples import IGNORED, Box, Sample, corners


def overlap(first: Box, second: Box) -> float:
    """Intersection over union."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return shared / (sum(areas) - shared) if shared else 0.0


class Detections:
    """
    A detector's results in COCO's layout: a list of `{"image_id", "bbox": [x, y, width, height], "score"}` with
    `"category"` or `"category_id"`.

    Args:
        path (`str` or `Path`): the file.
        categories (`Mapping[int, str]`, *optional*): their names by `category_id`.
        images (`Mapping[int, str]`, *optional*): the samples' names of images by `image_id`, if they differ.
        most (`int`, *optional*, defaults to 10): boxes per image, the surest ones; the thesis has 10 and 100.
        threshold (`float`, *optional*, defaults to 0.2): the lowest score that is kept.
    """

    def __init__(
        self,
        path: str | Path,
        categories: Mapping[int, str] | None = None,
        images: Mapping[int, str] | None = None,
        most: int = 10,
        threshold: float = 0.2,
    ) -> None:
        file = JsonFile(path, list)
        found: dict[str, list[tuple[float, str, Box]]] = {}
        for number, entry in enumerate(file.content):
            with file.expecting("detection with image_id, bbox, score and a known category", number):
                category = entry["category"] if "category" in entry else (categories or {})[entry["category_id"]]
                image, score, box = entry["image_id"], float(entry["score"]), corners(entry["bbox"])
                image = str(image if images is None else images[image])
            if score >= threshold:
                found.setdefault(image, []).append((score, category, box))
        self.found = {image: sorted(own, key=lambda item: -item[0])[:most] for image, own in found.items()}

    def applied(self, samples: Sequence[Sample], least_overlap: float = 0.5) -> list[Sample]:
        """
        The samples with detected candidates. The target is the box that overlaps most with the true one, if by half
        or more; otherwise it is missing, and the sample's label is -100.
        """
        changed = []
        for sample in samples:
            own = self.found.get(sample.image, [])
            boxes = tuple(box for *_, box in own)
            shared = [overlap(sample.boxes[sample.label], box) for box in boxes]
            best = max(range(len(boxes)), key=shared.__getitem__, default=None)
            label = best if best is not None and shared[best] >= least_overlap else IGNORED
            categories = tuple(category for _, category, _ in own)
            changed.append(replace(sample, boxes=boxes, categories=categories, label=label))
        return changed
