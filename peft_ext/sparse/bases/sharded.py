"""Base weights that processes hold in pieces: FSDP2's `DTensor`s, DeepSpeed ZeRO-3's emptied parameters, and the flat
pieces of FSDP1, which can't be put together from outside."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...hf.adapter_state import without_wrappers
from ...hf.internals import adapter_key_prefixes, filter_by_key_prefixes


def is_sharded(weight: Tensor) -> bool:
    """Whether this process has only a piece of a weight, and the whole can be gathered."""
    return isinstance(weight, DTensor) or hasattr(weight, "ds_id")


def whole(weight: Tensor) -> Tensor:
    """
    A weight in full: itself, or if it is sharded a gathered copy, for which all processes have to call this.
    DeepSpeed's weights have no elements, and their shape in `ds_shape`.
    """
    if isinstance(weight, DTensor):
        return weight.full_tensor().detach()
    if hasattr(weight, "ds_id"):
        zero = importlib.import_module("deepspeed").zero
        with zero.GatheredParameters([weight], modifier_rank=None):
            return weight.detach().clone()
    return weight


def is_first_of(weight: Tensor) -> bool:
    """Whether this process is the first of those that FSDP2 has sharded a weight over, or holds the whole weight."""
    return not isinstance(weight, DTensor) or not any(weight.device_mesh.get_coordinate() or ())


def make_equal(tensors: Iterable[Tensor], weight: Tensor) -> bool:
    """Overwrite tensors by those of the first of the processes that FSDP2 has sharded a weight over, which all have to
    call this. Whether the weight is such a one; else nothing is done."""
    if not isinstance(weight, DTensor):
        return False
    for tensor in tensors:
        sent = tensor.to(weight.device_mesh.device_type)
        for dim in range(weight.device_mesh.ndim):
            group = weight.device_mesh.get_group(dim)
            dist.broadcast(sent, dist.get_global_rank(group, 0), group=group)
        tensor.copy_(sent)
    return True


def shape_of(weight: Tensor) -> torch.Size:
    """The shape of a whole weight."""
    return getattr(weight, "ds_shape", weight.shape)


def check_gatherable(name: str, weight: Tensor, rows: int, fan_in: int) -> None:
    """
    Raises:
        `ValueError`: if a weight is a piece that can't be put together: FSDP1 flattens several weights into one.
    """
    if not is_sharded(weight) and not weight.is_meta and weight.numel() < rows * fan_in:
        raise ValueError(
            f"The weight of '{name}' has {weight.numel()} of its {rows} x {fan_in} numbers in this process: FSDP1 has "
            "sharded it. Adapt the model first, and shard it then (accelerator.prepare, Trainer.train)."
        )


def with_wrapped(model: nn.Module, state_dict: dict[str, Tensor], selected: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors that PEFT selected from a state dict, and those in wrappers, which it does not find."""
    prefixes = {without_wrappers(prefix) for prefix in adapter_key_prefixes(model)}
    return {**filter_by_key_prefixes(state_dict, prefixes), **selected}
