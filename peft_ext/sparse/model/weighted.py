"""Combine several adapters into one: linear, TIES and DARE on the union of their entries."""

from __future__ import annotations

import warnings
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ...hf.internals import ModulesToSaveWrapper, calculate_majority_sign_mask, disjoint_merge, prune
from ..checks import check_share
from ..support import Support, union


if TYPE_CHECKING:
    from ..config import SparseConfig
    from ..layers import SparseLayer

CombinationType = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
_PRUNING = {"ties": "magnitude", "magnitude_prune": "magnitude", "dare_linear": "random", "dare_ties": "random"}


class WeightedAdapterMixin:
    """`add_weighted_adapter` for sparse tuners."""

    peft_config: dict[str, SparseConfig]
    tuner_layer_cls: type[SparseLayer]

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: CombinationType = "linear",
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """
        Add a new adapter that combines existing ones; their entries may differ, the new one has the union.

        Args:
            adapters (`list[str]`): names of the adapters to combine.
            weights (`list[float]`): one weight per adapter. Trained biases are always summed with these weights.
            adapter_name (`str`): name of the new adapter. It is not activated.
            combination_type (`str`, *optional*, defaults to `"linear"`):
                `"linear"` (the weighted sum), `"ties"`, `"dare_linear"`, `"dare_ties"` or `"magnitude_prune"`.
            density (`float`, *optional*):
                Share of each adapter's entries that is kept, for all but `"linear"`.
            majority_sign_method (`str`, *optional*, defaults to `"total"`):
                `"total"` or `"frequency"`, for TIES.

        Raises:
            `ValueError`: for unknown adapters, a wrong number of weights, a missing density, or two
                adapters that train the same module whole.
        """
        configs = self._check_combination(
            adapters, weights, adapter_name, combination_type, density, majority_sign_method
        )
        factors = torch.tensor(weights, dtype=torch.float32)
        supports: dict[str, Support] = {}
        combined: list[tuple[Any, Tensor, Tensor | None]] = []  # layers with their values and biases
        for name, layer in self.model.named_modules():  # type: ignore[attr-defined]
            if not isinstance(layer, self.tuner_layer_cls):
                continue
            present = [
                (layer.ready(a), factor) for a, factor in zip(adapters, factors, strict=True) if a in layer.deltas
            ]
            if not present:
                continue
            supports[name], positions = union([delta.support for delta, _ in present])
            aligned = [
                _aligned(d.weight, p, supports[name].entries, combination_type, density)
                for (d, _), p in zip(present, positions, strict=True)
            ]
            weights_of_adapters = torch.stack([factor for _, factor in present]).to(aligned[0].device)
            stacked = torch.stack(aligned)
            weighted = stacked * weights_of_adapters[:, None]
            if combination_type in ("ties", "dare_ties"):
                values = disjoint_merge(weighted, calculate_majority_sign_mask(stacked, majority_sign_method))
            else:
                values = weighted.sum(0)
            added = [factor * delta.bias.float() for delta, factor in present if delta.bias is not None]
            combined.append((layer, values, torch.stack(added).sum(0) if added else None))
        self.peft_config[adapter_name] = _combined_config(configs, supports)
        self.inject_adapter(self.model, adapter_name)  # type: ignore[attr-defined]
        for layer, values, bias in combined:
            dtypes = [layer.deltas[name].weight.dtype for name in adapters if name in layer.deltas]
            delta = layer.deltas[adapter_name].to(reduce(torch.promote_types, dtypes))
            delta.weight.data.copy_(values.view_as(delta.weight))
            if bias is not None:
                delta.bias.data.copy_(bias)

    def _check_combination(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination: str,
        density: float | None,
        sign_method: str,
    ) -> list[SparseConfig]:
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name={adapter_name!r} exists already; choose another name, or delete it first.")
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or not adapters:
            raise ValueError(
                f"adapters={adapters!r}: {unknown or 'none'} given; choose from {list(self.peft_config)}."
            )
        if len(weights) != len(adapters):
            raise ValueError(f"weights={weights!r} must have one number for each of the {len(adapters)} adapters.")
        if combination != "linear" and combination not in _PRUNING:
            raise ValueError(f"combination_type={combination!r} must be 'linear' or one of {', '.join(_PRUNING)}.")
        if combination in _PRUNING:
            check_share("density", density, f"entries that combination_type={combination!r} keeps")
        if sign_method not in ("total", "frequency"):
            raise ValueError(f"majority_sign_method={sign_method!r} must be 'total' or 'frequency'.")
        configs = [self.peft_config[name] for name in adapters]
        self._check_whole_modules(adapters, configs)
        if len({isinstance(config.target_modules, str) for config in configs if config.target_modules}) > 1:
            raise ValueError("target_modules of the adapters must be all regular expressions or all lists.")
        return configs

    def _check_whole_modules(self, adapters: list[str], configs: list[SparseConfig]) -> None:
        """Modules and tokens that are trained whole have no weighted union: as in PEFT, two of one module are refused,
        and otherwise the new adapter has those of the base."""
        wrappers = (m for m in self.model.modules() if isinstance(m, ModulesToSaveWrapper))  # type: ignore[attr-defined]
        shared = sum(sum(name in wrapper.modules_to_save for name in adapters) > 1 for wrapper in wrappers)
        if shared:
            raise ValueError(
                "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
                f"{shared} such instance(s)."
            )
        for option in ("modules_to_save", "trainable_token_indices"):
            having = [name for name, config in zip(adapters, configs, strict=True) if getattr(config, option)]
            if having:
                warnings.warn(
                    f"{option} of {having} is not combined: there the new adapter starts from the base model.",
                    stacklevel=3,
                )


def _aligned(values: Tensor, position: Tensor, entries: int, combination: str, density: float | None) -> Tensor:
    """An adapter's values, pruned, at their places in the union: fp32 `[entries]`."""
    flat = values.detach().reshape(-1).float()
    if combination in _PRUNING and density != 1:
        flat = prune(flat, density, _PRUNING[combination], rescale=combination.startswith("dare"))
    return torch.zeros(entries, device=flat.device).index_copy_(0, position, flat)


def _combined_config(configs: list[SparseConfig], supports: dict[str, Support]) -> SparseConfig:
    """Options of the union."""
    targets: Any = [config.target_modules for config in configs if config.target_modules]
    merged: Any = None  # where all are given by `target_parameters`
    if targets:
        is_pattern = isinstance(targets[0], str)
        merged = "|".join(f"({t})" for t in dict.fromkeys(targets)) if is_pattern else set().union(*targets)
    return configs[0].for_supports(
        supports,
        target_modules=merged,
        target_parameters=sorted({name for config in configs for name in config.target_parameters or ()}) or None,
        train_bias=any(config.train_bias for config in configs),
    )
