"""Scores that a user gave, as matrices of neurons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..bases.neurons import neuron_view


def uncompiled(name: str) -> str:
    """A module's name as it is where `torch.compile` has wrapped no module around it."""
    return name.replace("_orig_mod.", "")


class ScoreMatrices(Mapping[str, Tensor]):
    """
    Per module, its score as `[rows, fan_in]`, looked up when asked for: where the user's mapping computes or reads
    scores one by one, one is alive at a time.

    Args:
        scores: per module, a tensor in the shape of its weight.
        bases: per target module, its base layer.
        shapes: per target module, rows and fan-in of its weight.

    Raises:
        `ValueError`: if a target module has no score. (A score of another shape is refused when it is looked up.)
    """

    def __init__(
        self, scores: Mapping[str, Tensor] | None, bases: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]
    ) -> None:
        self.scores = scores or {}
        self.keys_of = {uncompiled(key): key for key in self.scores}
        self.bases = bases
        self.shapes = shapes
        missing = next((name for name in bases if uncompiled(name) not in self.keys_of), None)
        if missing is not None:
            raise ValueError(
                f"scores lack the target module '{missing}'; add them, or leave it out of `target_modules`."
            )

    def __getitem__(self, module: str) -> Tensor:
        score, base = self.scores[self.keys_of[uncompiled(module)]], self.bases[module]
        if not isinstance(score, Tensor):
            raise ValueError(
                f"scores['{module}'] is {score!r}, not a tensor; give one score per weight, or leave the module out "
                "of `target_modules`."
            )
        # A score may have any device and dtype, but has to look like the weight.
        matrix = neuron_view(base, score) if score.dim() == base.weight.dim() else score
        if (matrix.shape[:-1].numel(), matrix.shape[-1]) != self.shapes[module]:
            raise ValueError(
                f"scores['{module}'] has shape {tuple(score.shape)}, but the module's weight is "
                f"{tuple(base.weight.shape)}; give one score per weight."
            )
        return matrix

    def __iter__(self) -> Iterator[str]:
        return iter(self.bases)

    def __len__(self) -> int:
        return len(self.bases)
