"""`peft-ext inspect`: what is in adapters' files."""

from __future__ import annotations

import argparse
import json


DESCRIPTION = (
    "Read the files of one adapter or several, without the base model: method, base, entries and their share of each "
    "module's weights, 2-norm and largest magnitude of the values, and the entries that each two adapters share."
)
EXAMPLE = """example:
  peft-ext inspect my-adapter
  peft-ext inspect first-adapter second-adapter --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    parser.add_argument("adapters", nargs="+", metavar="adapter", help="folder or Hub id of an adapter")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from ..export.inspecting import inspect_adapters

    found = inspect_adapters(options.adapters)
    print(json.dumps(found.as_dict(), indent=2) if options.json else found)
    return 0
