"""From a data loader's batches to calls of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import islice
from typing import Any

from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm


LABELS = ("labels", "label")
IGNORED = -100  # transformers' label of what is not to be learned


def batches(
    model: nn.Module, dataloader: Iterable[Any], max_batches: int | None, description: str, progress: bool
) -> Iterator[Any]:
    """The batches on the model's device, with a progress bar if wanted.

    Raises:
        `ValueError`: if there are no batches.
    """
    device = next(model.parameters()).device
    known = len(dataloader) if isinstance(dataloader, Sized) else None
    total = known if max_batches is None else max_batches if known is None else min(known, max_batches)
    number = 0
    shown = tqdm(islice(dataloader, max_batches), total=total, desc=description, unit="batch", disable=not progress)
    for batch in shown:
        number += 1
        yield send_to_device(batch, device)
    if number == 0:
        raise ValueError("dataloader has no batches, so there is nothing to score by.")


def forward(model: nn.Module, batch: Any, with_labels: bool) -> Any:
    """
    Call the model on a batch: a mapping of its arguments, a pair of inputs and labels, or the inputs alone.

    Raises:
        `ValueError`: if the batch is none of these.
    """
    if isinstance(batch, Mapping) and any(isinstance(value, Tensor) for value in batch.values()):
        return model(**{name: value for name, value in batch.items() if with_labels or name not in LABELS})
    inputs = batch[0] if isinstance(batch, (tuple, list)) and len(batch) in (1, 2) else batch
    if not isinstance(inputs, Tensor):
        raise ValueError(
            f"dataloader gave {_short(batch)}; needed are batches: mappings of the model's arguments as tensors, with "
            "'labels', or pairs of inputs and labels as tensors. A torch DataLoader makes them of a data set."
        )
    return model(inputs)


def labels_of(batch: Any) -> Tensor:
    """
    Raises:
        `ValueError`: if the batch has no labels.
    """
    if isinstance(batch, Mapping):
        labels = next((batch[name] for name in LABELS if name in batch), None)
    else:
        labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    if not isinstance(labels, Tensor):
        found = "no labels" if labels is None else f"the labels {_short(labels)}, which are no tensor"
        raise ValueError(
            f"dataloader gave a batch with {found}; the loss needs them. Give batches with "
            f"{' or '.join(map(repr, LABELS))}, or pairs of inputs and labels, as tensors."
        )
    return labels


def named_output(outputs: Any, name: str) -> Any:
    """One of what the model put out, or `None`."""
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def loss_of(outputs: Any) -> Tensor:
    """
    What the model put out as its loss.

    Raises:
        `ValueError`: if there is none.
    """
    loss = named_output(outputs, "loss")
    if loss is None:
        raise ValueError(
            "loss='model', but the model returned no loss. Give it batches that are mappings with 'labels', or pass a "
            "function of features and labels as `loss`."
        )
    return loss


def _short(value: Any) -> str:
    """Describe a value in few words."""
    text = repr(value)
    return f"a {type(value).__name__}" + (f" {text}" if len(text) < 80 else "")
