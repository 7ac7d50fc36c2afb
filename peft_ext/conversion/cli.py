"""`peft-ext convert`: an adapter's folder in, a converted one out."""

from __future__ import annotations

import argparse
from typing import Any

import transformers
from peft import PeftConfig
from transformers import AutoConfig

from .convert import convert
from .peers import check_convertible


SUMMARY = "turn a SHiRA or Super-Tuning adapter into a NeuroAda adapter"
DESCRIPTION = (
    "Load an adapter of SHiRA or Super-Tuning onto its base model, and save it as one of NeuroAda that computes the "
    "same."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    parser.add_argument("adapter", help="folder or Hub id of the adapter")
    parser.add_argument("out", help="folder to write to")
    parser.add_argument("--base", help="folder or Hub id of the base model; by default the one that the adapter names")
    parser.add_argument("--dtype", default="auto", help="dtype to load the base model in (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    config = PeftConfig.from_pretrained(options.adapter)
    check_convertible("default", config)
    base = options.base or config.base_model_name_or_path
    if not base:
        raise ValueError(f"{options.adapter} does not name its base model; pass it as --base.")
    model = convert(options.adapter, _model_class(base).from_pretrained(base, dtype=options.dtype))
    model.save_pretrained(options.out)
    entries = sum(parameter.numel() for name, parameter in model.named_parameters() if "neuroada_delta" in name)
    print(f"{options.out}: a NeuroAda adapter of {entries:,} entries")
    return 0


def _model_class(base: str) -> Any:
    """The class that a model was saved as."""
    architectures = AutoConfig.from_pretrained(base).architectures or ["none"]
    if not hasattr(transformers, architectures[0]):
        raise ValueError(f"--base {base}: its architecture {architectures[0]!r} is none of transformers'.")
    return getattr(transformers, architectures[0])
