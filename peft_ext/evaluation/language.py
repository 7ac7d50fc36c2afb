"""Language models: tasks of lm_eval."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import simple_parse_args_string


def evaluate_adapters(base: str, options: Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """
    Per adapter and task, lm_eval's metrics and their standard errors; `options` are those of `peft-ext eval`.

    Raises `ValueError` if a task is not known or its data are missing, before a model is loaded.
    """
    manager = _manager(options)
    results = {}
    for adapter in [*([None] if options.before else []), *options.adapters]:
        arguments = {"pretrained": base, "dtype": options.dtype, **simple_parse_args_string(options.model_args)}
        if adapter is not None:
            arguments["peft"] = adapter
            if (Path(adapter) / "tokenizer_config.json").is_file():
                arguments.setdefault("tokenizer", adapter)
        found = simple_evaluate(
            model="hf",
            model_args=arguments,
            tasks=options.tasks,
            task_manager=manager,
            batch_size=options.batch_size,
            device=options.device,
            limit=options.limit,
            log_samples=False,
        )
        if found is not None:  # only the first of several processes has the results
            results[adapter or base] = {
                task: _metrics(metrics) for task, metrics in {**found["results"], **found.get("groups", {})}.items()
            }
    return results


def _manager(options: Namespace) -> TaskManager:
    """Ours alone where they suffice: lm_eval's own are thousands of files."""
    folders = [str(tasks_folder()), *([options.include_path] if options.include_path else [])]
    data = {"data": options.data} if options.data else {}
    for include_defaults in (False, True):
        manager = TaskManager(include_path=folders, include_defaults=include_defaults, metadata=data)
        unknown = [task for task in options.tasks if task not in manager.all_tasks]
        if not unknown:
            manager.load(list(options.tasks))
            return manager
    raise ValueError(f"--tasks {' '.join(unknown)}: lm_eval has no such task; `lm_eval ls tasks` lists them.")


def tasks_folder() -> Path:
    """The folder of LLM-Adapters' tasks: in the wheel beside this file, in a checkout among the examples."""
    here = Path(__file__).parent
    return next(path for path in (here / "tasks", here.parents[1] / "examples" / "eval") if path.is_dir())


def _metrics(found: dict[str, Any]) -> dict[str, Any]:
    """`acc` and `acc_stderr` of `acc,none` and `acc_stderr,none`; other filters stay in the name."""
    return {
        name.removesuffix(",none"): value
        for name, value in found.items()
        if "," in name and isinstance(value, (int, float))
    }
