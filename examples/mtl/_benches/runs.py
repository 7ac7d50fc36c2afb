"""One training: a bench, a method, and which of the encoder's weights are trained."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import PrinterCallback

from peft_ext.mtl import MTLConfig, MTLTrainer
from peft_ext.mtl.conflicts.recorder import conflict_incidence

from .base import Bench, Table


MASKS = ("full", "psn", "random")


@dataclass(frozen=True)
class Run:
    """
    What one training is determined by.

    Attributes:
        bench, method, mask: names.
        learning_rate, seed: numbers.
        density: trained share of each neuron's inputs, where `mask` is not `"full"`.
        task: train this one alone, for single-task learning.
        epochs: if not the bench's.
        images: train on the first so many alone.
    """

    bench: str
    method: str = "joint"
    mask: str = "full"
    learning_rate: float = 1e-3
    seed: int = 0
    density: float = 0.3
    task: str | None = None
    epochs: int | None = None
    images: int | None = None


def masked(model: nn.Module, mask: str, density: float, seed: int) -> nn.Module:
    """The model with all weights trained, or with a share of the encoder's and the heads whole."""
    if mask == "full":
        return model
    from peft import get_peft_model

    from peft_ext import PSNConfig

    kinds = (nn.Linear, nn.Conv2d)
    targets = [n for n, module in model.named_modules() if n.startswith("encoder.") and isinstance(module, kinds)]
    selection = {"psn": "magnitude", "random": "random"}[mask]
    heads = [f"heads.{task}" for task in dict(model.get_submodule("heads").named_children())]
    # At these sizes the dense path is fastest, also without gradients, where "auto" spares W: 2.0 s in place of 3.7.
    config = PSNConfig(
        density=density,
        selection=selection,
        seed=seed,
        target_modules=targets,
        modules_to_save=heads,
        backend="dense",
    )
    return get_peft_model(model, config)


def incidence_by_epoch(recorder: Any) -> list[float]:
    """Percent of conflicts in each epoch's steps."""
    epochs = np.floor(np.array(recorder.epochs)).astype(int)
    cosines = np.array(recorder.cosines)  # [steps, pairs]
    return [conflict_incidence(cosines[epochs == number]) for number in sorted(set(epochs.tolist()))]


def train(
    bench: Bench,
    run: Run,
    output_dir: str | None = None,
    parts: Sequence[str] = ("validation", "test"),
    **options: Any,
) -> dict[str, Any]:
    """
    Train and evaluate on `parts`.

    Returns:
        `dict`: the run's settings, metrics on each of `parts`, the conflicts' summary, and with several tasks
        `incidence_by_epoch`.
    """
    training, validation, test = bench.make_data(run.seed)
    if run.images:
        training = Table({name: column[: run.images] for name, column in training.columns.items()})
    model = masked(bench.make_model(run.seed), run.mask, run.density, run.seed)
    tasks = [run.task] if run.task else bench.tasks

    def losses(outputs: dict[str, Tensor], labels: Any, num_items_in_batch: Any = None) -> dict[str, Tensor]:
        chosen = {task: outputs[task] for task in tasks}
        labels = labels if isinstance(labels, dict) else {bench.label_names[0]: labels}
        return bench.losses(chosen, labels)

    with tempfile.TemporaryDirectory() as scratch:
        config = MTLConfig(
            output_dir=output_dir or scratch,
            mtl_method=run.method,
            task_names=tasks,
            label_names=bench.label_names,
            num_train_epochs=run.epochs or bench.epochs,
            per_device_train_batch_size=bench.batch_size,
            learning_rate=run.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=0.0,
            seed=run.seed,
            **{
                "noise_floor_steps": 10 if run.task is None else 0,
                "conflict_logging_steps": 1 if run.task is None else 0,
                "remove_unused_columns": False,
                "logging_strategy": "no",
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": True,
                "dataloader_pin_memory": False,
                **options,
            },
        )
        trainer = MTLTrainer(
            model=model,
            args=config,
            train_dataset=training,
            data_collator=default_collate,
            compute_task_losses_func=losses,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    held_out = {"validation": validation, "test": test}
    found = {name: bench.evaluate(model, held_out[name]) for name in parts}
    return {
        **asdict(run),
        **{name: {task: metrics[task] for task in tasks} for name, metrics in found.items()},
        **trainer.conflicts.summary(trainer.state.max_steps),
        **({} if run.task else {"incidence_by_epoch": incidence_by_epoch(trainer.conflicts)}),
    }
