"""The command `peft-ext`: one subcommand per job."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="peft-ext", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    from .conversion import cli as convert
    from .knockout import cli as flow

    jobs: dict[str, Any] = {"convert": convert, "flow": flow}
    for name, job in jobs.items():
        job.add_arguments(commands.add_parser(name, help=job.SUMMARY, description=job.DESCRIPTION))
    options = parser.parse_args(argv)
    try:
        return jobs[options.command].run(options)
    except (TypeError, ValueError, OSError) as error:
        print(f"peft-ext {options.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
