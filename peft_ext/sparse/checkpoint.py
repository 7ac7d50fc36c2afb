"""What a sparse adapter looks like in a checkpoint, and the checks before one is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .layers import SparseLayer, attention_biases
from .sharded import with_wrapped, without_wrappers
from .support import Support, narrowest_index_dtype


if TYPE_CHECKING:
    from .config import SparseConfig


class CheckpointMixin:
    """The state-dict hooks that PEFT calls on a tuner class when it saves and loads."""

    tuner_layer_cls: type[SparseLayer]

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SparseConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """
        As PEFT selects it, with indices in the narrowest type: 2 bytes per entry where PEFT's SHiRA takes 8.

        Raises:
            `RuntimeError`: if the adapter has no entries yet.
            `ValueError`: if `state_dict` lacks a part of the adapter, as an ungathered one does.
        """
        selected = super()._get_adapter_state_dict(  # type: ignore[misc]
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        selected = with_wrapped(model, state_dict, selected)
        container = cls.tuner_layer_cls.adapter_layer_names[0]
        if config.support_sizes is not None:  # those of this adapter: the object may have served for others since
            config.support_sizes = {
                prefix.removeprefix("base_model.model.").removesuffix(f".{container}.{adapter_name}"): layer.deltas[
                    adapter_name
                ].support.entries
                for prefix, layer in cls._layers_with(model, adapter_name)
            }
        seen: set[int] = set()
        for prefix, layer in cls._layers_with(model, adapter_name):
            delta = layer.deltas[adapter_name]
            if delta.pending and not delta.weight.is_meta:  # which nobody can write anyway, but PEFT reads its keys
                raise RuntimeError(f"Adapter '{adapter_name}' can't be saved. {layer.pending_reason(adapter_name)}")
            key = f"{prefix}.indices"
            lacking = [f"{prefix}.{name}" for name in delta.names if f"{prefix}.{name}" not in selected]
            if lacking and _is_first_process():  # elsewhere a state dict gathered for the first one is empty
                raise ValueError(
                    f"The state dict lacks '{lacking[0]}', so adapter '{adapter_name}' can't be saved whole. Under "
                    "FSDP pass state_dict=accelerator.get_state_dict(model); under ZeRO-3 set "
                    "stage3_gather_16bit_weights_on_model_save=true."
                )
            if id(layer.deltas[adapter_name]) in seen:  # of a shared weight: safetensors stores no tensor twice
                for name in delta.names:
                    if f"{prefix}.{name}" in selected:
                        selected[f"{prefix}.{name}"] = selected[f"{prefix}.{name}"].clone()
            seen.add(id(layer.deltas[adapter_name]))
            if key in selected:
                fan_in = layer.deltas[adapter_name].fan_in
                selected[key] = selected[key].to(narrowest_index_dtype(fan_in))
        return selected

    @classmethod
    def _get_learnable_bias_state_dict(
        cls, model: nn.Module, state_dict: dict[str, Tensor], config: SparseConfig
    ) -> dict[str, Tensor]:
        """As PEFT selects it, with the biases that `nn.MultiheadAttention` keeps under names of its own."""
        found = super()._get_learnable_bias_state_dict(model, state_dict, config)  # type: ignore[misc]
        names = (name for name, _ in attention_biases(model, config.bias))
        return {**found, **{name: state_dict[name] for name in names if name in state_dict}}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SparseConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """
        As PEFT maps it, after checking that the checkpoint is whole and belongs to this base model.

        Raises:
            `ValueError`: if tensors are missing, have no place, do not fit, or were made for another base weight.
                Nothing has been loaded then.
        """
        mapped = super()._remap_adapter_state_dict_for_load(  # type: ignore[misc]
            model, config, adapter_name, state_dict
        )
        known = set()
        first: dict[int, str] = {}
        for prefix, layer in cls._layers_with(model, adapter_name):
            _check_entry(prefix, layer, adapter_name, mapped)
            _check_shared(
                first.setdefault(id(layer.deltas[adapter_name]), prefix), prefix, layer, adapter_name, mapped
            )
            known |= {f"{prefix}.{name}" for name in layer.deltas[adapter_name].state_dict()}
        biases = cls._get_learnable_bias_state_dict(model, model.state_dict(), config)
        lacking = sorted(biases.keys() - mapped.keys())
        if lacking:
            raise ValueError(
                f"The checkpoint lacks '{lacking[0]}', which bias={config.bias!r} trains. Nothing was loaded; save "
                "the whole adapter again."
            )
        container = f".{cls.tuner_layer_cls.adapter_layer_names[0]}."
        unknown = sorted(key for key in mapped if container in key and key not in known)
        if unknown:
            raise ValueError(
                f"The checkpoint has '{unknown[0]}', which has no place in this model. Nothing was loaded; use the "
                "config and base model it was saved with."
            )
        return mapped

    @classmethod
    def _layers_with(cls, model: nn.Module, adapter_name: str) -> Iterator[tuple[str, SparseLayer]]:
        """State-dict prefix of an adapter's tensors and the layer, for each layer that has the adapter."""
        container = cls.tuner_layer_cls.adapter_layer_names[0]
        for name, module in model.named_modules():
            if isinstance(module, cls.tuner_layer_cls) and adapter_name in module.deltas:
                name = without_wrappers(name)
                yield f"{name}.{container}.{adapter_name}" if name else f"{container}.{adapter_name}", module


def _is_first_process() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _check_shared(first: str, prefix: str, layer: SparseLayer, adapter_name: str, mapped: dict[str, Tensor]) -> None:
    """Layers with one weight have one set of values, so a checkpoint must not have two."""
    for name in layer.deltas[adapter_name].state_dict():
        if not torch.equal(mapped[f"{first}.{name}"], mapped[f"{prefix}.{name}"]):
            raise ValueError(
                f"'{first}' and '{prefix}' share one weight in this model, but differ in the checkpoint, which was "
                "trained with a weight for each. Nothing was loaded; untie the weights first."
            )


def _check_entry(prefix: str, layer: SparseLayer, adapter_name: str, mapped: dict[str, Tensor]) -> None:
    delta = layer.deltas[adapter_name]
    for name, here in delta.state_dict().items():
        key = f"{prefix}.{name}"
        if key not in mapped:
            raise ValueError(
                f"The checkpoint lacks '{key}', so it is only a part of adapter '{adapter_name}' or was made with "
                "other options. Nothing was loaded; save the whole adapter again."
            )
        if mapped[key].shape != here.shape:
            raise ValueError(
                f"'{key}' has shape {tuple(mapped[key].shape)} in the checkpoint, but the config and the base model "
                f"lead to {tuple(here.shape)}. Nothing was loaded; use the config and base model it was saved with."
            )
    for name in ("indices", "offsets"):
        key = f"{prefix}.{name}"
        if key in mapped:
            mapped[key] = mapped[key].to(torch.int32)
    support = Support(mapped[f"{prefix}.indices"], delta.fan_in, mapped.get(f"{prefix}.offsets"))
    try:
        support.check()
    except ValueError as error:
        raise ValueError(f"'{prefix}.indices' is corrupted: {error}. Nothing was loaded.") from error
    reason = layer.base_mismatch(support, mapped[f"{prefix}.fingerprint"])
    if reason is not None:
        raise ValueError(
            f"Adapter '{adapter_name}' was made for another base model: the base weight under '{prefix}' has "
            f"{reason}. Nothing was loaded; use the base model it was trained on."
        )
