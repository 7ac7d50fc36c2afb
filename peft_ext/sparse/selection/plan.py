"""From a selection's name and the targeted weights to one support per weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..support import Support, offsets_from_counts
from .criteria import Criterion, Magnitude, Random, Reverse, Scored
from .scopes import PASSES_OVERALL, top_overall, top_per_neuron


SCORED = ("gradient", "activation")  # criteria that need scores computed beforehand
CRITERIA = ("magnitude", "reverse", "random", *SCORED)
SCOPES = ("neuron", "layer", "network")
SELECTIONS: tuple[str, ...] = tuple(
    criterion if scope == "neuron" else f"{criterion}_{scope}" for criterion in CRITERIA for scope in SCOPES
)


def parse_selection(selection: str) -> tuple[str, str]:
    """
    Split a selection's name into criterion and scope: `"magnitude"` is per neuron, `"magnitude_network"` over all.

    Raises:
        `ValueError`: if the name is not one of `SELECTIONS`.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"selection={selection!r} is not known; choose one of {', '.join(SELECTIONS)}.")
    criterion, _, scope = selection.partition("_")
    return criterion, scope or "neuron"


def _criterion(name: str, seed: int, scores: Mapping[str, Callable[[], Tensor]] | None) -> Criterion:
    if name == "random":
        return Random(seed)
    if name in SCORED:
        return Scored(scores or {})
    return Magnitude() if name == "magnitude" else Reverse()


def select_supports(
    weights: Mapping[str, Callable[[], Tensor]],
    selection: str,
    k: int | Callable[[int, str], int],
    neuron_ratio: float = 1.0,
    seed: int = 0,
    scores: Mapping[str, Callable[[], Tensor]] | None = None,
    column_budget: int | None = None,
) -> dict[str, Support]:
    """
    Choose the trained entries of several weights.

    Args:
        weights: per module, a function that returns its weight as float `[rows, fan_in]`. Called once per pass, so
            that a dequantised weight lives no longer than needed.
        selection (`str`): one of `SELECTIONS`.
        k (`int` or `Callable`): entries per neuron, capped at the fan-in, or a function of fan-in and module;
            with a wider scope, the same total budget is distributed across the layer or network.
        neuron_ratio (`float`): share of neurons that get entries, drawn at random per weight.
        seed (`int`): for random choices.
        scores: per module, a function that returns scores `[rows, fan_in]`, for the criteria in `SCORED`; called once
            per pass.
        column_budget (`int`, *optional*): how many inputs of a weight its neurons choose among.

    Returns:
        Supports on their weight's device: tables, or ragged for a wider scope or a `neuron_ratio` below 1.
    """
    criterion_name, scope = parse_selection(selection)
    criterion = _criterion(criterion_name, seed, scores)
    entries = k if callable(k) else lambda fan_in, module: min(k, fan_in)
    passes = 1 if scope == "neuron" else 1 + PASSES_OVERALL  # one for the shapes
    with tqdm(total=passes * len(weights), desc="choosing entries", unit="weight", delay=1.0, leave=False) as bar:
        counted = {module: partial(_counted, weight, bar) for module, weight in weights.items()}
        if scope == "neuron":
            return {
                module: _per_neuron(criterion, module, weight(), entries, neuron_ratio, seed, column_budget)
                for module, weight in counted.items()
            }
        groups = [[module] for module in weights] if scope == "layer" else [list(weights)]
        return {
            module: support for group in groups for module, support in _overall(criterion, counted, group, entries)
        }


def _counted(weight: Callable[[], Tensor], bar: tqdm) -> Tensor:
    bar.update()
    return weight()


def _overall(
    criterion: Criterion,
    weights: Mapping[str, Callable[[], Tensor]],
    group: list[str],
    entries: Callable[[int, str], int],
) -> Iterable[tuple[str, Support]]:
    """As many entries of a group of weights as their neurons would have, wherever they lie."""
    shapes = {module: weights[module]().shape for module in group}
    budget = sum(rows * entries(fan_in, module) for module, (rows, fan_in) in shapes.items())
    passes = {module: lambda module=module: criterion.chunks(module, weights[module]()) for module in group}
    return top_overall(passes, budget, {module: shape[1] for module, shape in shapes.items()}).items()


def kept_neurons(rows: int, neuron_ratio: float) -> int:
    """Number of a weight's neurons that a `neuron_ratio` keeps: at least one."""
    return max(1, round(neuron_ratio * rows))


def _per_neuron(
    criterion: Criterion,
    module: str,
    weight: Tensor,
    entries: Callable[[int, str], int],
    ratio: float,
    seed: int,
    column_budget: int | None,
) -> Support:
    rows, fan_in = weight.shape
    if column_budget is None or column_budget >= fan_in:
        support = top_per_neuron(criterion.chunks(module, weight), entries(fan_in, module), fan_in)
    else:
        columns = _best_columns(criterion, module, weight, column_budget)
        chunks = (chunk[:, columns] for chunk in criterion.chunks(module, weight))
        among = top_per_neuron(chunks, entries(fan_in, module), column_budget)
        support = Support(columns[among.indices.long()].to(torch.int32), fan_in)
    if ratio == 1.0:
        return support
    order = torch.randperm(rows, generator=Random(seed).generator(f"neurons of {module}"))
    kept = torch.zeros(rows, dtype=torch.bool)
    kept[order[: kept_neurons(rows, ratio)]] = True
    kept = kept.to(weight.device)
    offsets = offsets_from_counts(kept * support.indices.shape[1])
    return Support(support.indices[kept].reshape(-1), fan_in, offsets)


def _best_columns(criterion: Criterion, module: str, weight: Tensor, count: int) -> Tensor:
    """The inputs with the largest sums of scores over all neurons, int64 `[count]`, increasing."""
    sums = torch.zeros(1, weight.shape[1], dtype=torch.float64, device=weight.device)
    for chunk in criterion.chunks(module, weight):
        sums += chunk.sum(0, dtype=torch.float64)
    return top_per_neuron([sums.float()], count, weight.shape[1]).indices[0].long()
