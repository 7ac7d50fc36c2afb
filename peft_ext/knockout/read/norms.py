"""Norms of image tokens, whose outliers hold global rather than local information (https://arxiv.org/abs/2309.16588)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..cut.edges import check_mask
from ..model.architecture import inspect_model
from ..model.threads import own_thread


_CONNECTORS = ("multi_modal_projector", "connector", "merger")
SITES = ("vision", "decoder")


@torch.no_grad()
def image_token_norms(model: nn.Module, inputs: Mapping[str, Any], image_tokens: Tensor, at: str = "vision") -> Tensor:
    """
    Euclidean norm of the features of each image token.

    Args:
        model (`torch.nn.Module`):
            A vision-language model of transformers.
        inputs (`dict`):
            Arguments of the model.
        image_tokens (`torch.Tensor`):
            The group `image`, bool `[batch, sequence]`.
        at (`str`, *optional*, defaults to `"vision"`):
            Where to read the features. `"vision"`: the input of the connector, which has the outliers of Darcet et
            al., [Vision Transformers Need Registers](https://arxiv.org/abs/2309.16588). `"decoder"`: the input of the
            decoder.

    Returns:
        `torch.Tensor`: Float32 `[batch, sequence]`, 0 for other tokens.

    Raises:
        `ValueError`: If there is not one feature per image token at this place, as before a connector that merges
            patches or adds newlines.
    """
    if at not in SITES:
        raise ValueError(f'at is {at!r}: must be "vision" or "decoder".')
    architecture = inspect_model(model)
    check_mask(image_tokens, "image_tokens")
    if image_tokens.shape != inputs["input_ids"].shape:
        raise ValueError(
            f"image_tokens has the shape {tuple(image_tokens.shape)}, but input_ids have "
            f"{tuple(inputs['input_ids'].shape)}: find the group in the same inputs."
        )
    place: nn.Module = architecture.layers[0].module
    if at == "vision":
        named = [
            module for name, module in architecture.model.named_modules() if name.rsplit(".", 1)[-1] in _CONNECTORS
        ]
        if not named:
            raise ValueError(
                f'{type(architecture.model).__name__} has no connector that is known here: use at="decoder".'
            )
        place = named[0]
    seen: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
        seen.append(first.detach().float().norm(dim=-1))

    with place.register_forward_pre_hook(own_thread(see), with_kwargs=True):
        model(**inputs)
    norms = torch.zeros(image_tokens.shape)
    group = image_tokens.cpu()
    if at == "decoder":
        norms[group] = seen[0].cpu()[group]
        return norms
    found = torch.cat([part.flatten() for part in seen]).cpu()
    if len(found) != int(group.sum()):
        raise ValueError(
            f'at="vision": {len(found)} features enter the connector, but the prompt has {int(group.sum())} image '
            'tokens, so they cannot be matched: use at="decoder".'
        )
    norms[group] = found
    return norms
