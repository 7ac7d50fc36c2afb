"""Images are read as a viewer shows them, or refused with the reason."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from peft_ext.knockout.prompts.images import open_image


RAMP = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # 257 is one step of 8 bits


def picture(mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def saved(image, kind, **options):
    """As data sets hold it."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


ORDINARY = [
    "JPEG RGB",
    "JPEG L",
    "JPEG CMYK",
    "PNG RGB",
    "PNG P",
    "PNG 1",
    "GIF P",
    "BMP RGB",
    "WEBP RGB",
    "TIFF CMYK",
]


def as_transformers_loads(made):
    with Image.open(io.BytesIO(made["bytes"])) as opened:
        return np.asarray(load_image(opened))


@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_images_are_as_transformers_loads_them(kind):
    made = saved(picture(kind.split()[1]), kind.split()[0])
    found = open_image(made)
    assert found.mode == "RGB" and np.array_equal(np.asarray(found), as_transformers_loads(made))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_images_are_upright(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    made = saved(picture(), kind, exif=exif)
    found = open_image(made)
    assert found.size == ((8, 6) if orientation < 5 else (6, 8))
    assert np.array_equal(np.asarray(found), as_transformers_loads(made))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bits_are_scaled(kind):
    found = np.asarray(open_image(saved(Image.fromarray(RAMP), kind)))
    assert np.array_equal(found, np.arange(256).reshape(16, 16, 1).repeat(3, 2))


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bits_in_either_order(order):
    values = RAMP.astype(f"{order}u2")
    image = Image.frombytes("I;16" if order == "<" else "I;16B", (16, 16), values.tobytes())
    assert np.array_equal(np.asarray(open_image(image))[..., 0].flatten(), np.arange(256))


def test_16_bits_round_to_the_nearest():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found = np.asarray(open_image(saved(Image.fromarray(values), "PNG")))[..., 0]
    assert np.array_equal(found, np.round(values / 65535 * 255))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa"])
def test_transparent_parts_are_white(mode):
    """As far as they are transparent: white over black by the share of alpha."""
    alpha = np.arange(0, 256, 17, dtype=np.uint8).reshape(2, 8)
    image = Image.fromarray(np.zeros((2, 8, 3), np.uint8))
    image.putalpha(Image.fromarray(alpha))
    found = np.asarray(open_image(image.convert(mode)))
    assert np.array_equal(found, (255 - alpha)[..., None].repeat(3, 2))


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (Image.fromarray(np.array([[7, 9]], np.uint8)), {"transparency": 7}),
        (Image.fromarray(np.array([[[7, 0, 0], [9, 9, 9]]], np.uint8)), {"transparency": (7, 0, 0)}),
        (Image.fromarray(np.array([[7, 9]], np.uint8)).convert("P"), {"transparency": 7}),
        (Image.fromarray(np.array([[7, 9 * 257]], np.uint16)), {"transparency": 7}),
    ],
    ids=["grey", "colour", "palette", "16 bits"],
)
def test_a_colour_that_stands_for_transparent_is_white(image, options):
    found = np.asarray(open_image(saved(image, "PNG", **options)))[0]
    assert found[0].tolist() == [255, 255, 255] and found[1].tolist() == [9, 9, 9]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_taken(kind):
    first, second = (Image.new("RGB", (8, 6), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if kind == "WEBP" else {}
    found = open_image(saved(first, kind, save_all=True, append_images=[second], **options))
    assert found.getpixel((0, 0)) == (255, 0, 0)


def bomb():
    """A PNG of 200 megapixels in a few hundred kilobytes."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 20_000, 10_000, 1, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b""))]
    parts = [struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def nasty_files(folder):
    """Write files that are no usable images; returns their names, with a part of the reason for each."""
    whole = saved(picture().resize((64, 64)), "PNG")["bytes"]
    contents = {
        "empty.png": (b"", "cannot identify image"),
        "text.jpg": (b"404: not found", "cannot identify image"),
        "cut.png": (whole[: len(whole) // 2], "cannot be read as an image"),
        "cut.jpg": (saved(picture().resize((64, 64)), "JPEG")["bytes"][:700], "truncated"),
        "broken.png": (whole[:40] + b"\x00" * 20 + whole[60:], "cannot be read as an image"),
        "bomb.png": (bomb(), "raise PIL.Image.MAX_IMAGE_PIXELS"),
        "float.tiff": (saved(Image.new("F", (4, 4)), "TIFF")["bytes"], "of unknown range (mode F)"),
        "integers.tiff": (saved(Image.new("I", (4, 4)), "TIFF")["bytes"], "of unknown range (mode I)"),
        "vectors.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot identify image"),
        "pointer.png": (b"version https://git-lfs.github.com/spec/v1\n", "cannot identify image"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    (folder / "to_nowhere.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    return {name: reason for name, (_, reason) in contents.items()} | {
        "folder.png": "is not a file",
        "to_nowhere.png": "is not there",
        "pipe.png": "is not a file",
        "missing.png": "is not there",
    }


def test_bad_files_raise_one_kind_of_error_that_names_them(tmp_path):
    for name, reason in nasty_files(tmp_path).items():
        with pytest.raises(ValueError) as caught:
            open_image(tmp_path / name)
        assert name in str(caught.value) and reason in str(caught.value)


@pytest.mark.filterwarnings("ignore:::PIL")
def test_any_file_is_read_or_refused(tmp_path):
    """Each byte of a file set to other values, one after the other, and the file cut off there."""
    path, generator = tmp_path / "image", np.random.default_rng(0)
    outcomes = set()
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"):
        whole = np.frombuffer(saved(picture(), kind)["bytes"], dtype=np.uint8)
        for at in generator.choice(len(whole), min(25, len(whole)), replace=False):
            changed = whole.copy()
            changed[at] = generator.integers(256)
            for content in (changed, whole[:at]):
                path.write_bytes(content.tobytes())
                try:
                    outcomes.add(open_image(path).mode)
                except ValueError as error:
                    assert str(path) in str(error)
                    outcomes.add("refused")
    assert outcomes == {"RGB", "refused"}


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (None, "the image is a NoneType"),
        ({"bytes": None, "path": None}, "the image is a NoneType"),
        (np.zeros((4, 4, 3), np.uint8), "the image is a ndarray"),
        ([picture()], "the image is a list"),
        ("https://example.org/cat.png", "is not there"),
        ({"bytes": b"", "path": "cat.png"}, "cat.png cannot be read"),
    ],
    ids=["nothing", "no bytes", "array", "list", "address", "no image"],
)
def test_other_things_are_refused(image, reason):
    with pytest.raises(ValueError, match=reason):
        open_image(image)
