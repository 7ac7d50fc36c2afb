"""The command `peft-ext`: one subcommand per job."""

from __future__ import annotations

import argparse
import importlib
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from ._version import __version__
from .extras import MissingExtra


# A file of `commands` each, and what it does.
JOBS = {
    "train": "train any PEFT method with a trainer of TRL, from a YAML file",
    "eval": "evaluate adapters with lm_eval, classifiers on GLUE with evaluate",
    "inspect": "show what adapters train: entries, norms, and what they share",
    "merge": "merge an adapter into a checkpoint's files, without loading the model",
    "export": "write an adapter as a LoRA or as a sparse patch of the checkpoint",
    "convert": "turn a SHiRA or Super-Tuning adapter into a NeuroAda adapter",
    "llava": "compose a LLaVA, train it in two stages by any method, evaluate it",
    "flow": "where information flows in a vision-language model",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    wanted = next((argument for argument in arguments if argument != "--"), None)
    try:
        return _run(arguments, wanted)
    except (MissingExtra, TypeError, ValueError, OSError) as error:
        print(f"peft-ext {wanted}: {error}", file=sys.stderr)
        return 1


def _run(arguments: list[str], wanted: str | None) -> int:
    parser = argparse.ArgumentParser(prog="peft-ext", description=__doc__)
    parser.add_argument("--version", action="version", version=f"peft-ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    job: Any = None
    for name, summary in JOBS.items():
        command = commands.add_parser(name, help=summary)
        if name == wanted:
            job = importlib.import_module(f".commands.{name}", __package__)
            command.description, command.epilog = textwrap.fill(job.DESCRIPTION, 79), job.EXAMPLE
            command.formatter_class = argparse.RawDescriptionHelpFormatter
            job.add_arguments(command)
    options, further = parser.parse_known_args(arguments)
    options.further = further
    if further and not hasattr(job, "TAKES_FURTHER_OPTIONS"):
        parser.error(f"unrecognized arguments: {' '.join(further)}")
    importlib.import_module(".api", __package__)  # a job needs our methods registered; torch takes seconds to import
    return job.run(options)


if __name__ == "__main__":
    sys.exit(main())
