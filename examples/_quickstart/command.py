"""What the commands that compare methods do alike: parse, and keep libraries quiet."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

import transformers


def parser_for(documentation: str | None, out: str) -> argparse.ArgumentParser:
    """A parser with an option for the folder of results. The usage in a script's documentation is shown last."""
    description, _, usage = (documentation or "").strip().partition("\n\n")
    options = argparse.ArgumentParser(
        description=description, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, default=Path(out), help="folder for results [%(default)s]")
    return options


def check_counts(options: argparse.ArgumentParser, chosen: argparse.Namespace, names: Sequence[str]) -> None:
    """End the command where one of the numbers is not positive."""
    for name in names:
        value = getattr(chosen, name)
        if value is not None and value < 1:
            options.error(f"--{name.replace('_', '-')} is {value}: must be at least 1")


def begin(out: Path) -> None:
    """Make the folder, and silence what transformers and PEFT tell about nothing that is done here."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="Sparse invariant checks")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
