"""Writes tiny files in the layouts of KB-Ref, RefCOCO, COCO's detections and WordNet."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any


def dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1))


def write_kbref(root: Path) -> None:
    """Two images. The second has one candidate less, and `-1` in its place."""
    root.mkdir(exist_ok=True)
    facts = ("A dudu can cut wood.", "People carry stones with a gigi.", "A baba can heat soup.")
    expressions = {
        "7_11": ["something to sever timber", facts[0]],
        "7_12": ["the one that will haul rocks", facts[1]],
        "8_21": ["something to warm broth", facts[2]],
    }
    dump(root / "expression.json", expressions)
    dump(root / "candidate.json", {"7": ["11", "12"], "8": ["20", "21", "-1"]})
    dump(root / "image.json", {"7": [100, 50], "8": [40, 80]})
    objects = {
        "7": {"11": ["dudu.n.01", "dudu", 10, 5, 20, 30], "12": ["Gigi.n.01", "gigi", 0, 0, 100, 50]},
        "8": {"20": ["dudu.n.01", "dudu", 1, 2, 3, 4], "21": ["baba.n.02", "baba", 5, 6, 7, 8]},
    }
    dump(root / "objects.json", objects)
    dump(root / "train.json", ["7"])
    dump(root / "test.json", {"8": None})
    dump(
        root / "Wikipedia.json", {"dudu": "A dudu can cut wood.It is old. A dudu can paint houses.", "gigi": facts[1]}
    )
    dump(root / "ConceptNet.json", {"baba": [facts[2], facts[2]], "dudu": "It is old."})


def write_refcoco(root: Path) -> None:
    root.mkdir(exist_ok=True)
    names = ("id", "file_name", "width", "height")
    images = [dict(zip(names, own, strict=True)) for own in ((5, "five.jpg", 64, 48), (6, "six.jpg", 10, 20))]
    annotations = [
        {"id": 50, "image_id": 5, "category_id": 1, "bbox": [0, 0, 32, 24]},
        {"id": 60, "image_id": 6, "category_id": 2, "bbox": [1, 2, 3, 4]},
        {"id": 51, "image_id": 5, "category_id": 2, "bbox": [8, 8, 16, 16]},
    ]
    categories = [{"id": 1, "name": "dudu"}, {"id": 2, "name": "traffic light"}]
    dump(root / "instances.json", {"images": images, "annotations": annotations, "categories": categories})
    sentences = [{"sent_id": 0, "sent": "left one"}, {"sent_id": 1, "sent": "the big dudu"}]
    refs = [
        {"ann_id": 51, "image_id": 5, "split": "train", "sentences": sentences},
        {"ann_id": 60, "image_id": 6, "split": "testA", "sentences": [{"sent_id": 2, "sent": "light"}]},
    ]
    (root / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))


def write_wordnet(root: Path) -> dict[str, int]:
    """Three nouns; gives the offset of each in data.noun."""
    fruit = 'ripe part of a plant; "fruit; and nuts"; it is sweet'
    root.mkdir(exist_ok=True)
    licence = "  1 This is a licence\n"
    synsets = {
        "food": '03 n 01 food 0 000 | any substance that can be eaten; "a balanced diet"',
        "fruit": f"13 n 02 edible_fruit 0 fruit 1 001 @ {{food}} n 0000 | {fruit}",
        "traffic_light": "06 n 01 traffic_light 0 000 | a visual signal",
    }
    data, offsets = licence, {}
    for name, entry in synsets.items():
        offsets[name] = len(data)
        places = {key: f"{place:08d}" for key, place in offsets.items()}
        data += f"{len(data):08d} {entry.format(**places)}  \n"
    index = licence + "".join(f"{name} n 1 1 @ 1 0 {place:08d}  \n" for name, place in offsets.items())
    index += f"thing n 2 0 2 0 {offsets['fruit']:08d} {offsets['food']:08d}  \n"
    (root / "data.noun").write_text(data)
    (root / "index.noun").write_text(index)
    return offsets
