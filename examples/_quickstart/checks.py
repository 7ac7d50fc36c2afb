"""Does a saved adapter give the same predictions again, and does merging keep them?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn


MERGED_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Check:
    """A property, whether it holds, and what was measured."""

    name: str
    passed: bool
    measured: str

    def __str__(self) -> str:
        return f"{'ok    ' if self.passed else 'FAILED'}  {self.name}: {self.measured}"


def roundtrip(
    trained: PeftModel,
    folder: Path,
    fresh_base: Callable[[], nn.Module],
    logits: Callable[[nn.Module], torch.Tensor],
    tolerance: float | None = MERGED_TOLERANCE,
) -> list[Check]:
    """
    Save `trained`, load it onto a fresh copy of its base model, merge, and compare predictions at each stage.

    Args:
        trained (`PeftModel`): The model as training left it.
        folder (`Path`): Where the adapter is saved.
        fresh_base (`Callable[[], nn.Module]`): Loads the base model anew.
        logits (`Callable[[nn.Module], torch.Tensor]`): Predictions of a model on fixed inputs, `[..., classes]`.
        tolerance (`float`, *optional*, defaults to 1e-5):
            Largest difference of merged logits that passes, as a share of the largest logit: a merged layer adds the
            same products in another order, so it may differ by float32's rounding. `None` where merging rounds to
            half precision: what it changes is measured then, and passes.
    """
    expected = logits(trained)
    trained.save_pretrained(folder)
    reloaded = PeftModel.from_pretrained(fresh_base(), folder)
    again = logits(reloaded)
    differing = (again != expected).sum().item()
    merged_model = reloaded.merge_and_unload()
    merged = logits(merged_model)
    largest = expected.abs().max().item()
    gap = (merged - expected).abs().max().item() / largest
    changed = (merged.argmax(-1) != expected.argmax(-1)).sum().item()
    limit = float("inf") if tolerance is None else tolerance
    total = expected[..., 0].numel()
    left = [name for name, _ in merged_model.named_modules() if "neuroada" in name]
    return [
        Check("reloaded logits equal bit for bit", differing == 0, f"{differing} of {expected.numel()} differ"),
        Check(f"merged logits within {limit:g} of the largest", gap <= limit, f"{gap:.1e} of {largest:.1f}"),
        Check("merged predictions equal", changed == 0 or tolerance is None, f"{changed} of {total} changed"),
        Check("merged model is plain", not left, f"{len(left)} adapter modules left"),
    ]
