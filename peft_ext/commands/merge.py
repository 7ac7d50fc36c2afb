"""`peft-ext merge`: an adapter merged into a checkpoint's files, or taken out again."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path


DESCRIPTION = (
    "Write a checkpoint with a sparse adapter merged in, shard by shard: one tensor is in memory at a time, and the "
    "tensors are bit for bit those of merge_and_unload() in the checkpoint's dtype. The result loads in plain "
    "transformers. What was replaced is kept beside the weights, in peft_ext_merge.originals, for --revert."
)
EXAMPLE = """example:
  peft-ext merge meta-llama/Llama-3.2-1B my-adapter merged
  peft-ext merge merged my-adapter restored --revert"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    parser.add_argument("base", help="folder or Hub id of the base model; with --revert, the folder to take out of")
    parser.add_argument("adapter", help="folder or Hub id of the adapter, or the file of a patch")
    parser.add_argument("out", type=Path, help="folder to write to, new or empty")
    parser.add_argument("--revert", action="store_true", help="take the adapter out again: every bit as before")
    parser.add_argument(
        "--another-base", action="store_true", help="merge into another base model of the same shapes, on purpose"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from ..export.merging import merge_checkpoint, revert_checkpoint
    from ..sparse.another_base import another_base

    work = revert_checkpoint if options.revert else merge_checkpoint
    with another_base() if options.another_base else nullcontext():
        changed = work(options.base, options.adapter, options.out)
    print(f"{options.out}: {changed:,} numbers {'put back' if options.revert else 'replaced'}")
    return 0
