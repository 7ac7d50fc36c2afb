"""
Compare peft_ext with the papers' published code.

    python examples/oracles.py CODE

CODE is a folder with clones of the repositories; nothing is fetched. Those that are missing are left out, with a line
that says so. Takes some seconds on a CPU.

    git clone https://github.com/FightingFighting/NeuroAda
    git clone https://github.com/FightingFighting/GPS
    git clone https://github.com/FightingFighting/cross-modal-information-flow-in-MLLM
    git clone https://github.com/stanfordnlp/pyreft
    git clone https://github.com/Cranial-XIX/FAMO
    git clone https://github.com/AvivNavon/nash-mtl
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from _oracles import directions, entries, states
from _oracles.loading import Missing, Row


COMPARISONS = (
    entries.neuroada,
    entries.gps,
    entries.contrastive,
    states.steering,
    states.knockout,
    directions.same_directions,
    directions.random_directions,
    directions.nash,
    directions.famo,
)


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| peft_ext | published code | compared | result |", "|---|---|---|---|"]
    lines += [f"| {row.method} | {row.published} | {row.compared} | {row.result} |" for row in rows]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("code", type=Path, help="folder with clones of the repositories")
    parser.add_argument("--out", type=Path, help="file to write the table to, too")
    options = parser.parse_args(argv)
    if not options.code.is_dir():
        parser.error(f"code: {options.code} is no folder; clone the repositories into one, see above")
    rows, missing = [], []
    for compare in COMPARISONS:
        try:
            rows += compare(options.code)
        except Missing as reason:
            missing.append(f"Left out: {reason}.")
    if rows:
        print(table(rows))
    print("\n".join(missing))
    if options.out is not None:
        options.out.write_text(table(rows) + "\n", encoding="utf-8")
    return 0 if rows else 1


if __name__ == "__main__":
    raise SystemExit(main())
