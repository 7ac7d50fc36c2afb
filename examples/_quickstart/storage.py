"""What has to be kept on disk to have a trained model again, given the base model."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from safetensors.torch import save_file
from torch import nn


def save(model: nn.Module, folder: Path) -> int:
    """
    Save an adapter with PEFT, or the trained tensors of a model that PEFT had no part in.

    Returns:
        `int`: Bytes of the safetensors file. The trained classifier is in it for every method.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        model.save_pretrained(folder)
        return (folder / "adapter_model.safetensors").stat().st_size
    path = folder / "trained.safetensors"
    save_file({name: value.detach() for name, value in model.named_parameters() if value.requires_grad}, path)
    return path.stat().st_size
