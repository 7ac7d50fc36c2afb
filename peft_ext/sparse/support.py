"""The trained entries of a weight: the index table, its transpose and what they tell of the base weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .another_base import accepts_another_base
from .fingerprint import difference, fingerprint_of, is_unknown, moved


@dataclass(frozen=True, eq=False)
class Support:
    """The chosen entries of one weight seen as `[rows, fan_in]`, where a row is a neuron."""

    # int32 column indices, increasing within a row. `[rows, k]` if each row has k entries (table form), else
    # `[entries]` (ragged form)
    indices: Tensor
    fan_in: int  # Number of columns of the weight
    # Ragged form only: int32 `[rows + 1]`; row i owns the entries `offsets[i]:offsets[i + 1]`
    offsets: Tensor | None = None

    @classmethod
    def of_integers(cls, indices: Tensor, fan_in: int, offsets: Tensor | None = None) -> Support:
        """
        The support that whole numbers of any type describe, as files have them; made int32 once they are known to fit.

        Raises:
            `ValueError`: see `check`.
        """
        fits = indices.element_size() < 4 or indices.dtype == torch.int32
        whole = indices.to(torch.int32) if fits else indices.long()
        cls(whole, fan_in, None if offsets is None else offsets.long()).check()
        return cls(whole.to(torch.int32), fan_in, None if offsets is None else offsets.to(torch.int32))

    @property
    def is_table(self) -> bool:
        return self.offsets is None

    @property
    def rows(self) -> int:
        return self.indices.shape[0] if self.offsets is None else self.offsets.shape[0] - 1

    @property
    def entries(self) -> int:
        return self.indices.numel()

    def to(self, device: torch.device | str) -> Support:
        offsets = None if self.offsets is None else self.offsets.to(device)
        return Support(self.indices.to(device), self.fan_in, offsets)

    def ragged(self) -> Support:
        """The same entries in ragged form."""
        if not self.is_table:
            return self
        return Support(self.indices.reshape(-1), self.fan_in, ends_of_rows(self.indices, self.offsets))

    def row_of_entry(self) -> Tensor:
        """Row of each entry, int64 `[entries]`."""
        return row_of_entry(self.indices, self.offsets)

    def gather(self, matrix: Tensor) -> Tensor:
        """Values of `matrix` (`[rows, fan_in]`, or `[experts, rows of one, fan_in]`; any strides) at the support, in
        the shape of `indices`."""
        if self.is_table and matrix.element_size() > 1:  # torch does not gather 8-bit floats
            return matrix.gather(-1, self._columns_like(matrix)).view(self.indices.shape)
        return matrix[self._positions_in(matrix)].view(self.indices.shape)

    def scatter_(self, matrix: Tensor, values: Tensor) -> None:
        """Overwrite `matrix` (shaped as for `gather`) at the support with `values` of its dtype, in place."""
        if self.is_table and matrix.element_size() > 1:
            columns = self._columns_like(matrix)
            matrix.scatter_(-1, columns, values.reshape(columns.shape))
        else:
            matrix[self._positions_in(matrix)] = values.reshape(-1)

    def _columns_like(self, matrix: Tensor) -> Tensor:
        return self.indices.long().view(*matrix.shape[:-1], self.indices.shape[1])

    def _positions_in(self, matrix: Tensor) -> tuple[Tensor, ...]:
        rows = self.row_of_entry()
        leading = (rows,) if matrix.dim() == 2 else (rows // matrix.shape[1], rows % matrix.shape[1])
        return *leading, self.indices.reshape(-1).long()

    def transposed(self, experts: int = 1) -> tuple[Tensor, Tensor]:
        """The entries grouped by column, those of each expert (an equal share of the rows) for themselves: entry
        numbers int32 `[entries]` and offsets int32 `[experts * fan_in + 1]`."""
        columns = self.indices.reshape(-1)
        if experts > 1:
            columns = columns + (self.row_of_entry() // (self.rows // experts)) * self.fan_in
        entries = torch.argsort(columns, stable=True).to(torch.int32)
        return entries, offsets_from_counts(torch.bincount(columns, minlength=experts * self.fan_in))

    def check(self) -> None:
        """
        Raises:
            `ValueError`: if an index lies outside the weight, a row is not strictly increasing, or offsets do not
                cover the entries.
        """
        columns = self.indices.reshape(-1)
        if self.offsets is not None:
            ends = self.offsets
            if int(ends[0]) != 0 or int(ends[-1]) != columns.numel() or bool((ends[1:] < ends[:-1]).any()):
                raise ValueError("offsets do not divide the entries into rows")
        if columns.numel() == 0:
            return
        low, high = (int(bound) for bound in torch.aminmax(columns))
        if low < 0 or high >= self.fan_in:
            raise ValueError(f"indices span {low}..{high}, but the weight has {self.fan_in} inputs per neuron")
        if self.offsets is None:
            falling = self.indices[:, 1:] <= self.indices[:, :-1]
        else:
            row = self.row_of_entry()
            falling = (row[1:] == row[:-1]) & (columns[1:] <= columns[:-1])
        if bool(falling.any()):
            raise ValueError("indices are not strictly increasing within a row")

    def fingerprint(self, matrix: Tensor, quantised: bool = False) -> Tensor:
        """
        Identify the base weight by its original values at the support.

        Args:
            matrix (`torch.Tensor`): the base weight as float `[rows, fan_in]`.
            quantised (`bool`): whether it is a dequantised copy.

        Returns:
            `torch.Tensor`: int64 `[6]` on the CPU: rows, fan-in, dtype, exact checksum, and sums that stay comparable
            after a cast or quantisation.
        """
        return fingerprint_of(self._values_in(matrix), self.rows, self.fan_in, quantised)

    def mismatch(self, fingerprint: Tensor, matrix: Tensor, quantised: bool = False) -> str | None:
        """
        Compare a stored fingerprint with a base weight.

        Equal dtypes must agree in every bit at the support. A base cast to another float type must agree in its sums
        within the rounding of the coarser type, and so must weights of which either is quantised. Inside
        [`another_base`] only the shape must agree.

        Returns:
            `str` or `None`: what differs, or `None` if the weight is the one that the support was chosen for.
        """
        stored = fingerprint.cpu()
        if is_unknown(stored):  # nothing to compare with
            return None
        if (int(stored[0]), int(stored[1])) != (self.rows, self.fan_in):
            return f"shape {int(stored[0])}x{int(stored[1])} instead of {self.rows}x{self.fan_in}"
        return None if accepts_another_base() else difference(stored, self._values_in(matrix), quantised)

    def distance(self, fingerprint: Tensor, matrix: Tensor) -> float:
        """Distance of the sums at the support from those of a stored fingerprint, relative to the values' 2-norm."""
        if is_unknown(fingerprint):
            return 0.0
        return moved(fingerprint.cpu(), self._values_in(matrix))

    def _values_in(self, matrix: Tensor) -> Tensor:
        return self.gather(matrix.detach()).reshape(-1)


def ends_of_rows(indices: Tensor, offsets: Tensor | None) -> Tensor:
    """Where each neuron's entries start and end, int32 `[rows + 1]`: the offsets, also of a table."""
    if offsets is not None:
        return offsets
    rows, k = indices.shape
    return torch.arange(rows + 1, dtype=torch.int32, device=indices.device) * k


def row_of_entry(indices: Tensor, offsets: Tensor | None) -> Tensor:
    """Row of each entry of a support, int64 `[entries]`."""
    if offsets is None:
        rows, k = indices.shape
        return torch.arange(rows, device=indices.device).repeat_interleave(k)
    counts = (offsets[1:] - offsets[:-1]).long()
    return torch.repeat_interleave(counts, output_size=indices.numel())


def narrowest_index_dtype(fan_in: int) -> torch.dtype:
    """The smallest unsigned type that holds every column index of a weight with `fan_in` inputs."""
    if fan_in <= 2**8:
        return torch.uint8
    return torch.uint16 if fan_in <= 2**16 else torch.int32


def union(supports: list[Support]) -> tuple[Support, list[Tensor]]:
    """
    Union of several supports of one weight.

    Returns:
        The union (a table where every row has equally many entries, else ragged) and, per input, the int64 position
        `[entries]` of each of its entries in the union's entry order.
    """
    fan_in, rows = supports[0].fan_in, supports[0].rows
    keys = [s.row_of_entry() * fan_in + s.indices.reshape(-1).long() for s in supports]
    merged = torch.unique(torch.cat(keys), sorted=True)
    return support_of(merged, rows, fan_in), [torch.searchsorted(merged, key) for key in keys]


def support_of(positions: Tensor, rows: int, fan_in: int) -> Support:
    """
    The support with entries at `positions` of the flattened `[rows, fan_in]`, int64 and strictly increasing: a table
    where every row has equally many, else ragged.
    """
    columns = (positions % fan_in).to(torch.int32)
    counts = torch.bincount(positions // fan_in, minlength=rows)
    if int(counts.min()) == int(counts.max()):
        return Support(columns.view(rows, -1), fan_in)
    return Support(columns, fan_in, offsets_from_counts(counts))


def stacked(supports: list[Support]) -> Support:
    """One support over the rows of several weights of equal shapes, one after the other: ragged if one of them is, or
    if they differ in their entries per row."""
    if all(support.is_table for support in supports) and len({s.indices.shape[1] for s in supports}) == 1:
        return Support(torch.cat([support.indices for support in supports]), supports[0].fan_in)
    ragged = [support.ragged() for support in supports]
    counts = torch.cat([s.offsets[1:] - s.offsets[:-1] for s in ragged if s.offsets is not None])
    return Support(torch.cat([s.indices for s in ragged]), supports[0].fan_in, offsets_from_counts(counts))


def without_entries(rows: int, fan_in: int, device: torch.device | str = "cpu") -> Support:
    """The empty support of a weight."""
    empty = torch.zeros(0, dtype=torch.int32, device=device)
    return Support(empty, fan_in, torch.zeros(rows + 1, dtype=torch.int32, device=device))


def offsets_from_counts(counts: Tensor) -> Tensor:
    """int32 `[rows + 1]` row offsets from the number of entries per row."""
    offsets = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=counts.device)
    offsets[1:] = counts.cumsum(0)
    return offsets
