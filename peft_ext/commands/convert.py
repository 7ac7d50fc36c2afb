"""`peft-ext convert`: an adapter's folder in, a converted one out."""

from __future__ import annotations

import argparse
from pathlib import Path


DESCRIPTION = (
    "Load an adapter of SHiRA or Super-Tuning onto its base model, and save it as one of NeuroAda that computes the "
    "same."
)
EXAMPLE = """example:
  peft-ext convert my-shira-adapter my-neuroada-adapter"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    parser.add_argument("adapter", help="folder or Hub id of the adapter")
    parser.add_argument("out", type=Path, help="folder to write to, new or empty")
    parser.add_argument("--base", help="folder or Hub id of the base model; by default the one that the adapter names")
    parser.add_argument("--dtype", default="auto", help="dtype to load the base model in (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from ..conversion.cli import run

    return run(options)
