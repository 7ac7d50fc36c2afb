"""Arguments of the benchmarks, refused before anything is measured: what to pass as `type=` to `add_argument`."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def at_least(least: int) -> Callable[[str], int]:
    """Type of a whole number that is not smaller."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}: pass one")
        return value

    return parse


positive = at_least(1)


def device_name(text: str) -> str:
    """Type of the name of a device that is here: `cpu`, `cuda` or `cuda:<n>`."""
    try:
        kind, index = torch.device(text).type, torch.device(text).index
    except RuntimeError:
        kind, index = "unknown", None
    if kind not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is no device: pass cpu, cuda or cuda:<n>")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and not count:
        raise argparse.ArgumentTypeError(f"{text!r} asks for a CUDA device, of which torch sees none: pass cpu")
    if kind == "cuda" and (index or 0) >= count:
        raise argparse.ArgumentTypeError(f"{text!r} is not among the CUDA devices here: pass cuda:<n> below {count}")
    return text


def out_file(text: str) -> Path:
    """Type of a file that can be written, in a folder that need not exist yet. Nothing is made here."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder: pass the name of a file")
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        reason = f"nothing can be written in {str(nearest)!r} ({error.strerror})"
        raise argparse.ArgumentTypeError(f"{text!r}: {reason}: pass a file elsewhere") from error
    return path


@contextmanager
def refusing(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Around checks of arguments: a `ValueError` ends the script with its message, as a wrong type does."""
    try:
        yield
    except ValueError as error:
        parser.error(str(error))
