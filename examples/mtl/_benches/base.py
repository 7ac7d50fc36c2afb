"""What a multi-task problem consists of, whatever its images are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


class Table(Dataset[Any]):
    """Tensors of equal length in memory."""

    def __init__(self, columns: Mapping[str, Tensor]) -> None:
        self.columns = dict(columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


Losses = Callable[..., dict[str, Tensor]]
Evaluate = Callable[[nn.Module, Table], dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Bench:
    """
    A multi-task problem.

    Attributes:
        name: of the problem.
        tasks: their names; labels are called `labels_<task>`.
        make_data: seed to training, validation and test set.
        make_model: seed to a network with an `encoder` and `heads` (a `ModuleDict`); pretrained where that is meant.
        losses: outputs and labels to one loss per task.
        evaluate: metrics per task.
        higher_is_better: per metric.
        epochs, batch_size: of one training.
    """

    name: str
    tasks: list[str]
    make_data: Callable[[int], tuple[Table, Table, Table]]
    make_model: Callable[[int], nn.Module]
    losses: Losses
    evaluate: Evaluate
    higher_is_better: dict[str, bool]
    epochs: int
    batch_size: int

    @property
    def label_names(self) -> list[str]:
        return [f"labels_{task}" for task in self.tasks]


class EncoderWithHeads(nn.Module):
    """An encoder that all tasks share, and a head for each."""

    def __init__(self, encoder: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict(heads)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        features = self.encoder(pixel_values)
        return {task: head(features) for task, head in self.heads.items()}


def classification_losses(
    outputs: dict[str, Tensor], labels: Any, num_items_in_batch: Any = None
) -> dict[str, Tensor]:
    """Cross-entropy of every task."""
    return {task: nn.functional.cross_entropy(logits, labels[f"labels_{task}"]) for task, logits in outputs.items()}


@torch.no_grad()
def outputs_of(model: nn.Module, data: Table, batch_size: int = 256) -> dict[str, Tensor]:
    """The model's outputs on all of `data`, in evaluation mode."""
    model.eval()
    inputs = {name: column for name, column in data.columns.items() if not name.startswith("labels_")}
    starts = range(0, len(data), batch_size)
    parts = [model(**{name: column[at : at + batch_size] for name, column in inputs.items()}) for at in starts]
    return {task: torch.cat([part[task] for part in parts]) for task in parts[0]}


def accuracies(model: nn.Module, data: Table) -> dict[str, dict[str, float]]:
    """Top-1 accuracy of every task, in percent."""
    return {
        task: {"top1": 100.0 * (logits.argmax(1) == data.columns[f"labels_{task}"]).double().mean().item()}
        for task, logits in outputs_of(model, data).items()
    }
