"""The trained values of one adapter on one weight, with their support."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from .another_base import accepts_another_base
from .bases.sharded import is_first_of, make_equal
from .fingerprint import FINGERPRINT_LENGTH
from .ops import ConvGeometry, add_in_place, bypass, may_add_in_place
from .ops.standard import is_exporting_to_onnx, standard_update
from .support import Support
from .transposed import WithTransposedTable


# Relative: what averaging equal numbers in fp32 may move them by; 0.17 * 2^-10 in 3000 steps of a decay of 0.9999.
AVERAGING_TOLERANCE = 2.0**-10
# Of an adapter, the tensors that are about to be loaded and known to fit.
_fitting: WeakKeyDictionary[SparseDelta, dict[str, ref[Tensor]]] = WeakKeyDictionary()
_INTEGERS = (torch.uint8, torch.uint16, torch.uint32, torch.int8, torch.int16, torch.int32, torch.int64)


class SparseDelta(WithTransposedTable):
    """
    Values and support of one adapter on one weight, and what it adds to the layer's bias. A leaf module with a
    `weight`, which is what FSDP's wrapping policy in PEFT looks for.

    The support and the fingerprint say which adapter this is, and no training moves them. So they are no buffers,
    which moving averages, casts and broadcasts treat as numbers. They follow the values to their device, keep their
    dtype, and enter a state dict as copies. One consequence: `torch.func.stack_module_state` does not see them, so the
    models of such an ensemble must have the same entries.

    Args:
        support ([`Support`]):
            The entries; or zeros of the right shape if `pending`.
        dtype (`torch.dtype`):
            Of the values.
        pending (`bool`, *optional*, defaults to `False`):
            The support is a placeholder until a checkpoint is loaded; using it before is an error.
        taps (`int`, *optional*):
            Of a convolution's weight: the number of positions of its kernel.
        experts (`int`, *optional*):
            Of a weight of experts: how many there are. Each has an equal share of the rows.

    Attributes:
        weight (`nn.Parameter`): the values, `[rows, k]` or `[entries]`.
        bias (`nn.Parameter` or `None`): what is added to the layer's bias, `[rows]`.
        indices, offsets: see [`Support`]; `offsets` is `None` for a table.
        fingerprint (`torch.Tensor`): int64 on the CPU, see [`Support.fingerprint`]; zeros if unknown.
        transposed_entries, transposed_offsets: the entries grouped for backward, see [`Support.transposed`]; those of
            a convolution by kernel position, see [`entries_by_tap`], whose offsets stay on the CPU; those of experts
            for each expert. Made at the first use.
    """

    weight: Tensor
    bias: Tensor | None
    fingerprint: Tensor

    def __init__(
        self,
        support: Support,
        dtype: torch.dtype,
        pending: bool = False,
        taps: int | None = None,
        experts: int | None = None,
    ) -> None:
        super().__init__()
        self.taps, self.experts = taps, experts
        device = support.indices.device
        self.fan_in = support.fan_in
        self.weight = nn.Parameter(torch.zeros(support.indices.shape, dtype=dtype, device=device))
        self.register_parameter("bias", None)
        self.__dict__.update(
            indices=support.indices,
            offsets=support.offsets,
            fingerprint=torch.zeros(FINGERPRINT_LENGTH, dtype=torch.int64),
        )
        self.pending = pending
        self.scale = 1.0  # what the values are multiplied by, at inference
        self.checked = True  # whether the support was compared with the base weight since it was last set
        self.stale = True  # whether the indices changed since they were last checked
        self.refresh()

    def add_bias(self) -> None:
        """Let the adapter also learn something to add to the layer's bias."""
        self.bias = nn.Parameter(self.weight.detach().new_zeros(self.support.rows))

    @property
    def values(self) -> Tensor:
        """The trained values, scaled: they are added to the entries."""
        return self.weight if self.scale == 1.0 else self.weight * self.scale

    @property
    def added_bias(self) -> Tensor | None:
        """The trained bias, scaled: it is added to the layer's bias."""
        return self.bias if self.bias is None or self.scale == 1.0 else self.bias * self.scale

    @property
    def identity(self) -> dict[str, Tensor]:
        """By their names in a state dict, the tensors that say which adapter this is."""
        offsets = {} if self.offsets is None else {"offsets": self.offsets}
        return {"indices": self.indices, **offsets, "fingerprint": self.fingerprint}

    @property
    def names(self) -> list[str]:
        """Of its tensors in a state dict, which takes all processes to make where FSDP has wrapped the module."""
        return ["weight", *([] if self.bias is None else ["bias"]), *self.identity]

    # ------------------------------------------------------------------ devices

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseDelta:
        super()._apply(fn, recurse)
        self.place(fn(torch.empty(1, device=self.indices.device)).device)
        return self

    def place(self, device: torch.device) -> None:
        """Bring the support to a device. One that comes from the meta device is a placeholder again."""
        if device == self.indices.device:
            return
        for name in ("indices", "offsets", "_transposed_entries", "_transposed_offsets"):
            tensor = getattr(self, name)
            if tensor is not None and (self.taps is None or name != "_transposed_offsets"):
                here = tensor.to(device) if not tensor.is_meta else torch.zeros_like(tensor, device=device)
                self.pending |= tensor.is_meta
                self.__dict__[name] = here

    # ------------------------------------------------------------------ state dicts

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Copies, for there are moving averages that write into what a state dict holds.
        # What waits on the meta device has no fingerprint yet.
        device = self.weight.device if self.weight.is_meta else None
        copies = {name: tensor.clone().to(device=device) for name, tensor in self.identity.items()}
        destination.update({f"{prefix}{name}": copy for name, copy in copies.items()})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        taken: dict[str, Tensor] = {}
        fitting = _fitting.pop(self, {})
        for name, here in self.identity.items():
            given = state_dict.pop(f"{prefix}{name}", None)
            if given is None or name not in fitting or fitting[name]() is not given:
                fitting = {}
            if given is None:
                # torch hands other processes than the first the parameters alone (set_model_state_dict).
                missing_keys += [f"{prefix}{name}"] if is_first_of(self.weight) else []
            elif given.shape != here.shape:
                error_msgs.append(f"size mismatch for {prefix}{name}: {tuple(given.shape)} and {tuple(here.shape)}.")
            else:
                try:
                    settled = self.settled(name, given)
                except ValueError as error:
                    error_msgs.append(f"{prefix}{name}: {error}")
                else:
                    taken |= {name: settled} if settled is not here else {}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not self.weight.is_meta:
            self.place(self.weight.device)
        for name, given in taken.items():
            getattr(self, name).copy_(given)
        is_changed = make_equal(self.identity.values(), self.weight)
        if is_changed or "indices" in taken:
            self._support_was_set()
            if is_changed or not fitting:
                self.refresh()
            elif not self.indices.is_meta:
                self.checked = True
                self.follow_indices()

    def expect(self, fitting: Mapping[str, Tensor]) -> None:
        """Told of the tensors of `identity` that are about to be loaded, after they were compared with the base
        weight: that takes as long as reading them, so it is done once."""
        _fitting[self] = {name: ref(fitting[name]) for name in self.identity}

    def is_own_average(self, name: str, given: Tensor) -> bool:
        """Whether floating-point numbers are those of this adapter's `identity`, but for what an average or a cast has
        rounded: nothing tells of others which integers they were."""
        here = self.identity[name]
        if not given.is_floating_point() or given.shape != here.shape:
            return False
        if self.pending or here.is_meta or given.is_meta:
            return False
        difference = (given.detach().to(here.device).double() - here.double()).abs()
        return bool((difference <= AVERAGING_TOLERANCE * here.double().abs()).all())

    def settled(self, name: str, given: Tensor) -> Tensor:
        """
        One of the tensors of `identity` as it comes from a file or a state dict, in the dtype that it has here.

        Raises:
            `ValueError`: if they are no integers that fit, nor an average of this adapter's.
        """
        here = self.identity[name]
        if self.is_own_average(name, given):
            return here
        if given.dtype not in _INTEGERS:
            raise ValueError(
                f"these are no integers but {given.dtype} numbers, and not the ones that this adapter has there, as a "
                "cast leaves them or an average of adapters with different entries. Cast and average the values "
                "('weight', 'bias') only, or load the average over an adapter with the same entries."
            )
        whole = given.detach().to(here.dtype)
        is_wider = torch.iinfo(given.dtype).max > torch.iinfo(here.dtype).max
        if is_wider and not given.is_meta and not torch.equal(whole.long(), given.detach().long()):
            raise ValueError(f"these {given.dtype} numbers do not fit into {here.dtype}, which is needed.")
        return whole

    def __setattr__(self, name: str, value: Any) -> None:
        # transformers' loader puts the file's tensor in place, in the file's dtype and as a parameter.
        if name not in ("indices", "offsets", "fingerprint") or not isinstance(value, Tensor):
            super().__setattr__(name, value)
            return
        self.__dict__[name] = self.settled(name, value)
        if name != "fingerprint":
            self._support_was_set()
            if self.offsets is None:  # a ragged support is whole only when both of its tensors have arrived
                self.refresh()

    def _support_was_set(self) -> None:
        self.pending = False
        self.checked = accepts_another_base()
        self.stale = True

    def forward(
        self,
        result: Tensor,
        x: Tensor,
        geometry: ConvGeometry | None = None,
        owned: bool = False,
        ends: Tensor | None = None,
    ) -> Tensor:
        """`result + S x` by the bypass, and the bias if there is one: `result` `[..., rows]`, `x` `[..., fan_in]`;
        with `geometry`, as a convolution has them; with `ends`, as [`bypass`] takes them. `owned`: nobody else
        needs `result`, which may be overwritten."""
        if ends is not None:
            return self._add_to_experts(result, x, ends)
        values, bias = self.values, self.added_bias
        if bias is not None:  # here, because FSDP1 has the parameters whole only while the module runs
            bias = bias.to(result.dtype)
            result = result + (bias if geometry is None else bias.view(-1, *[1] * len(geometry.kernel)))
        if is_exporting_to_onnx():
            return standard_update(result, x, values, self.indices, self.offsets, self.fan_in, geometry)
        if owned and may_add_in_place(result, x, values):
            return add_in_place(result, x, values, *self.tables)
        return bypass(result, x, values, *self.tables, geometry=geometry)

    def _add_to_experts(self, result: Tensor, x: Tensor, ends: Tensor) -> Tensor:
        if is_exporting_to_onnx():
            raise NotImplementedError(
                "Adapters on fused experts have no operators that ONNX knows. Merge them first: model.merge_adapter()."
            )
        if self.added_bias is not None:
            result = result + _of_experts(self.added_bias, ends, result)
        return bypass(result, x, self.values, *self.tables, ends)

    def extra_repr(self) -> str:
        shape = "x".join(map(str, self.weight.shape))
        extras = (", bias" if self.bias is not None else "") + (", pending" if self.pending else "")
        return f"values={shape}, fan_in={self.fan_in}{extras}"


def _of_experts(bias: Tensor, ends: Tensor, result: Tensor) -> Tensor:
    """Of each row of `result` `[tokens, rows]`, sorted by expert, what is added to its expert's bias."""
    token = torch.arange(len(result), device=ends.device)
    expert = torch.searchsorted(ends, token, right=True).clamp(max=len(ends) - 1)
    return bias.view(len(ends), -1).to(result.dtype)[expert]
