"""Writes files in the layouts of public multi-task data sets."""

import gzip
import json

import numpy as np


def write_arrays(folder, **arrays):
    """NYUv2 and CityScapes: a folder per kind, a numbered file per image."""
    for kind, values in arrays.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for number, value in enumerate(values):
            np.save(folder / kind / f"{number}.npy", value)


def write_celeba(root, images, values, parts):
    """Images `[n, height, width, 3]`, attributes ±1 `[n, 40]`, and each image's partition 0, 1 or 2."""
    from PIL import Image

    (root / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06d}.png" for i in range(len(images))]
    for name, pixels in zip(names, images, strict=True):
        Image.fromarray(pixels).save(root / "img_align_celeba" / name)
    attributes = " ".join(f"Attribute_{i}" for i in range(values.shape[1]))
    lines = [f"{n}  " + " ".join(f"{v:2d}" for v in row) for n, row in zip(names, values, strict=True)]
    (root / "list_attr_celeba.txt").write_text(f"{len(names)}\n{attributes}\n" + "\n".join(lines) + "\n")
    (root / "list_eval_partition.txt").write_text("".join(f"{n} {p}\n" for n, p in zip(names, parts, strict=True)))


def write_clevr(root, split, images, distances):
    """Images, and per image its objects' distances."""
    from PIL import Image

    (root / "images" / split).mkdir(parents=True)
    (root / "scenes").mkdir(exist_ok=True)
    scenes = []
    for i, (pixels, objects) in enumerate(zip(images, distances, strict=True)):
        name = f"CLEVR_{split}_{i:06d}.png"
        Image.fromarray(pixels).save(root / "images" / split / name)
        scenes.append({"image_filename": name, "objects": [{"pixel_coords": [1, 2, d]} for d in objects]})
    (root / "scenes" / f"CLEVR_{split}_scenes.json").write_text(json.dumps({"info": {}, "scenes": scenes}))


def write_smallnorb(root, kind, images, info, zipped=False):
    """Images uint8 `[n, 2, 96, 96]` and int32 `[n, 4]` in NORB's matrix format."""
    root.mkdir(exist_ok=True)
    for part, magic, array in (("dat", 0x1E3D4C55, images), ("info", 0x1E3D4C54, info)):
        sizes = [*array.shape, 1, 1][: max(3, array.ndim)]
        content = np.array([magic, array.ndim, *sizes], dtype="<i4").tobytes() + array.tobytes()
        name = f"smallnorb-5x46789x9x18x6x2x96x96-{kind}-{part}.mat" + (".gz" if zipped else "")
        (root / name).write_bytes(gzip.compress(content) if zipped else content)
