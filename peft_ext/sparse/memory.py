"""Memory of tensors: which of them share it, and whether this process alone may write it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef, shared_cache


SEEN_BY_OTHERS = "that other processes see (a shared storage, or a file mapped as shared)"
READ_ONLY = "that may not be written (a file mapped as read-only)"
_MAPS = Path("/proc/self/maps")


@dataclass(frozen=True)
class Region:
    """
    The memory of a tensor, from its first byte to its last. A tensor without memory (meta, sharded, packed) is one of
    its own, known by the object.
    """

    space: Hashable  # device and address of the storage, or the tensor's `id`
    start: int = 0  # the first byte within the storage
    end: int = 1  # the byte after the last
    layout: Hashable = None  # what else tells two tensors over the same bytes apart

    @classmethod
    def of(cls, tensor: Tensor) -> Region:
        address = _address(tensor)
        if not address:
            return cls(("object", id(tensor)))
        size = tensor.element_size()
        start = int(tensor.storage_offset()) * size
        last = sum((count - 1) * stride for count, stride in zip(tensor.shape, tensor.stride(), strict=True))
        layout = (tensor.dtype, tensor.shape, tensor.stride())
        return cls((tensor.device, address), start, start + (last + 1) * size, layout)

    def overlaps(self, other: Region) -> bool:
        """Whether they may have bytes in common: interleaved strides count as if they had."""
        return self.space == other.space and self.start < other.end and other.start < self.end


def _address(tensor: Tensor) -> int:
    """Of a tensor's storage; 0 if it has none."""
    if tensor.is_meta or tensor.numel() == 0:
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a subclass that holds its numbers elsewhere
        return 0


class Maps:
    """The operating system's account of this process's memory, read once; empty where there is none, as on others than
    Linux."""

    @cached_property
    def _regions(self) -> list[tuple[int, int, str]]:
        """First byte, end and permissions (`"rw-p"`: readable, writable, private), by address."""
        try:
            lines = _MAPS.read_text().splitlines()
        except OSError:
            lines = []
        regions = []
        for line in lines:
            span, permissions, *_ = line.split(maxsplit=2)
            start, end = (int(number, 16) for number in span.split("-"))
            regions.append((start, end, permissions))
        return regions

    def reason(self, start: int, end: int) -> str | None:
        """Reason why the bytes from `start` to `end` may not be written, or `None`."""
        number = max(bisect_right(self._regions, start, key=lambda region: region[0]) - 1, 0)
        for first, last, permissions in self._regions[number:]:
            if first >= end:
                break
            if last > start and "w" not in permissions:
                return READ_ONLY
            if last > start and "s" in permissions:
                return SEEN_BY_OTHERS
        return None


# By storage, each held weakly so that no other takes its name, with the address that was looked up: sharing a storage
# moves it to another.
_VERDICTS: dict[int, tuple[StorageWeakRef, int, str | None]] = {}


def why_not_ours(tensor: Tensor, maps: Maps | None = None) -> str | None:
    """
    Why this process must not write into a tensor's memory, even if it writes the old values back: `SEEN_BY_OTHERS` or
    `READ_ONLY`. `None` if it may, as into its private copy of a mapped file (`safetensors`, `torch.load(mmap=True)`).

    Memory that is new is looked up in Linux's `/proc/self/maps`, which `maps` holds for many tensors at once. On other
    systems only tensors in torch's own shared memory are found out.
    """
    address = _address(tensor)
    if not address:
        return None
    storage = tensor.untyped_storage()
    if tensor.is_cuda:  # where `is_shared()` is always true
        return SEEN_BY_OTHERS if _was_exchanged(storage) else None
    if not tensor.is_cpu:
        return None
    if storage.is_shared():
        return SEEN_BY_OTHERS
    known = _VERDICTS.get(storage._cdata)
    if known is None or known[1] != address:
        if not len(_VERDICTS) & (len(_VERDICTS) - 1):  # now and then, which is at powers of two
            for key, (held, *_) in list(_VERDICTS.items()):
                if held.expired():
                    _VERDICTS.pop(key, None)
        reason = (maps or Maps()).reason(address, address + storage.nbytes())
        known = _VERDICTS[storage._cdata] = (StorageWeakRef(storage), address, reason)
    return known[2]


def _was_exchanged(storage: UntypedStorage) -> bool:
    """Whether torch's multiprocessing has sent a storage to another process, or got it from one."""
    return bool(shared_cache) and any(held.cdata == storage._cdata for held in list(shared_cache.values()))
