"""Losses and gradients computed on the side, without a trace in the training that goes on."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...preserve import preserved
from ..aggregators.base import Array
from ..conflicts.recorder import cosines_of
from ..data.collation import SOURCE, Source, halves_of
from .task_gradients import TaskGradients


@contextmanager
def undisturbed(model: nn.Module, collator: Any) -> Iterator[None]:
    """[`preserved`] in training mode, which leaves a collator's own random streams as they were too."""
    own = dict(getattr(collator, "__dict__", {}))
    own_streams = [(value, _state_of(value)) for value in own.values()]
    try:
        with preserved(model, training=True):
            yield
    finally:
        if hasattr(collator, "__dict__"):
            collator.__dict__.clear()  # some make their stream when they are first called
            collator.__dict__.update(own)
        for stream, state in own_streams:
            _set_state(stream, state)


def _state_of(stream: Any) -> Any:
    """State of a random stream; `None` for anything else."""
    if isinstance(stream, torch.Generator):
        return stream.get_state()
    if isinstance(stream, np.random.Generator):
        return stream.bit_generator.state
    return stream.getstate() if isinstance(stream, random.Random) else None


def _set_state(stream: Any, state: Any) -> None:
    if isinstance(stream, torch.Generator):
        stream.set_state(state)
    elif isinstance(stream, np.random.Generator):
        stream.bit_generator.state = state
    elif isinstance(stream, random.Random):
        stream.setstate(state)


@contextmanager
def unlogged(trainer: Any) -> Iterator[None]:
    """
    Keep what a trainer's `compute_loss` counts, as SFTTrainer's does, out of the logs and within this process: others
    may not compute as many losses.
    """
    names = ("_metrics", "_total_train_tokens")
    before = {name: copy.deepcopy(getattr(trainer, name)) for name in names if hasattr(trainer, name)}
    try:
        with gathering(trainer.accelerator, lambda values, *args, **kwargs: values):
            yield
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)


@contextmanager
def unheard(trainer: Any) -> Iterator[None]:
    """Count zero in what a trainer's `compute_loss` sums over processes: the pass stands in for another process's."""
    gather = trainer.accelerator.gather_for_metrics
    with gathering(
        trainer.accelerator, lambda values, *args, **kwargs: gather(torch.zeros_like(values), *args, **kwargs)
    ):
        yield


@contextmanager
def gathering(accelerator: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Let `function` gather metrics."""
    before = vars(accelerator).get("gather_for_metrics")
    accelerator.gather_for_metrics = function
    try:
        yield
    finally:
        del accelerator.gather_for_metrics
        if before is not None:
            accelerator.gather_for_metrics = before


def collect_rows(store: TaskGradients, losses: Iterable[tuple[int, Tensor]]) -> None:
    """
    One backward pass per loss, into the row of the given number. Losses of one forward pass come one after another;
    its graph is freed with the last reference to them.
    """
    for row, loss in losses:
        loss.backward(retain_graph=True)
        store.collect(row)


def cosines_of_halves(gradients: TaskGradients, losses: Iterable[tuple[int, Tensor]]) -> Array:
    """
    Cosines between the gradients of two halves of each task's batch, over the parameters that `gradients` shares,
    `[tasks]`. Losses come with the row `2 * task + half`.
    """
    parameters = dict(zip(gradients.names, gradients.parameters, strict=True))
    store = TaskGradients(parameters, 2 * gradients.num_tasks, dtype=gradients.dtype)
    store.shared, store.fixed = list(gradients.shared), True
    collect_rows(store, losses)
    store.reduce()
    cosines = cosines_of(store.gramian()[0])
    return np.array([cosines[2 * task, 2 * task + 1] for task in range(gradients.num_tasks)])


def noise_floor(trainer: Any, model: nn.Module, source: Source | None) -> Array:
    """
    Cosine between the gradients of two halves of each task's last micro-batch, float64 `[tasks]`; NaN for a task
    without samples in both halves. The training goes on as if nothing had been measured.

    Raises:
        `ValueError`: if the samples are not known.
    """
    if source is None or source.samples is None:
        raise ValueError(
            f"noise_floor_steps={trainer.args.noise_floor_steps} collates the halves of a batch's samples, and this "
            "batch came without them. Set it to 0; or let the data set give single samples, and collate with "
            "trainer.task_collator() in a data loader of your own."
        )
    bare = trainer.accelerator.unwrap_model(model)
    with unlogged(trainer), undisturbed(bare, trainer.data_collator):
        return cosines_of_halves(trainer.mtl_state.gradients, _losses_of_halves(trainer, bare, source))


def _losses_of_halves(trainer: Any, model: nn.Module, source: Source) -> Iterator[tuple[int, Tensor]]:
    """Row `2 * task + half`, and the loss."""
    collate, step = trainer.task_collator(), trainer.step_losses
    for halves in _halves(source, trainer.task_data.splits):
        for half, samples in enumerate(halves if halves[1] else ()):
            piece = trainer._prepare_inputs(collate(samples))
            window = step.window.of_one(trainer.task_counts.of(piece, piece.pop(SOURCE, None)))
            for task, loss, _, _ in trainer.passes.losses(model, piece, window, 0):
                yield 2 * task + half, loss


def _halves(source: Source, by_task: bool) -> list[Sequence[Sequence[Any]]]:
    """Pairs of halves: of each task's samples alone, or of all with every task's samples cut in two."""
    assert source.samples is not None
    if source.tasks is None:
        return [halves_of(source.samples)]
    pairs = [halves_of(samples) for samples in source.by_task().values()]
    return list(pairs) if by_task else [[list(chain(*halves)) for halves in zip(*pairs, strict=True)]]
