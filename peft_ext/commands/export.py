"""`peft-ext export`: an adapter as a LoRA or as a sparse patch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


DESCRIPTION = (
    "--to lora: a LoRA for vLLM, TGI, llama.cpp and whatever else knows no other adapters. It is exact where the "
    "trained entries lie in few enough columns or rows; otherwise it is the nearest one, and the error is printed. "
    "--to patch: names of the checkpoint's tensors, positions and new values, for vLLM's sparse weight updates or "
    "`peft-ext merge BASE PATCH OUT`."
)
EXAMPLE = """example:
  peft-ext export my-adapter my-lora --to lora --rank 64
  peft-ext export my-adapter my-patch --to patch --base meta-llama/Llama-3.2-1B"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    parser.add_argument("adapter", help="folder or Hub id of the adapter")
    parser.add_argument("out", type=Path, help="folder to write to, new or empty")
    parser.add_argument("--to", choices=("lora", "patch"), required=True, help="what to write")
    parser.add_argument("--rank", type=int, default=64, help="lora: the largest rank allowed (default: %(default)s)")
    parser.add_argument(
        "--biases",
        choices=("refuse", "drop", "lora_bias"),
        default="refuse",
        help="lora: what to do with trained biases (default: %(default)s)",
    )
    parser.add_argument("--base", help="patch: the base model; by default the one that the adapter names")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    return _patch(options) if options.to == "patch" else _lora(options)


def _patch(options: argparse.Namespace) -> int:
    from ..export.adapter import AdapterFile
    from ..export.merging import export_patch

    with AdapterFile(options.adapter) as adapter:
        base = options.base or adapter.config.base_model_name_or_path
    if not base:
        raise ValueError(f"{options.adapter} does not name its base model; pass it as --base.")
    count = export_patch(options.adapter, base, options.out)
    report = f"{options.out}/patch.safetensors: new values for {count:,} numbers of {base}"
    print(json.dumps({"numbers": count, "base": str(base)}) if options.json else report)
    return 0


def _lora(options: argparse.Namespace) -> int:
    from ..export.lora import export_lora

    found = export_lora(options.adapter, options.out, options.rank, options.biases)
    if options.json:
        print(json.dumps(vars(found), indent=2))
        return 0
    needed = max(found.exact_ranks.values(), default=0)
    if not found.errors:
        print(f"{options.out}: a LoRA of rank {found.rank}, exact")
    else:
        worst = max(found.errors, key=lambda name: found.errors[name])
        print(
            f"{options.out}: a LoRA of rank {found.rank}, not exact (that takes rank {needed}): the updates differ "
            f"by {found.error:.1%} of their norm, '{worst}' by {found.errors[worst]:.1%}. Train with column_budget "
            "to get an exact one, or merge."
        )
    for note in found.notes:
        print(f"note: {note}")
    return 0
