"""How often gradients conflict by chance: those of two halves of one task's batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn

from ..aggregators.base import Array
from ..data.collation import SOURCE, Source, halves_of
from .probe import collect_rows, cosines_of_halves, undisturbed, unlogged
from .task_gradients import TaskGradients


def noise_floor(trainer: Any, model: nn.Module, source: Source | None) -> Array:
    """
    Cosine between the gradients of two halves of each task's last micro-batch.

    Args:
        trainer ([`MTLTrainerMixin`]): whose training goes on as if nothing had been measured.
        model (`nn.Module`): the model as the trainer wraps it.
        source ([`Source`], *optional*): the samples of the micro-batch.

    Returns:
        float64 `[tasks]`; NaN for a task without samples in both halves.

    Raises:
        `ValueError`: if the samples are not known.
    """
    if source is None or source.samples is None:
        raise ValueError(
            f"noise_floor_steps={trainer.args.noise_floor_steps} collates the halves of a batch's samples, and this "
            "batch came without them. Set it to 0; or let the data set give single samples, and collate with "
            "trainer.task_collator() in a data loader of your own."
        )
    bare, gradients = trainer.accelerator.unwrap_model(model), trainer.mtl_state.gradients
    parameters = dict(zip(gradients.names, gradients.parameters, strict=True))
    store = TaskGradients(parameters, 2 * len(trainer.task_names), dtype=gradients.dtype)
    store.shared, store.fixed = list(gradients.shared), True
    with unlogged(trainer), undisturbed(bare, trainer.args.device, trainer.data_collator):
        collect_rows(store, _losses_of_halves(trainer, bare, source))
    store.reduce()
    return cosines_of_halves(store.gramian()[0])


def _losses_of_halves(trainer: Any, model: nn.Module, source: Source) -> Iterator[tuple[int, Tensor]]:
    """Row `2 * task + half`, and the loss."""
    collate, step = trainer.task_collator(), trainer.step_losses
    for halves in _halves(source, trainer.task_data.splits):
        for half, samples in enumerate(halves if halves[1] else ()):
            piece = trainer._prepare_inputs(collate(samples))
            counts = trainer.task_counts.of(piece, piece.pop(SOURCE, None))
            for task, loss in trainer.passes.plain_losses(model, piece, counts, step.window, step.index):
                yield 2 * task + half, loss


def _halves(source: Source, by_task: bool) -> list[Sequence[Sequence[Any]]]:
    """Pairs of halves: of each task's samples alone, or of all with every task's samples cut in two."""
    assert source.samples is not None
    if source.tasks is None:
        return [halves_of(source.samples)]
    pairs = [halves_of(samples) for samples in source.by_task().values()]
    return list(pairs) if by_task else [[list(chain(*halves)) for halves in zip(*pairs, strict=True)]]
