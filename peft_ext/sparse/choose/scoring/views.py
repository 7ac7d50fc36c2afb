"""Two augmented views of every example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import default_data_collator


class TwoViewCollator:
    """
    Data collator that takes each example twice, augmented independently, so that every sample has a partner in a
    contrastive loss. The published code of GPS draws two views per image in the same way.

    A batch holds twice as many samples: first all first views, then all second views.

    Args:
        augment (`Callable`):
            Takes an example and returns an augmented copy. It is called twice per example.
        collate (`Callable`, *optional*):
            Makes a batch of a list of examples. By default transformers' `default_data_collator`.

    Raises:
        `ValueError`: If one of them is not callable.

    Example:

        ```py
        >>> from peft_ext import GPSConfig, TwoViewCollator, gps

        >>> loader = DataLoader(train_dataset, batch_size=32, collate_fn=TwoViewCollator(augment))
        >>> model = gps(model, GPSConfig(k=1), loader)
        ```
    """

    def __init__(
        self,
        augment: Callable[[Any], Any],
        collate: Callable[[list[Any]], Any] = default_data_collator,
    ) -> None:
        for name, function in (("augment", augment), ("collate", collate)):
            if not callable(function):
                raise ValueError(f"{name}={function!r} must be a function.")
        self.augment = augment
        self.collate = collate

    def __call__(self, examples: Sequence[Any]) -> Any:
        return self.collate([self.augment(example) for _ in range(2) for example in examples])
