"""
Compose every language model with every vision tower and connector at a tiny size, and write the table of the docs.

    python examples/llava_combinations.py --docs docs/llava-factory.md --out combinations.json

Each combination is composed, trained for five steps on one batch until its loss falls, saved, and loaded again with
transformers' Auto classes; the loaded model's logits equal the saved one's bit for bit. About five minutes on a core.
A call with the same `--out` goes on where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import transformers
from _factory.check import check
from _factory.parts import CONNECTORS, TEXT_MODELS, TOWERS
from tqdm import tqdm

from peft_ext.io import write_atomically


BEGIN, END = "<!-- combinations: begin -->", "<!-- combinations: end -->"


def markdown(results: dict[tuple[str, str, str], str]) -> str:
    """A row for each language model, a column for each tower; what a letter stands for is said below."""
    texts, towers = (list(dict.fromkeys(key[place] for key in results)) for place in (0, 1))
    meanings: dict[str, str] = {}
    lines = [f"| | {' | '.join(towers)} |", "|---" * (len(towers) + 1) + "|"]
    for text in texts:
        letters = []
        for vision in towers:
            meaning = _meaning({name: results[text, vision, name] for name in CONNECTORS})
            letters.append(meanings.setdefault(meaning, chr(ord("A") + len(meanings))))
        lines.append(f"| {text} | {' | '.join(letters)} |")
    lines.append("")
    lines += [f"- **{letter}**: {meaning}" for meaning, letter in meanings.items()]
    good = sum(result in ("llava", "own") for result in results.values())
    return "\n".join([*lines, "", f"{good} of {len(results)} combinations compose."])


def _meaning(kinds: dict[str, str]) -> str:
    """What became of a language model and a tower with each connector."""
    own, native = ([name for name, result in kinds.items() if result == kind] for kind in ("own", "llava"))
    words = [f"`llava` with {', '.join(native)}"] if native else []
    words += [f"`llava_factory` with {', '.join(own)}"] if own else []
    words += [f"refused with {name}: {result}" for name, result in kinds.items() if result not in ("own", "llava")]
    return "; ".join(words)


def main(argv: Sequence[str] | None = None) -> dict[tuple[str, str, str], str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-models", nargs="+", default=list(TEXT_MODELS), choices=TEXT_MODELS)
    parser.add_argument("--towers", nargs="+", default=list(TOWERS), choices=TOWERS)
    parser.add_argument("--docs", type=Path, help="Markdown file whose table is replaced")
    parser.add_argument("--out", type=Path, help="JSON file of results, continued if it is there")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    jobs = [(text, vision, name) for text in options.text_models for vision in options.towers for name in CONNECTORS]
    done = json.loads(options.out.read_text(encoding="utf-8")) if options.out and options.out.exists() else {}
    for job in tqdm([job for job in jobs if ", ".join(job) not in done]):
        with tempfile.TemporaryDirectory() as folder:
            done[", ".join(job)] = check(*job, Path(folder))
        if options.out is not None:
            write_atomically(str(options.out), json.dumps(done, indent=1) + "\n")
    results = {job: done[", ".join(job)] for job in jobs}
    table = markdown(results)
    if options.docs is not None:
        before, _, rest = options.docs.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        options.docs.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
    print(table)
    return results


if __name__ == "__main__":
    main()
