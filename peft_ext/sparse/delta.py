"""The trained values of one adapter on one weight, with their support."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .ops import ConvGeometry, add_in_place, bypass, bypass_conv, may_add_in_place
from .ops.conv import entries_by_tap
from .support import FINGERPRINT_LENGTH, Support


class SparseDelta(nn.Module):
    """
    Values and support of one adapter on one weight, and what it adds to the layer's bias. A leaf module with a
    `weight`, which is what FSDP's wrapping policy in PEFT looks for.

    Args:
        support ([`Support`]):
            The entries; or zeros of the right shape if `pending`.
        dtype (`torch.dtype`):
            Of the values.
        pending (`bool`, *optional*, defaults to `False`):
            The support is a placeholder until a checkpoint is loaded; using it before is an error.
        taps (`int`, *optional*):
            Of a convolution's weight: the number of positions of its kernel.

    Attributes:
        weight (`nn.Parameter`): the values, `[rows, k]` or `[entries]`.
        bias (`nn.Parameter` or `None`): what is added to the layer's bias, `[rows]`.
        indices, offsets: see [`Support`]; `offsets` is `None` for a table.
        fingerprint (`torch.Tensor`): int64, see [`Support.fingerprint`]; zeros if unknown.
        transposed_entries, transposed_offsets: the entries grouped for backward, see [`Support.transposed`]; those of
            a convolution by kernel position, see [`entries_by_tap`].
    """

    weight: Tensor
    bias: Tensor | None
    indices: Tensor
    offsets: Tensor | None
    fingerprint: Tensor
    transposed_entries: Tensor
    transposed_offsets: Tensor
    taps: int | None

    def __init__(self, support: Support, dtype: torch.dtype, pending: bool = False, taps: int | None = None) -> None:
        super().__init__()
        self.taps = taps
        device = support.indices.device
        self.fan_in = support.fan_in
        self.weight = nn.Parameter(torch.zeros(support.indices.shape, dtype=dtype, device=device))
        self.register_parameter("bias", None)
        self.register_buffer("indices", support.indices)
        self.register_buffer("offsets", support.offsets)
        self.register_buffer("fingerprint", torch.zeros(FINGERPRINT_LENGTH, dtype=torch.int64, device=device))
        self.register_buffer("transposed_entries", None, persistent=False)
        if taps is None:
            self.register_buffer("transposed_offsets", None, persistent=False)
        else:  # no buffer: it stays on the CPU, where the loop over kernel positions reads it
            self.__dict__["transposed_offsets"] = None
        self.pending = pending
        self.checked = True  # whether the support was compared with the base weight since it was last set
        self.stale = True  # whether the transposed table is that of another support
        self.refresh()

    def add_bias(self) -> None:
        """Let the adapter also learn something to add to the layer's bias."""
        self.bias = nn.Parameter(self.weight.detach().new_zeros(self.support.rows))

    @property
    def names(self) -> list[str]:
        """Of its tensors in a state dict, which takes all processes to make where FSDP has wrapped the module."""
        optional = {"bias": self.bias, "offsets": self.offsets}
        return ["weight", "indices", "fingerprint", *(name for name, tensor in optional.items() if tensor is not None)]

    @property
    def support(self) -> Support:
        return Support(self.indices, self.fan_in, self.offsets)

    @torch.no_grad()
    def refresh(self) -> None:
        """
        Rebuild the transposed table after `indices` changed. Equal shapes keep their storage, so that a compiled
        model stays valid.

        Raises:
            `ValueError`: if the indices do not fit the weight.
        """
        if self.indices.is_meta:
            return
        if not self.pending:
            self.support.check()
        self.stale = False
        tables = self.support.transposed() if self.taps is None else entries_by_tap(self.indices, self.taps)
        for name, new in zip(("transposed_entries", "transposed_offsets"), tables, strict=True):
            old = getattr(self, name)
            if old is not None and old.shape == new.shape and old.device == new.device:
                old.copy_(new)
            else:
                setattr(self, name, new)

    def __setattr__(self, name: str, value: Any) -> None:
        # transformers' loader and load_state_dict(assign=True) put the file's tensor in place, in the file's dtype.
        is_new_support = name in ("indices", "offsets") and "transposed_entries" in self.__dict__.get("_buffers", {})
        if is_new_support and isinstance(value, Tensor):
            value = value.to(torch.int32)
        super().__setattr__(name, value)
        if is_new_support:
            self._support_was_set()
            if self.offsets is None:  # a ragged support is whole only when both of its tensors have arrived
                self.refresh()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        before = self.indices._version, id(self.indices)
        super()._load_from_state_dict(*args, **kwargs)
        if (self.indices._version, id(self.indices)) != before:
            self._support_was_set()
            self.refresh()

    def _support_was_set(self) -> None:
        self.pending = False
        self.checked = False
        self.stale = True

    def forward(self, result: Tensor, x: Tensor, geometry: ConvGeometry | None = None, owned: bool = False) -> Tensor:
        """`result + S x` by the bypass, and the bias if there is one: `result` `[..., rows]`, `x` `[..., fan_in]`;
        with `geometry`, as a convolution has them. `owned`: nobody else needs `result`, which may be overwritten."""
        if self.bias is not None:  # here, because FSDP1 has the parameters whole only while the module runs
            bias = self.bias.to(result.dtype)
            result = result + (bias if geometry is None else bias.view(-1, *[1] * len(geometry.kernel)))
        support = (self.indices, self.offsets, self.transposed_entries, self.transposed_offsets)
        if geometry is not None:
            return bypass_conv(result, x, self.weight, *support, geometry)
        if owned and may_add_in_place(result, x, self.weight):
            return add_in_place(result, x, self.weight, *support)
        return bypass(result, x, self.weight, *support)

    def extra_repr(self) -> str:
        shape = "x".join(map(str, self.weight.shape))
        extras = (", bias" if self.bias is not None else "") + (", pending" if self.pending else "")
        return f"values={shape}, fan_in={self.fan_in}{extras}"
