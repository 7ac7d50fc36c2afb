"""The command `peft-ext`: one subcommand per job."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="peft-ext", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    from .knockout import cli as flow

    flow.add_arguments(commands.add_parser("flow", help=flow.SUMMARY, description=flow.DESCRIPTION))
    options = parser.parse_args(argv)
    try:
        return flow.run(options)
    except (ValueError, OSError) as error:
        print(f"peft-ext {options.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
