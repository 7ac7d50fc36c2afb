"""Scores that a user gave, as matrices of neurons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ..bases.neurons import experts_of, matrix_shape, neuron_view


def uncompiled(name: str) -> str:
    """A module's name as it is where `torch.compile` has wrapped no module around it."""
    return name.replace("_orig_mod.", "")


def given_scores(scores: Mapping[str, Tensor], bases: Mapping[str, Any]) -> dict[str, Callable[[], Tensor]]:
    """
    Per module, a function that returns its score as `[rows, fan_in]`, of experts `[experts, rows, fan_in]`: where the
    user's mapping computes or reads scores one by one, one is alive at a time.

    Args:
        scores: per module, a tensor in the shape of its weight.
        bases: per target module, its base layer.

    Raises:
        `ValueError`: if a target module has no score. (A score of another shape is refused when it is read.)
    """
    keys = {uncompiled(key): key for key in scores}
    missing = next((name for name in bases if uncompiled(name) not in keys), None)
    if missing is not None:
        raise ValueError(f"scores lack the target module '{missing}'; add them, or leave it out of `target_modules`.")
    return {name: partial(_score, scores, keys[uncompiled(name)], name, base) for name, base in bases.items()}


def _score(scores: Mapping[str, Tensor], key: str, module: str, base: Any) -> Tensor:
    score = scores[key]
    if not isinstance(score, Tensor):
        raise ValueError(
            f"scores['{module}'] is {score!r}, not a tensor; give one score per weight, or leave the module out "
            "of `target_modules`."
        )
    # A score may have any device and dtype, but has to look like the weight.
    matrix = neuron_view(base, score) if score.dim() == base.weight.dim() else score
    if (matrix.shape[:-1].numel(), matrix.shape[-1]) != matrix_shape(base):
        raise ValueError(
            f"scores['{module}'] has shape {tuple(score.shape)}, but the module's weight is "
            f"{tuple(base.weight.shape)}; give one score per weight."
        )
    experts = experts_of(base)
    return matrix if experts is None else matrix.reshape(experts, -1, matrix.shape[-1])
