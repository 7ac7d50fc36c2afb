"""Loaders of public layouts: what they read, and what they say of bad files."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from ck.data.detections import Detections, overlap
from ck.data.features import CropFeatures, StoredFeatures, crops_of
from ck.data.files import DataFileError, JsonFile, locate
from ck.data.kbref import KBRef
from ck.data.refcoco import RefCOCO
from ck.data.samples import Sample, geometry
from safetensors.torch import save_file
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from tests.examples.ck_transformer._layouts import dump, write_kbref, write_refcoco


def test_geometry_is_that_of_appendix_a3() -> None:
    found = geometry([(10, 5, 30, 35), (0, 0, 100, 50)], (100, 50))
    expected = torch.tensor([[0.1, 0.1, 0.3, 0.7, 0.2, 0.6, 0.12], [0, 0, 1, 1, 1, 1, 1]])
    torch.testing.assert_close(found, expected)


def test_kbref_is_read(tmp_path: Path) -> None:
    write_kbref(tmp_path)
    train, test = KBRef(tmp_path).split("train"), KBRef(tmp_path).split("test")
    assert [sample.label for sample in train] == [0, 1]
    assert train[1].boxes == ((10, 5, 30, 35), (0, 0, 100, 50)) and train[1].size == (100, 50)
    assert train[1].fact == "People carry stones with a gigi."
    assert test == [
        Sample(
            "8_21", "8", (40.0, 80.0), ((1, 2, 4, 6), (5, 6, 12, 14)), ("dudu.n.01", "baba.n.02"),
            "something to warm broth", 1, "A baba can heat soup.",
        )
    ]  # fmt: skip


def drop(name: str, *keys: str) -> Any:
    def change(root: Path) -> None:
        content = json.loads((root / name).read_text())
        part = content
        for key in keys[:-1]:
            part = part[key]
        del part[keys[-1]]
        dump(root / name, content)

    return change


def put(name: str, text: str, new: str) -> Any:
    def change(root: Path) -> None:
        path = root / name
        assert text in path.read_text()
        path.write_text(path.read_text().replace(text, new, 1))

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (put("image.json", "100,", "100"), r"image.json, line 4: no valid JSON"),
        (put("image.json", "100,", ""), r"image.json, line 2: not the width and height that"),
        (drop("image.json", "7"), r"image.json, line 1: no entry '7'"),
        (drop("objects.json", "7", "12"), r"objects.json, line 2: no entry '12'"),
        (put("objects.json", '"dudu",', ""), r"objects.json, line 3: not the category, name, x, y"),
        (put("candidate.json", '"11"', '"13"'), r"candidate.json, line 2: object '11' is referred to"),
        (
            put("expression.json", '"something to sever timber",', ""),
            r"expression.json, line 2: not the pair of expression",
        ),
        (lambda root: dump(root / "objects.json", []), r"objects.json, line 1: holds a list, but a dict is needed"),
    ],
)
def test_bad_kbref_files_are_named_with_their_line(damage: Any, words: str, tmp_path: Path) -> None:
    write_kbref(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataFileError, match=words):
        KBRef(tmp_path).split("train")


def test_incomplete_expressions_can_be_left_out(tmp_path: Path) -> None:
    write_kbref(tmp_path)
    put("candidate.json", '"11"', '"13"')(tmp_path)
    put("objects.json", '"11"', '"13"')(tmp_path)
    with pytest.warns(UserWarning, match=r"1 expressions of train left out; the first: .*candidate.json, line 2"):
        samples = KBRef(tmp_path, skip_bad=True).split("train")
    assert [sample.name for sample in samples] == ["7_12"]


def test_refcoco_is_read(tmp_path: Path) -> None:
    write_refcoco(tmp_path)
    data = RefCOCO(tmp_path)
    train = data.split("train")
    assert [(sample.name, sample.expression) for sample in train] == [("0", "left one"), ("1", "the big dudu")]
    assert train[0].categories == ("dudu", "traffic light") and train[0].label == 1
    assert train[0].boxes[1] == (8, 8, 24, 24) and train[0].size == (64, 48) and train[0].image == "five.jpg"
    assert [sample.name for sample in data.split("testA")] == ["2"]


def test_refcoco_pickles_run_no_code(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    write_refcoco(tmp_path)
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([Harmful()]))
    with pytest.raises(DataFileError, match=r"refs\(unc\).p, whole file: no list of references .*mkdir"):
        RefCOCO(tmp_path)
    assert not (tmp_path / "made").exists()


def test_bad_refcoco_files_are_named(tmp_path: Path) -> None:
    write_refcoco(tmp_path)
    put("instances.json", '"category_id": 2', '"category_id": 9')(tmp_path)
    with pytest.raises(DataFileError, match=r"instances.json, line 28: not the annotation with a known category"):
        RefCOCO(tmp_path)
    write_refcoco(tmp_path)
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([{"split": "train", "image_id": 4}]))
    with pytest.raises(DataFileError, match=r"refs\(unc\).p, entry 0: incomplete or unknown: 4"):
        RefCOCO(tmp_path).split("train")
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps({}))
    with pytest.raises(DataFileError, match=r"refs\(unc\).p, whole file: a dict, no list"):
        RefCOCO(tmp_path)


def test_lines_are_those_of_the_named_part() -> None:
    text = '{\n "a": [1, {"b":\n "{\\"c\\": ["}],\n "c":\n  {"d": 4}}'
    assert [locate(text, keys) for keys in ((), ("a",), ("a", 1, "b"), ("c",), ("c", "d"))] == [1, 2, 3, 5, 5]


def test_detected_boxes_take_the_place_of_annotated_ones(tmp_path: Path) -> None:
    write_refcoco(tmp_path)
    data = RefCOCO(tmp_path)
    found = [
        {"image_id": 5, "category_id": 2, "bbox": [8, 8, 16, 12], "score": 0.5},
        {"image_id": 5, "category_id": 1, "bbox": [40, 0, 9, 9], "score": 0.9},
        {"image_id": 5, "category": "gigi", "bbox": [8, 8, 16, 16], "score": 0.1},
    ]
    dump(tmp_path / "found.json", found)
    images = {key: name for key, (name, _) in data.images.items()}
    applied = Detections(tmp_path / "found.json", data.categories, images).applied(data.split("train"))
    assert applied[0].categories == ("dudu", "traffic light") and applied[0].label == 1  # IoU 0.75
    assert applied[0].boxes == ((40, 0, 49, 9), (8, 8, 24, 20))
    one = Detections(tmp_path / "found.json", data.categories, images, most=1).applied(data.split("train"))
    assert one[0].label == -100 and one[0].categories == ("dudu",)
    missing = Detections(tmp_path / "found.json", data.categories, images).applied(data.split("testA"))
    assert missing[0].label == -100 and missing[0].boxes == ()
    with pytest.raises(DataFileError, match=r"found.json, line 2: not the detection with"):
        Detections(tmp_path / "found.json", {1: "dudu"}, images)


def test_overlap() -> None:
    assert overlap((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert overlap((0, 0, 1, 1), (1, 0, 2, 1)) == 0 == overlap((0, 0, 0, 0), (0, 0, 0, 0))


def image_and_sample(folder: Path) -> Sample:
    Image = pytest.importorskip("PIL.Image")
    picture = Image.new("RGB", (40, 20), (255, 0, 0))
    picture.paste((0, 0, 255), (20, 0, 40, 20))
    picture.save(folder / "p.png")
    boxes = ((0.0, 0.0, 20.0, 20.0), (20.0, 0.0, 40.0, 20.0), (3.2, 3.2, 3.2, 3.2))
    return Sample("p", "p", (40.0, 20.0), boxes, ("a", "b", "c"), "blue", 1)


def test_crops_show_their_boxes_and_are_stored(tmp_path: Path) -> None:
    sample = image_and_sample(tmp_path)
    crops = CropFeatures(tmp_path, lambda pixels: pixels.mean((2, 3)), 8, [0.5] * 3, [0.5] * 3)
    expected = torch.tensor([[1.0, -1, -1], [-1, -1, 1], [1, -1, -1]])
    torch.testing.assert_close(crops(sample), expected)
    crops.save(tmp_path / "features.safetensors", [sample])
    stored = StoredFeatures(tmp_path / "features.safetensors")
    assert stored.size == 3 and torch.equal(stored(sample), crops(sample))


def test_features_that_are_missing_or_do_not_fit_are_named(tmp_path: Path) -> None:
    sample = Sample("p", "p", (40.0, 20.0), ((0.0, 0.0, 1.0, 1.0),), ("a",), "blue", 0)
    save_file({"p": torch.zeros(2, 3)}, tmp_path / "f.safetensors")
    with pytest.raises(DataFileError, match=r"f.safetensors, tensor 'p': is \(2, 3\), not \(1, 3\)"):
        StoredFeatures(tmp_path / "f.safetensors")(sample)
    save_file({"q": torch.zeros(2, 3)}, tmp_path / "f.safetensors")
    with pytest.raises(DataFileError, match=r"f.safetensors, tensor 'p': missing"):
        StoredFeatures(tmp_path / "f.safetensors")(sample)
    with pytest.raises(FileNotFoundError, match=r"p: no such image, nor with one of the endings .jpg, .jpeg, .png"):
        CropFeatures(tmp_path, lambda pixels: pixels, 8, [0.5] * 3, [0.5] * 3)(sample)


def test_any_vision_model_gives_features(tmp_path: Path) -> None:
    sample = image_and_sample(tmp_path)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    found = crops_of(tmp_path, str(tmp_path / "vit"))(sample)
    assert found.shape == (3, 8) and not torch.equal(found[0], found[1])


def test_json_parts_that_are_missing_are_named(tmp_path: Path) -> None:
    dump(tmp_path / "x.json", {"a": [{"b": 1}]})
    file = JsonFile(tmp_path / "x.json", dict)
    assert file.get("a", 0, "b") == 1
    with pytest.raises(DataFileError, match=r"x.json, line 3: no entry 'c'"):
        file.get("a", 0, "c")
