"""Read an image as a viewer shows it: upright, opaque, in RGB; or say why it cannot be read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from io import BytesIO
from typing import Any

import numpy as np

from ...extras import needs


def open_image(image: Any) -> Any:
    """
    A PIL image in RGB.

    As transformers' `load_image` does, it turns the image as EXIF says and takes the first frame of several. What
    that does not: 16-bit grey is scaled to 8 bits instead of clipped to white, and transparent parts become white, as
    in a viewer, instead of the colour that the file hides under them.

    Args:
        image (`Any`): a path, a PIL image, or `{"bytes": …, "path": …}`, as data sets hold it.

    Raises:
        `ValueError`: naming the image and the reason. Files raise nothing else, however broken they are.
    """
    with needs("vlm"):
        from PIL import Image

    name, source = _source(image)
    try:
        opened: AbstractContextManager[Any] = nullcontext(source)
        if not isinstance(source, Image.Image):
            opened = Image.open(source)
        with opened as picture:
            return _as_shown(picture)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: {error} Shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it.") from error
    except Exception as error:  # decoders raise whatever a broken file makes them stumble over
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        raise ValueError(f"{name} cannot be read as an image: {kind}{error}") from error


def _source(image: Any) -> tuple[str, Any]:
    """Name of the image, and its source as Pillow opens it."""
    from PIL import Image

    if isinstance(image, Mapping) and image.get("bytes") is not None:
        return str(image.get("path") or "the image"), BytesIO(image["bytes"])
    if isinstance(image, Mapping):
        image = image.get("path")
    if isinstance(image, Image.Image):
        return str(getattr(image, "filename", "") or "the image"), image
    if not isinstance(image, (str, os.PathLike)):
        raise ValueError(f"the image is a {type(image).__name__}: must be a path or a PIL image.")
    if not os.path.isfile(image):  # a pipe would be waited for
        raise ValueError(
            f"{image} is {'not a file' if os.path.exists(image) else 'not there'}: must be an image file."
        )
    return str(image), image


def _as_shown(picture: Any) -> Any:
    from PIL import Image, ImageOps

    of_16_bits = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))
    if picture.mode in ("I", "F") and not of_16_bits:
        raise ValueError(f"its pixels are numbers of unknown range (mode {picture.mode}): save it with 8 or 16 bits.")
    clear = picture.info.get("transparency")
    picture = ImageOps.exif_transpose(picture)
    if of_16_bits:
        values = np.asarray(picture)
        picture = Image.fromarray(((values.astype(np.int32) + 128) // 257).astype(np.uint8))
        if clear is not None:  # one grey is transparent
            picture.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    if clear is not None or picture.mode[-1] in "Aa":
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")
