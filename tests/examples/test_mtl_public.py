"""Every public data set trains from files of its layout."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.examples._mtl_files import write_arrays, write_celeba, write_clevr, write_smallnorb


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "mtl"))

import public


IMAGES = 6


def _pixels(random, count=IMAGES):
    return random.integers(0, 256, (count, 20, 16, 3), dtype=np.uint8)


def make_nyuv2(root, random, classes=13, normal=True):
    for split in ("train", "val"):
        arrays = {"image": random.random((IMAGES, 16, 16, 3)), "depth": random.random((IMAGES, 16, 16, 1))}
        arrays["label"] = random.integers(-1, classes, (IMAGES, 16, 16))
        if normal:
            arrays["normal"] = random.random((IMAGES, 16, 16, 3))
        write_arrays(root / split, **arrays)


def make_cityscapes(root, random):
    make_nyuv2(root, random, classes=7, normal=False)


def make_celeba(root, random):
    count = 3 * IMAGES
    write_celeba(root, _pixels(random, count), random.choice([-1, 1], (count, 40)), np.arange(count) % 3)


def make_clevr(root, random):
    for split in ("train", "val"):
        distances = [random.uniform(7, 12, random.integers(3, 11)).tolist() for _ in range(IMAGES)]
        write_clevr(root, split, _pixels(random), distances)


def make_smallnorb(root, random):
    info = np.stack([random.integers(0, n, IMAGES) for n in (10, 9, 18, 6)], axis=1) * [1, 1, 2, 1]
    for kind in ("training", "testing"):
        images = random.integers(0, 256, (IMAGES, 2, 96, 96), dtype=np.uint8)
        write_smallnorb(root, kind, images, info.astype("<i4"), zipped=True)


DATA = {
    "nyuv2": (make_nyuv2, {"segmentation": 2, "depth": 2, "normal": 5}),
    "cityscapes": (make_cityscapes, {"segmentation": 2, "depth": 2}),
    "celeba": (make_celeba, {f"Attribute_{i}": 1 for i in range(10)}),
    "clevr": (make_clevr, {"count": 2, "distance": 2}),
    "smallnorb": (make_smallnorb, {"azimuth": 2, "elevation": 2}),
}


def trained(tmp_path, name, *options):
    make, _ = DATA[name]
    (tmp_path / "data").mkdir()
    make(tmp_path / "data", np.random.default_rng(0))
    out = tmp_path / "out"
    public.main(
        [
            "--data",
            name,
            "--root",
            str(tmp_path / "data"),
            "--epochs",
            "1",
            "--limit",
            "4",
            "--out",
            str(out),
            *options,
        ]
    )
    return json.loads((out / "result.json").read_text())


@pytest.mark.parametrize("name", sorted(DATA))
def test_trains_and_tells_each_tasks_metrics(tmp_path, name):
    if name in ("celeba", "clevr"):
        pytest.importorskip("PIL")
    result = trained(tmp_path, name, "--method", "cagrad")
    assert {task: len(metrics) for task, metrics in result["test"].items()} == DATA[name][1]
    assert all(np.isfinite(value) for metrics in result["test"].values() for value in metrics.values())
    assert 0 <= result["gradient_conflict_incidence_all"] <= 100


@pytest.mark.parametrize("name", ["celeba", "clevr", "smallnorb"])
def test_images_have_the_size_that_the_encoder_expects(tmp_path, name):
    pytest.importorskip("PIL")
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    result = trained(tmp_path, name, "--encoder", str(tmp_path / "vit"))
    assert set(result["test"]) == set(DATA[name][1])


def test_an_encoder_of_one_vector_is_refused_for_dense_tasks(tmp_path, capsys):
    with pytest.raises(SystemExit):
        trained(tmp_path, "nyuv2", "--encoder", "vit")
    assert "--encoder" in capsys.readouterr().err
