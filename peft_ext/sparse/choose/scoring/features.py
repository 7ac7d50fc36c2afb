"""Features for the loss: one vector per sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...bases.neurons import base_model_of
from ..heads import HEADS, outside_body
from .batches import named_output


# Children that commonly turn pooled features into logits, in models that are not of transformers.
HEAD_NAMES = (*HEADS, "head", "heads", "fc")
Features = str | Callable[[Any], Tensor] | None


@contextmanager
def feature_reader(model: nn.Module, features: Features) -> Iterator[Callable[[Any], Any]]:
    """
    A function that takes what a forward pass returned and gives its features.

    By default they are what enters the head: its first linear layer, which runs after the head has picked a token or
    flattened an image. A head that runs on every token, and picks one of its outputs, has as features the token that
    the logits depend on; where these are several, their mean, weighted by the length of the logits' gradient at each.

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
    base = base_model_of(model)
    if features is not None:
        modules = dict(base.named_modules())
        if features not in modules:
            raise ValueError(f"features={features!r} is no module of the model; pass the name of one, or a function.")
        handles = [modules[features].register_forward_hook(lambda module, args, output: seen.append(output))]
    else:
        handles = [
            layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]) if args else None)
            for layer in _entrances(base)
        ]

    def read(outputs: Any) -> Tensor:
        # A named module's last output; of the head's layers, what entered the first.
        found: Any = (seen[0] if features is None else seen[-1]) if seen else getattr(outputs, "pooler_output", None)
        in_head = bool(seen) and features is None
        seen.clear()
        found = found[0] if isinstance(found, (tuple, list)) else found
        if isinstance(found, Tensor) and found.dim() > 2:
            if found.shape[2:].numel() == 1:  # an image's one position
                found = found.flatten(1)
            elif in_head:
                found = _pooled_as_by_head(found, _logits(outputs))
        if not isinstance(found, Tensor) or found.dim() != 2:
            what = f"of shape {tuple(found.shape)}" if isinstance(found, Tensor) else "not found"
            raise ValueError(
                f"features={features!r}: the features are {what}, needed is a tensor [samples, size]. Pass as "
                "`features` the name of a module that puts them out, or a function of the model's output. Many models "
                "give all their hidden states if you set `model.config.output_hidden_states = True`; then "
                "`lambda output: output.hidden_states[-1].mean(1)` is the mean over tokens, and `.mean((2, 3))` the "
                "one over an image [samples, channels, height, width]. Encoder-decoders always give "
                "`output.encoder_last_hidden_state`."
            )
        return found

    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


def _entrances(model: nn.Module) -> list[nn.Module]:
    """Layers of which the first to run sees the features: the linear ones of the head, or what it has else."""
    heads = list(outside_body(model).values()) or [c for name, c in model.named_children() if name in HEAD_NAMES]
    linear = [layer for head in heads for layer in head.modules() if isinstance(layer, (nn.Linear, Conv1D))]
    return linear or heads


def _logits(outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, (tuple, list)):
        return next(iter(outputs), None)
    return named_output(outputs, "logits")


def _pooled_as_by_head(found: Tensor, logits: Any) -> Tensor | None:
    """
    Of features `[samples, ..., size]`, those that the logits depend on.

    Returns:
        `[samples, size]`, or the features as they are where that can't be told.
    """
    if not isinstance(logits, Tensor) or not logits.requires_grad or not found.requires_grad:
        return found
    gradient: Tensor | None = torch.autograd.grad(logits.float().sum(), found, allow_unused=True)[0]
    if gradient is None:
        return found
    weights = gradient.float().norm(dim=-1, keepdim=True).flatten(1, -2)  # [samples, positions, 1]
    total = weights.sum(1, keepdim=True)
    if not bool((total > 0).all()):
        return found
    return (found.flatten(1, -2) * (weights / total)).sum(1)
