"""Beside the training itself: logs, checkpoints, noise floor, and losses after a step."""

from __future__ import annotations

import copy
import logging
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from .aggregators.base import Array
from .checkpoint import read_state, write_state
from .conflicts.recorder import ConflictRecorder
from .data.collation import SOURCE, Source, halves_of, parts_of
from .gradients.probe import collect_rows, cosines_of_halves, undisturbed, unlogged
from .gradients.task_gradients import TaskGradients


if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

logger = logging.getLogger(__name__)


class TaskBookkeepingMixin(_Trainer):
    """Part of [`MTLTrainerMixin`]."""

    _aggregator: Any
    _untrained: dict[str, Any]
    _make_aggregator: Any
    _task_names: list[str] | None
    _given_aggregator: Any
    _recorder: Any
    _gradients: Any
    _loaded: dict[str, Any] | None
    _logged_losses: list[Array]
    _micro_batch: int
    _replay: Any
    _skipped_steps: int

    # ------------------------------------------------------------------ logs and state

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """
        Trainer's, with a record of its own for each training. What the method has learnt is treated like the
        optimiser's state: a second training goes on with it, one whose model comes anew from `model_init` does not.
        """
        if self._recorder is not None and self._recorder.steps:
            self._recorder = ConflictRecorder(self._recorder.tasks, self._recorder.path)
        self._gradients = self._replay = None  # of parameters that may be others by now
        self._logged_losses, self._skipped_steps = [], 0
        if self.model_init is not None and self._aggregator is not None:
            self._aggregator.load_state_dict(copy.deepcopy(self._untrained))
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the tasks' losses and the conflicts since the last log; at the end, their summary."""
        if self._recorder is not None:
            if "train_runtime" in logs:
                logs.update(self._recorder.summary(self.state.max_steps))
                if self._skipped_steps:
                    logs["skipped_steps"] = float(self._skipped_steps)
            elif "loss" in logs:
                block = np.array(self._logged_losses)  # [steps, tasks]
                for task, name in enumerate(self.task_names):
                    known = block[~np.isnan(block[:, task]), task] if len(block) else block
                    if known.size:
                        logs[f"task_loss/{name}"] = float(known.mean())
                self._logged_losses = []
                logs.update(self._recorder.logs(self.state.max_steps))
        super().log(logs, *args, **kwargs)

    def _unlogged(self) -> Any:
        return unlogged(self)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self._aggregator is not None and self._recorder is not None:
            state = {
                "method": self._method_name(),
                "tasks": self.task_names,
                "aggregator": self._aggregator.state_dict(),
                "conflicts": self._recorder.state_dict(),
                "gradients": self._gradients.state_dict() if self._gradients is not None else None,
                "logged_losses": [losses.tolist() for losses in self._logged_losses],
                "skipped_steps": self._skipped_steps,
            }
            write_state(output_dir, state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._loaded = read_state(checkpoint, self._method_name(), self._task_names)
        if self._loaded is None:
            logger.warning("%s has no state of multi-task training; the method starts afresh.", checkpoint)
        elif self._task_names is None:
            self._task_names = list(self._loaded["tasks"])
            self._make_aggregator()
            return
        self._restore()

    def _method_name(self) -> str:
        return type(self._given_aggregator).__name__ if self._given_aggregator else self.args.mtl_method

    def _restore(self) -> None:
        """Take over what a checkpoint holds, as far as its owners exist by now."""
        state = self._loaded
        if state is None:
            return
        if self._aggregator is not None and self._recorder is not None and "aggregator" in state:
            self._aggregator.load_state_dict(state.pop("aggregator"))
            self._recorder.load_state_dict(state.pop("conflicts"))
            self._logged_losses = [np.array(losses) for losses in state.pop("logged_losses")]
            self._skipped_steps = state.pop("skipped_steps")
        if self._gradients is not None and state.get("gradients") is not None:
            self._gradients.load_state_dict(state.pop("gradients"))

    # ------------------------------------------------------------------ measurements

    def _noise_floor(self, model: nn.Module, source: Source | None) -> Array:
        """Cosine between the gradients of two halves of each task's last micro-batch, `[tasks]`."""
        assert self._gradients is not None
        if source is None or source.samples is None:
            raise ValueError(
                f"noise_floor_steps={self.args.noise_floor_steps} collates the halves of a batch's samples, and this "
                "batch came without them. Set it to 0; or let the data set give single samples, and collate with "
                "trainer.task_collator() in a data loader of your own."
            )
        bare = self.accelerator.unwrap_model(model)
        parameters = dict(zip(self._gradients.names, self._gradients.parameters, strict=True))
        store = TaskGradients(parameters, 2 * len(self.task_names), dtype=self._gradients.dtype)
        store.shared, store.fixed = list(self._gradients.shared), True
        with self._unlogged(), undisturbed(bare, self.args.device, self.data_collator):
            collect_rows(store, self._losses_of_halves(bare, source))
        store.reduce()
        return cosines_of_halves(store.gramian()[0])

    def _losses_of_halves(self, model: nn.Module, source: Source) -> Any:
        collate = self.task_collator()
        assert source.samples is not None
        pairs = [halves_of(source.samples)]
        if source.tasks is not None:
            pairs = [halves_of(samples) for samples in source.by_task().values()]
            if not self._splits:  # every task's halves in one pass
                pairs = [tuple(list(chain(*halves)) for halves in zip(*pairs, strict=True))]
        for pair in pairs:
            for half, chosen in enumerate(pair if pair[1] else ()):
                piece = self._prepare_inputs(collate(chosen))
                counts = self._counts_of(piece, piece.pop(SOURCE, None))
                for task, loss in self._losses_of(model, piece, counts):
                    if float(counts[task]) > 0:
                        yield 2 * task + half, loss

    def _losses_of(self, model: nn.Module, batch: Any, counts: Any) -> Any:
        if self._splits:
            for task, part in parts_of(batch, self.args.task_column, len(self.task_names)).items():
                if float(counts[task]) > 0:
                    yield task, self._part_loss(model, part, self._micro_batch - 1, task)
            return
        num_items = None
        if self.args.task_loss_scale == "window":
            num_items = dict(zip(self.task_names, counts, strict=True))
        with self.compute_loss_context_manager():
            losses = self.compute_task_losses(model, batch, num_items)
        yield from ((task, losses[name]) for task, name in enumerate(self.task_names) if name in losses)

    def _give_feedback(self) -> None:
        """After the optimiser's step: the same batch's new losses, for methods that learn from them."""
        replay, self._replay = self._replay, None
        if replay is None or self.accelerator.optimizer_step_was_skipped:
            return
        with self._unlogged():
            losses = replay.run(self, self.model_wrapped)
        assert self._window is not None
        after = np.where(self._window.present.numpy(), self._mean_over_processes(losses), np.nan)
        self.aggregator.feedback(after)
