"""`peft-ext convert`: an adapter's folder in, a converted one out."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import transformers
from peft.utils import CONFIG_NAME
from transformers import AutoConfig

from ..export.folder import filled_at_once
from .convert import convert
from .folder import read_config


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
