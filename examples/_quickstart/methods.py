"""The methods that the quick start compares: how each turns the pretrained model into a model to train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

from peft import LoraConfig, PeftConfig, ShiraConfig, SupertuningConfig, get_peft_model
from torch import nn

from peft_ext import NeuroAdaConfig


HEAD = "classifier"
# the linear layers of a transformers ViT block
TARGETS = ("q_proj", "v_proj", "k_proj", "o_proj", "fc1", "fc2")
LORA_RANK = 8


@dataclass(frozen=True)
class Method:
    """
    A row of the table.

    Args:
        name (`str`): Key in the JSON.
        label (`str`): What the table and the figure call it.
        learning_rate (`float`): Centre of the search grid; all grids have the same number of points and spacing.
        adapt (`Callable[[nn.Module, int], nn.Module]`):
            Takes a model that it may change and a seed; returns the model to train, of which only the method's
            parameters and the classifier require gradients.
    """

    name: str
    label: str
    learning_rate: float
    adapt: Callable[[nn.Module, int], nn.Module]


def through_peft(config: Callable[[nn.Module, int], PeftConfig]) -> Callable[[nn.Module, int], nn.Module]:
    return lambda model, seed: get_peft_model(model, config(model, seed))


def train_only(wanted: Callable[[str], bool]) -> Callable[[nn.Module, int], nn.Module]:
    """For the methods that train parameters which the model has already: PEFT has no part in them."""

    def adapt(model: nn.Module, seed: int) -> nn.Module:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted(name) or name.startswith(f"{HEAD}."))
        return model

    return adapt


def target_shapes(model: nn.Module) -> dict[str, list[tuple[int, int]]]:
    """Weight shapes `(rows, fan_in)` of the target layers, by the last part of their name."""
    shapes: dict[str, list[tuple[int, int]]] = {kind: [] for kind in TARGETS}
    for name, module in model.named_modules():
        kind = name.rpartition(".")[-1]
        if kind in shapes:
            shapes[kind].append(tuple(module.weight.shape))
    return shapes


def neuroada_count(model: nn.Module, k: int) -> int:
    """Parameters that NeuroAda trains with `k` bypasses per neuron: the yardstick for the other sparse tuners."""
    return sum(rows * min(k, fan_in) for shapes in target_shapes(model).values() for rows, fan_in in shapes)


def shira_budget(model: nn.Module, count: int) -> tuple[int, tuple[str, ...]]:
    """
    SHiRA's rank and target layers whose parameter count is closest to `count`.

    A rank gives rows + fan_in entries per weight, where k bypasses give rows, so rank 1 on all targets is already
    twice NeuroAda's k=1. Among the choices that come equally close the one with the most kinds of layers is taken.
    """
    cost = {kind: sum(map(sum, shapes)) for kind, shapes in target_shapes(model).items()}
    largest = max(1, -(-count // sum(cost.values())))
    choices = [
        (rank, kinds)
        for rank in range(1, largest + 1)
        for size in range(len(cost), 0, -1)
        for kinds in combinations(cost, size)
    ]
    return min(choices, key=lambda choice: abs(choice[0] * sum(cost[kind] for kind in choice[1]) - count))


def supertuning_sparsity(model: nn.Module, count: int) -> float:
    """The share of entries that Super-Tuning must leave alone to train `count` of them."""
    entries = sum(rows * fan_in for shapes in target_shapes(model).values() for rows, fan_in in shapes)
    # Super-Tuning rounds down per weight: half an entry keeps float error from costing one
    return 1 - (count + 0.5) / entries


def _shira(model: nn.Module, seed: int, k: int) -> ShiraConfig:
    rank, kinds = shira_budget(model, neuroada_count(model, k))
    return ShiraConfig(r=rank, target_modules=list(kinds), modules_to_save=[HEAD], random_seed=seed)


def methods(k: int) -> list[Method]:
    """All rows, NeuroAda with `k` bypasses per neuron first."""
    targets, head = list(TARGETS), [HEAD]
    return [
        Method(
            "neuroada",
            f"NeuroAda k={k}",
            1e-1,
            through_peft(lambda model, seed: NeuroAdaConfig(k=k, target_modules=targets, modules_to_save=head)),
        ),
        Method(
            "lora",
            f"LoRA r={LORA_RANK}",
            1e-2,
            through_peft(
                lambda model, seed: LoraConfig(
                    r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=targets, modules_to_save=head
                )
            ),
        ),
        Method("shira", "SHiRA", 1e-1, through_peft(lambda model, seed: _shira(model, seed, k))),
        Method(
            "supertuning",
            "Super-Tuning",
            3e-1,
            through_peft(
                lambda model, seed: SupertuningConfig(
                    sparsity=supertuning_sparsity(model, neuroada_count(model, k)),
                    target_modules=targets,
                    modules_to_save=head,
                )
            ),
        ),
        Method("bitfit", "BitFit", 3e-2, train_only(lambda name: name.endswith("bias"))),
        Method("probe", "Linear probe", 3e-1, train_only(lambda name: False)),
        Method("full", "Full fine-tuning", 1e-3, train_only(lambda name: True)),
    ]


def trained_parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters that are trained: those of the method, and those of the classifier."""
    counts = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[HEAD in name.split(".")] += parameter.numel()
    return counts[False], counts[True]
