"""Two augmented views of every example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import default_data_collator


class TwoViewCollator:
    """
    Collates each example twice, augmented independently, so that in a contrastive loss every sample has a partner
    (thesis section 4.3.1; the published code draws two views per image).

    Args:
        augment (`Callable`): takes an example, returns an augmented copy; called twice per example.
        collate (`Callable`, *optional*): makes a batch of a list of examples; by default that of transformers.

    Raises:
        `ValueError`: if one of them can't be called.

    Returns of a call: a batch of twice as many samples, first all first views, then all second ones.
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
