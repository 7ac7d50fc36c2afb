"""Scores from forward passes alone: |w| times the activation that enters it, or times that activation's growth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ....preserve import preserved
from ...bases.experts import ExpertBank
from ...bases.neurons import neuron_view
from ...bases.projection import Projection
from ...checks import check_loader
from ...config import SparseConfig
from .arguments import check_scoring
from .batches import batches, forward
from .experts import experts_watched
from .modules import scored_modules


class ActivationScores(Mapping[str, Tensor]):
    """
    Per module, `|w| * factor` in the shape of its weight, computed when asked for: one number per input is kept, fp32
    `[inputs]` (channels of a convolution), of experts `[experts, inputs]`.
    """

    def __init__(self, modules: Mapping[str, Any], factors: Mapping[str, Tensor]) -> None:
        self.modules = modules
        self.factors = factors

    def __getitem__(self, module: str) -> Tensor:
        layer, factor = self.modules[module], self.factors[module]
        weight = layer.weight.detach()
        if isinstance(layer, ExpertBank):
            return layer.neurons(layer.neurons(weight).abs().float().mul_(factor[:, None]))
        groups = getattr(layer, "groups", 1)
        if groups > 1:  # each output channel sees the channels of its group
            factor = factor.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)  # [out, in / groups]
        else:
            factor = neuron_view(layer, factor[None]) if weight.dim() == 2 else factor[None]
        return weight.abs().float().mul_(factor.reshape(*factor.shape, *[1] * (weight.dim() - 2)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.factors)

    def __len__(self) -> int:
        return len(self.factors)


def activation_scores(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    anchor: Iterable[Any] | None = None,
    config: SparseConfig | None = None,
    max_batches: int | None = None,
    progress: bool = True,
) -> ActivationScores:
    """
    Score every weight by forward passes, for `selection="activation"`: |w| times the mean |activation| that enters it.
    No labels and no backward pass are needed, and the result is the same every time.

    Paper: Yang et al., [FPS: Feedforward-based Parameter Selection For Efficient
    Fine-Tuning](https://arxiv.org/abs/2510.27359v1).

    With `anchor`, |w| is multiplied by the growth of that activation: its mean over the task's data divided by its
    mean over the anchor's data. This is the idea of version 2 of the paper, whose abstract gives no formula; the
    quotient is our choice. A channel of a convolution's input has one mean over all positions. An input of an expert
    has its mean over the tokens that are routed to the expert.

    Args:
        model (`torch.nn.Module`):
            The model. It runs in evaluation mode and is left as it was.
        dataloader (`Iterable`):
            Batches of the task, as for [`gradient_scores`]. Labels are not used.
        anchor (`Iterable`, *optional*):
            Batches like those of pretraining.
        config ([`SparseConfig`], *optional*):
            A config whose `target_modules` are scored; by default all layers with neurons.
        max_batches (`int`, *optional*):
            Number of batches to read from each loader; by default all.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        [`ActivationScores`]: A mapping from module names to float32 tensors in the shape of the weights, each computed
        when it is read.

    Raises:
        `TypeError`: If an `nn.MultiheadAttention` or a quantised weight would be scored.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_ext import NeuroAdaConfig, activation_scores

        >>> scores = activation_scores(model, dataloader)
        >>> model = get_peft_model(model, NeuroAdaConfig(k=1, selection="activation").with_scores(scores))
        ```
    """
    check_scoring(model, dataloader, config, max_batches, progress)
    if anchor is not None:
        check_loader("anchor", anchor)
    model = getattr(model, "_orig_mod", model)  # a compiled model passes over hooks
    modules = scored_modules(model, config)
    hidden = next((name for name, module in modules.items() if isinstance(module, Projection)), None)
    if hidden is not None:
        raise TypeError(
            f"'{hidden}' is inside an nn.MultiheadAttention, which shows no activations. Use gradient_scores, or a "
            "`config` whose target_modules leave the attention out."
        )
    with preserved(model, training=False), torch.no_grad():
        task = batches(model, dataloader, max_batches, "activations", progress)
        factors = _mean_activations(model, modules, task)
        if anchor is not None:
            pretraining = batches(model, anchor, max_batches, "anchor activations", progress)
            before = _mean_activations(model, modules, pretraining)
            for name, mean in factors.items():
                # An input that was silent in pretraining has grown without bound; keep its rank high, but finite.
                floor = torch.finfo(torch.float32).eps * before[name].mean().clamp(min=torch.finfo(torch.float32).tiny)
                factors[name] = mean / before[name].clamp(min=float(floor))
    return ActivationScores(modules, factors)


def _mean_activations(model: nn.Module, modules: Mapping[str, Any], batches: Iterable[Any]) -> dict[str, Tensor]:
    """Per module, the mean |x| of each of its inputs over all batches and positions, fp32 `[inputs]`."""
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(modules, 0)

    def listener(name: str, channels_second: bool) -> Callable[..., None]:
        def listen(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            if channels_second:  # [samples, channels, ...], or one sample without its dimension
                dims = module.weight.dim()  # type: ignore[operator]
                x = x.movedim(-(dims - 1), -1)
            magnitude = x.abs().flatten(0, -2).sum(0, dtype=torch.float64)  # [inputs]
            sums[name] = sums[name] + magnitude if name in sums else magnitude
            counts[name] += x.numel() // x.shape[-1]

        return listen

    banks = {name: module for name, module in modules.items() if isinstance(module, ExpertBank)}
    handles = [
        module.register_forward_pre_hook(listener(name, module.weight.dim() > 2))
        for name, module in modules.items()
        if name not in banks
    ]
    try:
        with experts_watched(banks) as inputs:
            for batch in batches:
                forward(model, batch, with_labels=False)
    finally:
        for handle in handles:
            handle.remove()
    # A layer that no batch reached scores nothing.
    return {
        name: (sums[name] / counts[name]).float() if name in sums else torch.zeros(_inputs(module))
        for name, module in modules.items()
        if name not in banks
    } | {name: seen.mean().float() for name, seen in inputs.items()}


def _inputs(module: Any) -> int:
    return int(neuron_view(module, module.weight).shape[1]) if module.weight.dim() == 2 else int(module.in_channels)
