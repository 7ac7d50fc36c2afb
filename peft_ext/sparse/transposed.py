"""The transposed table of a support, made when a product first needs it: loading, merging and saving do not."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from .ops.conv import entries_by_tap
from .support import Support


class WithTransposedTable(nn.Module):
    """
    A module that holds a support and, from the first use on, its transposed table; see [`SparseDelta`]. `stale`: the
    indices changed since they were last checked.
    """

    indices: Tensor
    offsets: Tensor | None
    fan_in: int
    taps: int | None
    experts: int | None
    pending: bool
    stale: bool
    _transposed_entries: Any
    _transposed_offsets: Any

    def __init__(self) -> None:
        super().__init__()
        self.__dict__.update(_transposed_entries=None, _transposed_offsets=None)
        _without_tables.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of a copy
        if self._transposed_entries is None:
            _without_tables.add(self)

    @property
    def support(self) -> Support:
        return Support(self.indices, self.fan_in, self.offsets)

    @property
    def transposed_entries(self) -> Tensor:
        self._make_tables()
        entries: Tensor = self._transposed_entries
        return entries

    @property
    def transposed_offsets(self) -> Tensor:
        self._make_tables()
        offsets: Tensor = self._transposed_offsets
        return offsets

    @property
    def tables(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """The support and its transposed table, as the operators take them."""
        return self.indices, self.offsets, self.transposed_entries, self.transposed_offsets

    def refresh(self) -> None:
        """
        Check `indices` that changed, and let the transposed table follow them.

        Raises:
            `ValueError`: if the indices do not fit the weight.
        """
        if self.indices.is_meta or self.pending:
            return
        self.support.check()
        self.follow_indices()

    def follow_indices(self) -> None:
        """Rebuild the transposed table, if it was made, after `indices` changed to others that fit. Equal shapes keep
        their storage, so that a compiled model stays valid."""
        self.stale = False
        if self._transposed_entries is not None:
            self._transpose()

    def _make_tables(self) -> None:
        if torch.compiler.is_compiling():
            _make_all_tables()
        elif self._transposed_entries is None:
            self._transpose()

    # Whatever watches or traces the first use, the tables are plain tensors that training can save.
    @_disable_current_modes()
    @torch.inference_mode(False)
    @torch.no_grad()
    def _transpose(self) -> None:
        _without_tables.discard(self)
        if self.taps is None:
            tables = self.support.transposed(self.experts or 1)
        else:
            tables = entries_by_tap(self.indices, self.taps)
        for name, new in zip(("_transposed_entries", "_transposed_offsets"), tables, strict=True):
            old = getattr(self, name)
            if old is not None and old.shape == new.shape and old.device == new.device:
                old.copy_(new)
            else:
                setattr(self, name, new)


_without_tables: WeakSet[WithTransposedTable] = WeakSet()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _make_all_tables() -> None:
    """Make the tables that are missing. `torch.compile` runs this while it traces, instead of tracing it. All of them
    at once, so that code compiled for one block of a model fits the others."""
    for module in tuple(_without_tables):
        if not (module.pending or module.stale or module.indices.is_meta):
            module._transpose()
