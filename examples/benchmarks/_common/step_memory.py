"""What a training step keeps and allocates: of a whole model, and of one layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .memory import adapter_file_bytes, allocations, peak_bytes, resident_bytes, saved_bytes
from .methods import Method, adapt
from .models import SingleLinear
from .steps import Stepper


def layer_memory(method: Method, width: int, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """One square layer inside a network: what it saves, and how many weight-sized tensors a pass allocates."""
    layer = adapt(SingleLinear(width, width, dtype, device), method, ["proj"])
    # A quarter as many tokens as the weight has rows: whatever is as large as the weight is not an activation.
    x = torch.randn(width // 4, width).to(device, dtype).requires_grad_(True)

    def forward() -> Tensor:
        return layer(x)

    def forward_backward() -> None:
        out = forward()
        out.backward(torch.ones_like(out))
        layer.zero_grad()
        x.grad = None

    forward_backward()  # the first pass may set up what later passes reuse
    weight_bytes = width * width * dtype.itemsize
    return {
        "layer_saved_bytes": saved_bytes(layer, forward),
        "layer_weight_sized_allocations": sum(size >= weight_bytes for size in allocations(forward_backward, device)),
    }


def model_memory(model: nn.Module, stepper: Stepper, device: torch.device) -> dict[str, int]:
    """Bytes of a step of the whole model; the model has taken steps before, so the optimiser's state exists."""

    def forward() -> Tensor:
        return model(**stepper.batch).loss

    model.zero_grad()
    return {
        "saved_bytes": saved_bytes(model, forward),
        "peak_bytes": peak_bytes(stepper, device),
        "resident_bytes": resident_bytes(model),
        "optimizer_bytes": stepper.optimizer_bytes(),
        "file_bytes": adapter_file_bytes(model),
    }
