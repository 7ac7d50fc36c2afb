"""What a step keeps and allocates, measured apart from its time."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


def strided_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with a storage of their own that a tensor consists of (two for SHiRA's COO tensors)."""
    if tensor.layout == torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    else:
        yield tensor


def resident_storages(model: nn.Module) -> dict[int, int]:
    """Bytes by address of what outlives a step: parameters, buffers (masks of gradients too), and tensors in
    attributes and plain dicts, where sparse methods keep their indices."""
    tensors: list[Tensor] = []
    for module in model.modules():
        dicts = [vars(module), *(value for value in vars(module).values() if isinstance(value, dict))]
        tensors += [value for entries in dicts for value in entries.values() if isinstance(value, Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def resident_bytes(model: nn.Module) -> int:
    """Bytes of what outlives a step, each storage once."""
    return sum(resident_storages(model).values())


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """
    Bytes that a forward pass keeps for the backward pass, each storage once, without the model's own tensors.

    Whole storages are counted, since a saved view keeps the storage alive.
    """
    resident = resident_storages(model)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        for part in strided_parts(tensor):
            storage = part.untyped_storage()
            if storage.data_ptr() not in resident:
                kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()  # holds the graph, so that no counted address is freed and used again
    total = sum(kept.values())
    del loss
    return total


def allocations(work: Callable[[], object], device: torch.device) -> list[int]:
    """
    The sizes, in order, of what the allocator handed out (positive) and took back (negative) during some work.

    From the profiler, because it watches the allocator itself: a dispatch mode sees a custom op from outside only and
    would miss what is allocated inside. Scratch space that BLAS libraries get elsewhere is not seen.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities, profile_memory=True) as profiler:
        work()
        if cuda:
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    records = [event for event in events if event["name"] == "[memory]"]
    records = [event for event in records if (event["args"]["Device Type"] == 1) == cuda]
    return [event["args"]["Bytes"] for event in sorted(records, key=lambda event: event["ts"])]


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most that is allocated at once during some work, above what is there when it begins."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    live = peak = 0
    for size in allocations(work, device):
        live += size
        peak = max(peak, live)
    return peak


def adapter_file_bytes(model: nn.Module) -> int:
    """What `save_pretrained` writes as the adapter's weights; for a model that is no adapter, its trained tensors."""
    if not hasattr(model, "peft_config"):
        return sum(p.nbytes for p in model.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
