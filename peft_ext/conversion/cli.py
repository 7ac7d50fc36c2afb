"""`peft-ext convert`: an adapter's folder in, a converted one out."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft.utils import CONFIG_NAME
from transformers import AutoConfig

from .convert import convert
from .folder import read_config


DESCRIPTION = (
    "Load an adapter of SHiRA or Super-Tuning onto its base model, and save it as one of NeuroAda that computes the "
    "same."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    parser.add_argument("adapter", help="folder or Hub id of the adapter")
    parser.add_argument("out", type=Path, help="folder to write to, new or empty")
    parser.add_argument("--base", help="folder or Hub id of the base model; by default the one that the adapter names")
    parser.add_argument("--dtype", default="auto", help="dtype to load the base model in (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    config = read_config(options.adapter)
    base = options.base or config.base_model_name_or_path
    if not base:
        raise ValueError(f"{options.adapter} does not name its base model; pass it as --base.")
    with _filled_at_once(options.out) as folder:
        model = convert(options.adapter, _base_model(base, options.dtype))
        model.save_pretrained(folder)
    entries = sum(parameter.numel() for name, parameter in model.named_parameters() if "neuroada_delta" in name)
    print(f"{options.out}: a NeuroAda adapter of {entries:,} entries")
    return 0


@contextmanager
def _filled_at_once(out: Path) -> Iterator[str]:
    """
    A folder to write into, whose files are moved to `out` at the end, the one that makes them an adapter last. So an
    error or an interruption leaves no half adapter there.

    Raises:
        `ValueError`: if nothing can be written there, before any work is done.
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
        yield folder
        out.mkdir(parents=True, exist_ok=True)
        for name in sorted(os.listdir(folder), key=lambda name: name == CONFIG_NAME):
            os.replace(os.path.join(folder, name), out / name)


def _base_model(base: str, dtype: str) -> Any:
    """
    A model, as the class that it was saved as.

    Raises:
        `ValueError`: if there is no such model or dtype.
    """
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"--dtype {dtype} is no dtype: pass auto, float32, bfloat16 or another of torch's.")
    try:
        architectures = AutoConfig.from_pretrained(base).architectures or ["none"]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--base {base}: no model that can be read ({error}). Pass the folder or Hub id of the model that the "
            "adapter was trained on."
        ) from error
    if not hasattr(transformers, architectures[0]):
        raise ValueError(f"--base {base}: its architecture {architectures[0]!r} is none of transformers'.")
    return getattr(transformers, architectures[0]).from_pretrained(base, dtype=dtype)
