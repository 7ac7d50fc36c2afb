"""What runs inside an op: the tensors that it allocates and those that it keeps for backward."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class InsideOps(TorchDispatchMode):
    """Sees every operator that runs: also those called by our custom ops, which are entered, and inside composite
    ones, which are decomposed."""

    def meet(self, func: Any, args: Any, kwargs: Any) -> None:
        """Called with every operator, before it is entered, decomposed or run."""

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator that is neither entered nor decomposed."""
        return func(*args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.meet(func, args, kwargs)
        name = func._schema.name
        if name in OPDEFS:
            with self, torch.no_grad():
                return OPDEFS[name]._init_fn(*args, **kwargs)
        if func._can_decompose():
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        return self.run(func, args, kwargs)


class LargestAllocation(InsideOps):
    """Records the largest storage, in elements, that an operator returns without having got it."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.entered: set[str] = set()

    def meet(self, func: Any, args: Any, kwargs: Any) -> None:
        if func._schema.name in OPDEFS:
            self.entered.add(func._schema.name)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and _storage(leaf) not in given:
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Everything that a module and those in it hold, by name: parameters, buffers and plain tensors."""
    held = {name: {**part._parameters, **part._buffers, **vars(part)} for name, part in module.named_modules()}
    return {
        f"{name}.{key}": tensor
        for name, tensors in held.items()
        for key, tensor in tensors.items()
        if isinstance(tensor, Tensor)
    }


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def saved_for_backward(module: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of each storage that the graph keeps, by its address, apart from the tensors that the module holds, those
    that it makes meanwhile too."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if all(storage.data_ptr() != own.untyped_storage().data_ptr() for own in tensors_of(module).values()):
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that torch's CPU allocator has handed out at once during some work, above what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    live = peak = 0
    for event in sorted(changes, key=lambda event: (event["ts"], event["args"]["Ev Idx"])):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak
