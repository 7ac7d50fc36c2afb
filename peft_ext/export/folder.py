"""A folder that is filled as a whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def filled_at_once(out: Path, last: str) -> Iterator[Path]:
    """
    A folder to write into, whose files are moved to `out` at the end. So an error or an interruption leaves nothing
    half done there. The file `last` is moved last, since others know by it that the folder is complete.

    Raises `ValueError` if nothing can be written there, before any work is done.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "has files in it" if out.is_dir() else "is a file"
        raise ValueError(f"out={str(out)!r} {what}; pass a new or empty folder.")
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    try:
        temporary = tempfile.TemporaryDirectory(prefix=".peft-ext-", dir=nearest)
    except OSError as error:
        raise ValueError(f"out={str(out)!r} cannot be written to ({error}); pass another folder.") from error
    with temporary as folder:
        yield Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        for name in sorted(os.listdir(folder), key=lambda name: name == last):
            os.replace(os.path.join(folder, name), out / name)
