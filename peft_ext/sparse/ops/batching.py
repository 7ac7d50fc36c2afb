"""`torch.func.vmap` over the bypass: samples of activations that share one update are more tokens of one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def _folded(tensor: Tensor, dim: int | None, batch: int) -> Tensor:
    """`[batch * tokens, n]` from `[tokens, n]` with a batch dimension at `dim`, or repeated if it has none."""
    tensor = tensor.expand(batch, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.reshape(-1, tensor.shape[-1])


def _sample(argument: Any, dim: Any, number: int) -> Any:
    return argument.select(dim, number) if isinstance(dim, int) else argument  # lists have lists of dimensions


def vmap_rule(op: Any, activations: int) -> Callable[..., tuple[Tensor, int]]:
    """The rule of an operator of the bypass whose first `activations` arguments are activations; 0 if it sums over
    tokens."""

    def rule(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Tensor, int]:
        batch = info.batch_size
        *_, ends, geometry = arguments  # tokens are sorted by `ends`, sample by sample
        shared = not any(isinstance(dim, int) for dim in in_dims[activations:])
        if batch and activations and ends is None and not geometry and shared:
            folded = [
                _folded(tensor, dim, batch)
                for tensor, dim in zip(arguments[:activations], in_dims[:activations], strict=True)
            ]
            out = op(*folded, *arguments[activations:])
            return out.view(batch, -1, out.shape[-1]), 0
        samples = [
            op(*(_sample(argument, dim, number) for argument, dim in zip(arguments, in_dims, strict=True)))
            for number in range(batch)
        ]
        return torch.stack(samples), 0

    return rule
