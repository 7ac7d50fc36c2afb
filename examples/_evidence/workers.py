"""Runs in processes of one thread each, which keep more of two cores busy than one process of two threads."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from _experiment.plan import Ledger
from tqdm.auto import tqdm


class Workers:
    """
    Trains what a ledger has not, and adds each record as it comes.

    Args:
        jobs (`int`): processes; 1 trains in this one.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self.jobs > 1:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(self.jobs, context, initializer=prepare)
        else:
            prepare()
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def train(self, runs: Sequence[Any], execute: Callable[[Any], dict[str, Any]], ledger: Ledger, title: str) -> None:
        """`execute` each run that is not in the ledger; a run that is wanted twice, once."""
        missing = [run for run in dict.fromkeys(runs) if ledger.find(run) is None]
        if not missing:
            return
        with tqdm(total=len(missing), desc=title, smoothing=0.05) as progress:
            for record in self._records(missing, execute):
                ledger.add(record)
                progress.update()

    def _records(self, runs: list[Any], execute: Callable[[Any], dict[str, Any]]) -> Iterator[dict[str, Any]]:
        if self.pool is None:
            yield from map(execute, runs)
            return
        futures = [self.pool.submit(execute, run) for run in runs]
        for future in as_completed(futures):
            yield future.result()


def prepare() -> None:
    """One thread, and quiet libraries."""
    import transformers

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
