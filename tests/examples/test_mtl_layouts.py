"""Loaders read files of the public layouts, made here."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.examples._mtl_files import write_arrays, write_celeba, write_clevr, write_smallnorb


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "mtl"))

from _layouts.arrays import CityScapes, NYUv2
from _layouts.celeba import CelebA
from _layouts.clevr import Clevr
from _layouts.presets import PRESETS
from _layouts.smallnorb import SmallNORB, read_matrix


@pytest.fixture
def random():
    return np.random.default_rng(0)


def test_nyuv2(tmp_path, random):
    images, depth = random.random((11, 4, 6, 3)), random.random((11, 4, 6, 1))
    labels, normal = random.integers(-1, 13, (11, 4, 6)).astype(float), random.random((11, 4, 6, 3))
    write_arrays(tmp_path / "train", image=images, label=labels, depth=depth, normal=normal)
    data = NYUv2(str(tmp_path), "train")
    assert len(data) == 11
    sample = data[10]  # numbers sort as numbers: 10 comes after 9
    np.testing.assert_allclose(sample["pixel_values"], images[10].transpose(2, 0, 1), rtol=1e-6)
    np.testing.assert_allclose(sample["labels_depth"], depth[10].transpose(2, 0, 1), rtol=1e-6)
    np.testing.assert_allclose(sample["labels_normal"], normal[10].transpose(2, 0, 1), rtol=1e-6)
    expected = np.where(labels[10] < 0, -100, labels[10])
    np.testing.assert_array_equal(sample["labels_segmentation"], expected)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        NYUv2(str(tmp_path), "val")
    with pytest.raises(ValueError, match="split='test'"):
        NYUv2(str(tmp_path), "test")


@pytest.mark.parametrize("kind", ["label", "label_7"])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1)], ids=str)
def test_cityscapes(tmp_path, random, kind, shape):
    depth = random.random((2, *shape))
    labels = random.integers(-1, 7, (2, 4, 6))
    write_arrays(tmp_path / "val", image=random.random((2, 4, 6, 3)), depth=depth, **{kind: labels})
    sample = CityScapes(str(tmp_path), "val")[1]
    assert sample["labels_depth"].shape == (1, 4, 6)
    np.testing.assert_allclose(sample["labels_depth"].flatten(), depth[1].flatten(), rtol=1e-6)
    assert bool((sample["labels_segmentation"] == -100).any()) == bool((labels[1] < 0).any())


def test_celeba(tmp_path, random):
    pytest.importorskip("PIL")
    values = random.choice([-1, 1], (6, 40))
    write_celeba(tmp_path, random.integers(0, 256, (6, 20, 16, 3), dtype=np.uint8), values, [0, 1, 2, 0, 1, 2])
    data = CelebA(str(tmp_path), "val", size=8)
    assert len(data) == 2
    assert len(data.tasks) == 10
    sample = data[1]  # the second image of partition 1 is number 4
    assert sample["pixel_values"].shape == (3, 8, 8)
    for i, task in enumerate(data.tasks):
        assert float(sample[f"labels_{task}"]) == float(values[4, i] > 0)
    with pytest.raises(ValueError, match="attributes=41"):
        CelebA(str(tmp_path), "val", attributes=41)


def test_clevr(tmp_path, random):
    pytest.importorskip("PIL")
    distances = [[7.9, 12.0, 9.0], [8.2] * 10, [11.0, 10.5, 13.0, 12.0]]
    write_clevr(tmp_path, "val", random.integers(0, 256, (3, 10, 12, 3), dtype=np.uint8), distances)
    data = Clevr(str(tmp_path), "val", size=8)
    assert [int(data[i]["labels_count"]) for i in range(3)] == [0, 7, 1]
    assert [int(data[i]["labels_distance"]) for i in range(3)] == [0, 1, 5]
    assert data[0]["pixel_values"].shape == (3, 8, 8)
    assert len(Clevr(str(tmp_path), "val", limit=2)) == 2


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
def test_smallnorb(tmp_path, random, zipped):
    images = random.integers(0, 256, (4, 2, 96, 96), dtype=np.uint8)
    info = np.stack([[0, 1, 2, 3], [0, 3, 8, 5], [0, 2, 34, 18], [0, 1, 2, 3]], axis=1).astype("<i4")
    write_smallnorb(tmp_path, "training", images, info, zipped)
    data = SmallNORB(str(tmp_path), "train")
    assert [int(data[i]["labels_elevation"]) for i in range(4)] == [0, 3, 8, 5]
    assert [int(data[i]["labels_azimuth"]) for i in range(4)] == [0, 1, 17, 9]
    torch.testing.assert_close(data[2]["pixel_values"][1], torch.from_numpy(images[2, 0]).float() / 255)
    (tmp_path / "cut.mat").write_bytes(np.array([0x1E3D4C55, 1, 9, 1, 1], dtype="<i4").tobytes() + b"123")
    with pytest.raises(ValueError, match="cut short"):
        read_matrix(str(tmp_path / "cut.mat"))
    with pytest.raises(FileNotFoundError, match="testing-dat"):
        SmallNORB(str(tmp_path), "test")


def test_presets_are_those_of_the_thesis():
    assert PRESETS["nyuv2"].batch_size == 3
    assert PRESETS["celeba"].epochs == 30
    assert PRESETS["clevr"].sparse_rate == 4 * PRESETS["clevr"].full_rate
