"""`peft-ext convert`: an adapter's folder in, a converted one out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from peft.utils import CONFIG_NAME
from transformers import AutoConfig

from ..export.folder import filled_at_once
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
    with filled_at_once(options.out, last=CONFIG_NAME) as folder:
        model = convert(options.adapter, _base_model(base, options.dtype))
        model.save_pretrained(str(folder))
    entries = sum(parameter.numel() for name, parameter in model.named_parameters() if "neuroada_delta" in name)
    print(f"{options.out}: a NeuroAda adapter of {entries:,} entries")
    return 0


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
