"""From a data loader's batches to calls of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any

from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..targets import HEADS


LABELS = ("labels", "label")
# Children that commonly turn pooled features into logits.
HEAD_NAMES = (*HEADS, "head", "fc")
Features = str | Callable[[Any], Tensor] | None


def batches(
    model: nn.Module, dataloader: Iterable[Any], max_batches: int | None, description: str, progress: bool
) -> Iterator[Any]:
    """The batches on the model's device, with a progress bar if wanted.

    Raises:
        `ValueError`: if `max_batches` is not positive, or there are no batches.
    """
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches={max_batches!r} must be at least 1, or None for all batches.")
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
    """Call the model on a batch: a mapping of its arguments, a pair of inputs and labels, or the inputs alone."""
    if isinstance(batch, Mapping):
        return model(**{name: value for name, value in batch.items() if with_labels or name not in LABELS})
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def labels_of(batch: Any) -> Tensor:
    """
    Raises:
        `ValueError`: if the batch has no labels.
    """
    if isinstance(batch, Mapping):
        labels = next((batch[name] for name in LABELS if name in batch), None)
    else:
        labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    if labels is None:
        raise ValueError(
            f"A batch has no labels, which the loss needs: give batches with {' or '.join(map(repr, LABELS))}, or "
            "pairs of inputs and labels."
        )
    return labels


@contextmanager
def feature_reader(model: nn.Module, features: Features) -> Iterator[Callable[[Any], Tensor]]:
    """
    A function that takes what a forward pass returned and gives its features.

    Args:
        model (`torch.nn.Module`): the model.
        features: where they are: a function of the model's output, the name of a module whose output they are, or
            `None` for what enters the head (or `pooler_output` of a model without one).

    Raises:
        `ValueError`: if there is no such module, no head and no pooled output, or the features have other dimensions.
    """
    seen: list[Any] = []
    if callable(features):
        yield features
        return
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if features is not None:
        modules = dict(base.named_modules())
        if features not in modules:
            raise ValueError(f"features={features!r} is no module of the model; pass the name of one, or a function.")
        handle = modules[features].register_forward_hook(lambda module, args, output: seen.append(output))
    else:
        head = next((child for name, child in base.named_children() if name in HEAD_NAMES), None)
        handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0])) if head else None

    def read(outputs: Any) -> Tensor:
        found = seen.pop() if seen else getattr(outputs, "pooler_output", None)
        seen.clear()
        found = found[0] if isinstance(found, (tuple, list)) else found
        if not isinstance(found, Tensor) or found.dim() != 2:
            what = f"of shape {tuple(found.shape)}" if isinstance(found, Tensor) else "not found"
            raise ValueError(
                f"features={features!r}: the features are {what}, needed is a tensor [samples, size]. Pass as "
                "`features` the name of a module that puts them out, or a function of the model's output, such as "
                "`lambda output: output.last_hidden_state.mean(1)`."
            )
        return found

    try:
        yield read
    finally:
        if handle is not None:
            handle.remove()
