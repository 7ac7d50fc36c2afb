"""Which entries NeuroAda and GPS train, and the loss that GPS scores with."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_ext import GPSConfig, NeuroAdaConfig, SupervisedContrastiveLoss
from peft_ext.sparse.layers import SparseLayer

from .loading import Row, as_on_a_gpu_of_its_time, published, relative


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _entries(model: nn.Module) -> dict[str, set[tuple[int, int]]]:
    """Row and column of every trained entry, by the name of the module in the base model."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLayer):
            indices = layer.deltas["default"].indices.tolist()
            found[name.removeprefix("base_model.model.")] = {(r, int(c)) for r, row in enumerate(indices) for c in row}
    return found


def _shared(ours: dict[str, set[Any]], theirs: dict[str, set[Any]]) -> str:
    """How many entries both have."""
    assert ours.keys() == theirs.keys(), (ours.keys(), theirs.keys())
    total = sum(map(len, theirs.values()))
    return f"{sum(len(ours[name] & theirs[name]) for name in ours):,} of {total:,} entries in common"


def neuroada(code: Path) -> Iterator[Row]:
    module = published(code, "NeuroAda", "utils/select_para.py", stubs=("wandb", "tqdm"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    ids = torch.randint(64, (4, 12))
    base(input_ids=ids, labels=ids).loss.backward()
    gradients = {name.removesuffix(".weight"): p.grad for name, p in base.named_parameters()}
    for k in (1, 4, 20):
        for selection, kind, source in (
            ("magnitude", "perCell_add", "mag"), ("reverse", "perCell_add_reverse", "mag"),
            ("gradient", "perCell_add", "gra"),
        ):  # fmt: skip
            if k != 4 and selection != "magnitude":
                continue
            model = copy.deepcopy(base)
            for (_, theirs), (_, ours) in zip(model.named_parameters(), base.named_parameters(), strict=True):
                theirs.grad = ours.grad
            with as_on_a_gpu_of_its_time():
                positions = module.select_perCell(
                    model, k, source, "position", selectallhead=False, target_modules=TARGETS, peft_type=kind
                )
            theirs = {n.removesuffix(".weight"): set(map(tuple, p.tolist())) for n, p in positions.items()}
            options = NeuroAdaConfig(k=k, selection=selection, target_modules=TARGETS)
            if selection == "gradient":
                options = options.with_scores(gradients)
            result = _shared(_entries(get_peft_model(copy.deepcopy(base), options)), theirs)
            yield Row(
                "NeuroAda", "NeuroAda `select_perCell`", f"entries, `{selection}`, k={k}, a Llama of 2 layers", result
            )


class _Vision(nn.Module):
    """A network with the names that GPS's published code goes by. No ReLU: a dead neuron's gradients are all zero, and
    ties are broken differently."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 24, 4, stride=4)
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(72, 24)
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.patch_embed(images).flatten(2).mean(dim=2)
        return self.head(self.norm(self.proj(nn.functional.gelu(self.qkv(features)))))


def gps(code: Path) -> Iterator[Row]:
    pruning = published(code, "GPS", "utils/pruning.py")
    torch.manual_seed(0)
    base = _Vision()
    nn.functional.cross_entropy(base(torch.randn(16, 3, 16, 16)), torch.randint(5, (16,))).backward()
    targets = ["patch_embed", "qkv", "proj"]
    gradients = {name: base.get_submodule(name).weight.grad for name in targets}
    for k in (1, 5):
        with as_on_a_gpu_of_its_time():
            masks = pruning.prune_by_percentile_gradient_perCell(base, k)
        theirs = {
            name: set(map(tuple, torch.nonzero(masks[f"{name}.weight"].flatten(1) == 0).tolist())) for name in targets
        }
        config = GPSConfig(k=k, target_modules=targets, modules_to_save=["head"]).with_scores(gradients)
        result = _shared(_entries(get_peft_model(copy.deepcopy(base), config)), theirs)
        yield Row(
            "GPS", "GPS `prune_by_percentile_gradient_perCell`", f"entries, k={k}, one convolution, two layers", result
        )


def contrastive(code: Path) -> Iterator[Row]:
    losses = published(code, "GPS", "utils/loss_utils.py")
    torch.manual_seed(0)
    for normalize in (True, False):
        views = torch.randn(12, 2, 32, dtype=torch.float64, requires_grad=True)
        labels = torch.arange(12) % 4
        theirs = losses.SupConLoss(temperature=0.07, normalize=normalize)(views, labels)
        ours = SupervisedContrastiveLoss(temperature=0.07, normalize=normalize)(
            torch.cat(views.unbind(dim=1)), labels.repeat(2)
        )
        (expected,), (actual,) = torch.autograd.grad(theirs, views), torch.autograd.grad(ours, views)
        yield Row(
            "`SupervisedContrastiveLoss`",
            "GPS `SupConLoss`",
            f"value and gradient, 12 samples × 2 views, normalize={normalize}",
            f"value {relative(ours.detach(), theirs.detach()):.0e}, gradient {relative(actual, expected):.0e}",
        )
