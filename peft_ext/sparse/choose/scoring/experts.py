"""What data does to fused experts: which tokens reach them, and their gradients at little memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ....preserve import preserved
from ...bases.bank_product import WatchedForward
from ...bases.experts import ExpertBank
from ...bases.neurons import base_model_of
from ...bases.sharing import identity
from ...checks import check_share
from ..experts import expert_modules
from .arguments import check_scoring
from .batches import batches, forward


class SeenInputs:
    """
    Sums over the tokens that entered a layer of experts: how many, fp64 `[experts]`, and their magnitudes, fp64
    `[experts, fan_in]`.
    """

    def __init__(self, bank: ExpertBank) -> None:
        device = bank.parameter.device
        self.tokens = torch.zeros(bank.number, dtype=torch.float64, device=device)
        self.magnitudes = torch.zeros(bank.number, bank.in_features, dtype=torch.float64, device=device)

    def add(self, x: Tensor, ends: Tensor) -> None:
        """Count tokens `[tokens, fan_in]`, sorted by expert. Llama 4 sends every token to every expert, as zeros where
        it is not routed to: these are none."""
        magnitude = x.detach().abs()
        end = 0
        for expert, last in enumerate(ends.tolist()):
            own, end = magnitude[end:last], max(end, last)
            self.magnitudes[expert] += own.sum(0, dtype=torch.float64)
            self.tokens[expert] += own.any(1).sum()

    def mean(self) -> Tensor:
        """`[experts, fan_in]`, the mean magnitudes of each expert's inputs; zero for one without tokens."""
        return self.magnitudes / self.tokens.clamp(min=1)[:, None]


@contextmanager
def experts_watched(banks: Mapping[str, ExpertBank]) -> Iterator[dict[str, SeenInputs]]:
    """While the context is open, what enters layers of experts is summed up, by their names."""
    seen = {name: SeenInputs(bank) for name, bank in banks.items()}
    by_identity = {identity(bank): seen[name] for name, bank in banks.items()}

    def watch(bank: ExpertBank, x: Tensor, ends: Tensor) -> None:
        if identity(bank) in by_identity:
            by_identity[identity(bank)].add(x, ends)

    owners = {id(bank.owner): bank.owner for bank in banks.values()}.values()
    before = [(owner, vars(owner).get("forward")) for owner in owners]
    try:
        for owner in owners:
            vars(owner)["forward"] = WatchedForward(owner, watch)
        yield seen
    finally:
        for owner, original in before:
            vars(owner).pop("forward")
            if original is not None:
                vars(owner)["forward"] = original


@contextmanager
def experts_grouped(layers: Mapping[str, Any]) -> Iterator[None]:
    """
    While the context is open, scored experts compute one product of all experts. Its backward pass makes a layer's
    gradient once; that of transformers' other implementations makes one of the same size for every expert or token.
    """
    banks = [bank for bank in layers.values() if isinstance(bank, ExpertBank) and _is_aligned(bank)]
    owned: list[Any] = [getattr(bank.owner, "config", None) for bank in banks]
    named = ("eager", "batched_mm")
    configs = {id(c): c for c in owned if getattr(c, "_experts_implementation", None) in named}.values()
    before = [(config, config._experts_implementation_internal) for config in configs]
    try:
        for config in configs:
            config._experts_implementation_internal = "grouped_mm"
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation_internal = implementation


def _is_aligned(bank: ExpertBank) -> bool:
    """Whether torch's grouped product takes the weight: rows of whole multiples of 16 bytes."""
    weight = bank.parameter
    return all(size * weight.element_size() % 16 == 0 for size in (bank.rows, bank.in_features))


def busiest_experts(
    model: nn.Module,
    dataloader: Iterable[Any],
    share: float = 0.25,
    *,
    max_batches: int | None = None,
    progress: bool = True,
) -> dict[str, list[int]]:
    """
    Find the experts to which most tokens of the data are routed, in each layer of a mixture of experts. Pass the
    result to `experts_to_transform`.

    Args:
        model (`torch.nn.Module`):
            The model. It runs in evaluation mode and is left as it was.
        dataloader (`Iterable`):
            Batches of the task, as for [`gradient_scores`]. Labels are not used.
        share (`float`, *optional*, defaults to 0.25):
            Share of the experts of each layer to return. At least one is.
        max_batches (`int`, *optional*):
            Number of batches to read; by default all.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `dict[str, list[int]]`: Per module of fused experts, the numbers of its busiest experts, in increasing order.

    Raises:
        `ValueError`: If the model has no fused experts that can be adapted.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_ext import NeuroAdaConfig, busiest_experts

        >>> busiest = busiest_experts(model, dataloader, share=0.25)
        >>> config = NeuroAdaConfig(k=4, target_modules=["experts"], experts_to_transform=busiest)
        >>> model = get_peft_model(model, config)
        ```
    """
    check_scoring(model, dataloader, None, max_batches, progress)
    check_share("share", share, "experts of each module")
    model = getattr(model, "_orig_mod", model)  # a compiled model passes over replaced forwards
    base = base_model_of(model)
    banks = {name: ExpertBank(experts, "down_proj") for name, experts in expert_modules(base)}
    if not banks:
        raise ValueError(f"{type(base).__name__} has no fused experts that can be adapted.")
    with preserved(model, training=False), torch.no_grad(), experts_watched(banks) as seen:
        for batch in batches(model, dataloader, max_batches, "tokens of experts", progress):
            forward(model, batch, with_labels=False)
    busiest = {}
    for name, inputs in seen.items():
        number = max(1, round(share * len(inputs.tokens)))
        busiest[name] = sorted(inputs.tokens.argsort(descending=True, stable=True)[:number].tolist())
    return busiest
