"""A picture inside a page."""

from __future__ import annotations

import base64
import io
from typing import Any


LONGEST = 448  # pixels along the longer side
_SMALL = 128 * 128  # pixels up to which a picture is kept as it is


def shrunk(picture: Any) -> Any:
    """A PIL image of at most 448 pixels along the longer side."""
    picture = picture.copy()
    picture.thumbnail((LONGEST, LONGEST))
    return picture


def data_uri(picture: Any) -> str:
    """A PIL image in RGB as the address of itself: small ones exactly, others as a JPEG."""
    small = picture.width * picture.height <= _SMALL
    buffer = io.BytesIO()
    picture.save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 80}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
