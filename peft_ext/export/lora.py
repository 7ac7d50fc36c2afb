"""A sparse adapter as a LoRA: exact where its entries lie in few columns or rows, else the nearest of a given rank."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..hf.adapter_state import PEFT_PREFIX
from ..sparse.bases.padding import CONVOLUTIONS
from .adapter import AdapterFile, Entries
from .folder import filled_at_once
from .names import empty_model


Biases = Literal["refuse", "drop", "lora_bias"]
_SMALL = 1024  # up to this many rows or columns all singular vectors are computed


@dataclass(frozen=True)
class LoraExport:
    """
    What [`export_lora`] has written.

    Attributes:
        rank (`int`): of the LoRA.
        exact_ranks (`dict[str, int]`): per module, the rank at which its update is exact.
        errors (`dict[str, float]`): per module that did not fit, the 2-norm of the difference to its update,
            relative to the update's.
        error (`float`): the same over all modules; 0.0 if the LoRA is exact.
        notes (`list[str]`): what a user should know.
    """

    rank: int
    exact_ranks: dict[str, int]
    errors: dict[str, float]
    error: float
    notes: list[str]


@torch.no_grad()
def export_lora(
    adapter: str | os.PathLike[str], out: str | os.PathLike[str], rank: int = 64, biases: Biases = "refuse"
) -> LoraExport:
    """
    Write a sparse adapter as a LoRA, for software that knows no other adapters.

    An update whose entries lie in c columns, or in c rows, is exactly a LoRA of rank c. If c is at most `rank` in
    every module, the LoRA is exact, and its rank is the largest c. A module with more columns and rows gets the
    nearest update of rank `rank` (truncated SVD, as PEFT's `convert_to_lora`), and the error is measured. All modules
    have the same rank and the scale 1, as vLLM and llama.cpp expect.

    Args:
        adapter (`str`):
            Folder or Hub id of the adapter.
        out (`str`):
            Folder to write to, new or empty.
        rank (`int`, *optional*, defaults to 64):
            The largest rank allowed.
        biases (`str`, *optional*, defaults to `"refuse"`):
            What to do with trained biases, for which LoRA has no place. `"refuse"`: raise an error. `"drop"`: leave
            them out. `"lora_bias"`: write them in PEFT's way, which PEFT loads and vLLM does not.

    Returns:
        [`LoraExport`]: Ranks and errors.

    Raises:
        `ValueError`: If the adapter is not a sparse one, trains biases, adapts layers that LoRA has no form for, or an
            argument is not valid.
    """
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank={rank!r} must be a whole number above 0.")
    if biases not in ("refuse", "drop", "lora_bias"):
        raise ValueError(f"biases={biases!r} must be 'refuse', 'drop' or 'lora_bias'.")
    with AdapterFile(adapter) as opened, filled_at_once(Path(out), last=CONFIG_NAME) as folder:
        opened.require_sparse("exporting files")
        notes: list[str] = []
        layers = _layers(opened, notes)
        with_biases = _with_biases(opened, biases, notes)
        exact = {name: exact_rank(opened.entries(name)) for name in opened.modules}
        used = min(rank, max([1, *exact.values()]))
        tensors: dict[str, Tensor] = {}
        errors: dict[str, float] = {}
        lost = total = 0.0
        for name in opened.modules:
            entries = opened.entries(name)
            down, up, difference = factors(entries, used)
            size = float(entries.values.double().norm())
            lost, total = lost + difference**2, total + size**2
            if exact[name] > used:
                errors[name] = difference / size
            prefix = f"{PEFT_PREFIX}{name}.lora_"
            tensors[f"{prefix}A.weight"], tensors[f"{prefix}B.weight"] = _shaped(layers[name], down, up)
            if with_biases:
                bias = entries.bias
                tensors[f"{prefix}B.bias"] = torch.zeros(len(up)) if bias is None else bias.float()
        tensors |= {key: opened.tensor(key) for _, key in opened.whole()}
        tensors |= {key: opened.tensor(key) for _, key, _ in opened.tokens()}
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        _config(opened, used, with_biases, layers).save_pretrained(str(folder))
    return LoraExport(used, exact, errors, (lost / total) ** 0.5 if total else 0.0, notes)


def exact_rank(entries: Entries) -> int:
    """The number of columns, or of rows if they are fewer, that a module's update is not zero in."""
    rows, columns = _places(entries)
    return min(rows.unique().numel(), columns.unique().numel())


def factors(entries: Entries, rank: int) -> tuple[Tensor, Tensor, float]:
    """
    A module's update as a product: fp32 A `[rank, fan_in]` and B `[rows, rank]`, filled up with zeros where a lower
    rank does, and the Frobenius norm of `B A` minus the update.
    """
    support = entries.support
    row, column = _places(entries)
    rows, row = row.unique(return_inverse=True)
    columns, column = column.unique(return_inverse=True)
    values = entries.values.reshape(-1)
    update = torch.zeros(len(rows), len(columns))  # without the rows and columns that are zero
    update[row, column] = values[values != 0].float()
    down, up = torch.zeros(rank, support.fan_in), torch.zeros(support.rows, rank)
    small = min(update.shape)
    if small <= rank:
        one = torch.eye(small)
        left, right = (update, one) if update.shape[1] == small else (one, update)
    else:
        u, s, v = torch.linalg.svd(update, full_matrices=False) if small <= _SMALL else _leading(update, rank)
        left, right = u[:, :rank] * s[:rank].sqrt(), s[:rank].sqrt()[:, None] * v[:rank]
    up[rows, : left.shape[1]] = left
    down[: right.shape[0], columns] = right
    return down, up, float((left.double() @ right.double() - update.double()).norm())


def _places(entries: Entries) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries that are not zero."""
    changed = entries.values.reshape(-1) != 0
    return entries.support.row_of_entry()[changed], entries.support.indices.reshape(-1).long()[changed]


def _leading(update: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(update, q=min(rank + 16, min(update.shape)), niter=6)
    return u, s, v.t()


def _layers(adapter: AdapterFile, notes: list[str]) -> dict[str, Any]:
    """The base model's layers by name; `None` where they can't be told."""
    base = adapter.config.base_model_name_or_path
    model = empty_model(base) if base else None
    known = {} if model is None else dict(model.named_modules())
    if model is None:
        notes.append(
            f"The base model ({base or 'not named'}) is not at hand, so all modules are taken for linear layers."
        )
    layers: dict[str, Any] = {}
    for name in adapter.modules:
        prefix = getattr(model, "base_model_prefix", "")
        found = known.get(name, known.get(f"{prefix}.{name}", known.get(name.removeprefix(f"{prefix}."))))
        parent = known.get(name.rpartition(".")[0])
        grouped = isinstance(found, CONVOLUTIONS) and found.groups > 1
        is_fused = name in (adapter.config.expert_weights or ())
        if grouped or is_fused or isinstance(parent, nn.MultiheadAttention):
            what = "a grouped convolution" if grouped else "a projection of nn.MultiheadAttention"
            what = "a weight of fused experts" if is_fused else what
            raise ValueError(f"'{name}' is {what}, which LoRA has no exact form for. Merge the adapter instead.")
        layers[name] = found
    return layers


def _with_biases(adapter: AdapterFile, biases: str, notes: list[str]) -> bool:
    trained = []
    for name in adapter.modules:
        bias = adapter.entries(name).bias
        if bias is not None and bool(bias.any()):
            trained.append(name)
    if trained and biases == "refuse":
        raise ValueError(
            f"{adapter.name} trains the biases of {len(trained)} modules, such as '{trained[0]}', which LoRA has no "
            "place for. Pass --biases drop to leave them out (the model then computes something else), --biases "
            "lora_bias for PEFT alone, or merge the adapter."
        )
    if trained and biases == "drop":
        notes.append(f"The trained biases of {len(trained)} modules are left out.")
    if trained and biases == "lora_bias":
        notes.append("Biases are written as PEFT's lora_bias, which vLLM does not load.")
    return bool(trained) and biases == "lora_bias"


def _shaped(layer: Any, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(layer, CONVOLUTIONS):
        return down, up
    shape = layer.weight.shape
    return down.view(len(down), *shape[1:]), up.view(*up.shape, *[1] * (len(shape) - 2))


def _config(adapter: AdapterFile, rank: int, with_biases: bool, layers: dict[str, Any]) -> LoraConfig:
    config: Any = adapter.config
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=adapter.modules,
        lora_bias=with_biases,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
        inference_mode=True,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
    )
