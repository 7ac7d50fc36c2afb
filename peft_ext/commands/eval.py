"""`peft-ext eval`: from adapters to a table of scores."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from ..extras import needs


DESCRIPTION = (
    "Evaluate adapters of any PEFT method. Language models answer tasks of lm_eval, its own (hellaswag, gsm8k, …) or "
    "LLM-Adapters' (llm_adapters_commonsense, llm_adapters_boolq, llm_adapters_arithmetic, …). Classifiers "
    "(task_type SEQ_CLS) are scored on GLUE (cola, sst2, mrpc, …) by evaluate. Needs the extra eval."
)
EXAMPLE = """example:
  peft-ext eval my-adapter another-adapter --before --tasks hellaswag arc_easy
  peft-ext eval my-adapter --tasks llm_adapters_boolq --data LLM-Adapters/dataset
  peft-ext eval my-classifier --tasks mrpc rte --data glue     # glue/mrpc/validation.jsonl, …"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    parser.add_argument("adapters", nargs="+", metavar="adapter", help="folder or Hub id of an adapter")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="names of tasks or of groups")
    parser.add_argument("--data", help="folder of the data sets, for LLM-Adapters' tasks and GLUE without the Hub")
    parser.add_argument("--base", help="the base model; by default the one that the adapters name")
    parser.add_argument("--before", action="store_true", help="evaluate the base without an adapter, too")
    parser.add_argument("--limit", type=int, help="samples per task at most, to try the command out")
    parser.add_argument("--batch-size", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--device", help="such as cuda:0 or cpu (default: a GPU if there is one)")
    parser.add_argument("--dtype", default="auto", help="of the base (default: the checkpoint's)")
    parser.add_argument("--model-args", default="", help="more for lm_eval's model, such as load_in_4bit=True")
    parser.add_argument("--include-path", help="folder with task files of your own for lm_eval")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    import torch

    from ..evaluation.adapters import adapters_of

    with needs("eval"):
        from ..evaluation import classifiers, language

    base, task_type = adapters_of(options.adapters, options.base)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    evaluate_all = classifiers.evaluate_adapters if task_type == "SEQ_CLS" else language.evaluate_adapters
    results = evaluate_all(base, options)
    if results:  # of several processes, the first has them
        print(json.dumps(results, indent=2) if options.json else table(results))
    return 0


def table(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """
    A Markdown table, one line per task and metric, one column per model.

    Args:
        results (`dict`): per model and task, metrics by name, and `<metric>_stderr` where it is known.
    """
    lines = [["task", "metric", *results]]
    for task, metrics in next(iter(results.values())).items():
        for name in metrics:
            if not name.endswith("_stderr"):
                lines.append([task, name, *(_cell(found[task], name) for found in results.values())])
    lines.insert(1, ["---", "---", *["---:"] * len(results)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(found: Mapping[str, Any], name: str) -> str:
    error = found.get(f"{name}_stderr")
    return f"{found[name]:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")
