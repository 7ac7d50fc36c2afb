"""Values written into a base weight while a product runs, and the original bits written back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from ..memory import why_not_ours
from ..support import row_of_entry


# Two threads that fold into one weight would each take the other's values for originals.
_FOLDING = threading.Lock()


@contextmanager
def folded_in(weight: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None) -> Iterator[Tensor]:
    """
    `weight` `[rows, *inputs]`, any strides, with `values` added at the support in place; restored on exit. Raises
    `ValueError` if other processes see the weight's memory, or it may not be written.
    """
    reason = why_not_ours(weight)
    if reason is not None:
        raise ValueError(
            "backend='folded' (of convolutions also 'dense') writes into the base weight while a product runs, but "
            f"this one lies in memory {reason}. Use backend='auto' or 'bypass', which leave it alone."
        )
    target = weight.data  # no version bump: the content is the same outside this context
    with _FOLDING:
        if weight.dim() == 2 and offsets is None:  # at 20 entries per row faster than by flat positions
            memory, places, dim = target, indices.long(), 1
            original = memory.gather(dim, places)
        else:
            (memory, places), dim = flat_places(target, indices, offsets), 0
            original = memory.index_select(dim, places)  # a third faster than `memory[places]`
        try:
            memory.scatter_(dim, places, (original + values.reshape(original.shape)).to(target.dtype))
            yield target
        finally:
            memory.scatter_(dim, places, original)


def copy_of(weight: Tensor) -> Tensor:
    """A copy of a weight as it is while nothing is folded into it, which another thread may be doing just now."""
    with _FOLDING:
        return weight.detach().clone()


def flat_places(weight: Tensor, indices: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weight's memory as a flat view, whatever its strides, and int64 positions of the entries in it."""
    column = indices.reshape(-1).long()
    place = row_of_entry(indices, offsets).mul_(weight.stride(0))
    for dim in range(weight.dim() - 1, 1, -1):
        place.add_(column % weight.shape[dim], alpha=weight.stride(dim))
        column = column // weight.shape[dim]
    place.add_(column, alpha=weight.stride(1))
    extent = 1 + sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
    return weight.as_strided((extent,), (1,)), place
