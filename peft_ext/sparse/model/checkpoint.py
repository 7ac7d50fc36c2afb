"""Sparse adapters in checkpoints, and the checks before one is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...hf.adapter_state import MalformedAdapter, check_state, without_wrappers
from ...hf.loadable import LoadableTuner
from ..another_base import REMEDY
from ..bases.sharded import with_wrapped
from ..fingerprint import check_fingerprint, is_unknown, unknown_fingerprint
from ..layers import SparseLayer, part_biases
from ..support import Support, narrowest_index_dtype
from .uncalled import warn_of_untrained


if TYPE_CHECKING:
    from ..config import SparseConfig


class CheckpointMixin(LoadableTuner):
    """The state-dict hooks that PEFT calls on a tuner class when it saves and loads, and ours."""

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
        warn_of_untrained(model, cls.tuner_layer_cls, [adapter_name])
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
                for prefix, layer in cls.layers_with(model, adapter_name)
            }
        seen: set[int] = set()
        for prefix, layer in cls.layers_with(model, adapter_name):
            delta = layer.deltas[adapter_name]
            if delta.pending and not delta.weight.is_meta:  # which nobody can write anyway, but PEFT reads its keys
                raise RuntimeError(f"Adapter '{adapter_name}' can't be saved. {layer.pending_reason(adapter_name)}")
            key = f"{prefix}.indices"
            if f"{prefix}.weight" in selected:
                for name, here in delta.identity.items():  # which some ways to gather a state dict leave out
                    full = f"{prefix}.{name}"
                    selected[full] = delta.settled(name, selected[full]) if full in selected else here.clone()
            lacking = [f"{prefix}.{name}" for name in delta.names if f"{prefix}.{name}" not in selected]
            is_first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
            if lacking and is_first:  # elsewhere a state dict gathered for the first process is empty
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
                selected[key] = selected[key].to(narrowest_index_dtype(delta.fan_in))
                fingerprint = selected[f"{prefix}.fingerprint"]
                if not fingerprint.is_meta and is_unknown(fingerprint):  # said, not left at zeros
                    selected[f"{prefix}.fingerprint"] = unknown_fingerprint(delta.support.rows, delta.fan_in)
        return selected

    @classmethod
    def _get_learnable_bias_state_dict(
        cls, model: nn.Module, state_dict: dict[str, Tensor], config: SparseConfig
    ) -> dict[str, Tensor]:
        """As PEFT selects it, with the biases that `nn.MultiheadAttention` and experts name in their own way."""
        found = super()._get_learnable_bias_state_dict(model, state_dict, config)  # type: ignore[misc]
        names = (name for name, _ in part_biases(model, config.bias))
        return {**found, **{name: state_dict[name] for name in names if name in state_dict}}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SparseConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """
        As PEFT maps it, after [`check_state`].
        """
        mapped = super()._remap_adapter_state_dict_for_load(  # type: ignore[misc]
            model, config, adapter_name, state_dict
        )
        for prefix, layer in cls.layers_with(model, adapter_name):
            delta = layer.deltas[adapter_name]
            for name, here in delta.identity.items():
                key = f"{prefix}.{name}"
                if key in mapped and delta.is_own_average(name, mapped[key]):
                    mapped[key] = here.clone()
        # PEFT copies what fits before it refuses the rest; only a new adapter is taken out again then.
        cls.check_state(model, config, adapter_name, mapped, whole_may_differ=config.awaits_weights)
        for prefix, layer in cls.layers_with(model, adapter_name):
            layer.deltas[adapter_name].expect(
                {name: mapped[f"{prefix}.{name}"] for name in layer.deltas[adapter_name].identity}
            )
        return mapped

    @classmethod
    def check_state(
        cls,
        model: nn.Module,
        config: SparseConfig,
        adapter_name: str,
        tensors: dict[str, Tensor],
        whole_may_differ: bool = False,
    ) -> None:
        """
        Compare tensors, by their names in the model, with the adapter that awaits them, before they are loaded.
        `whole_may_differ`: see `peft_ext.hf.adapter_state.check_state`.

        Raises [`MalformedAdapter`] if they are not the whole adapter and nothing else, if values are not finite or
        indices not in range, or if they were made for another base weight.
        """
        layers = dict(cls.layers_with(model, adapter_name))
        own = {
            f"{prefix}.{name}": getattr(layer.deltas[adapter_name], name)
            for prefix, layer in layers.items()
            for name in layer.deltas[adapter_name].names
        }
        container = cls.tuner_layer_cls.adapter_layer_names[0]
        state = model.state_dict()
        biases = cls._get_learnable_bias_state_dict(model, state, config)
        check_state(
            model,
            adapter_name,
            tensors,
            own,
            container,
            biases=[key for key in biases if f".{container}." not in key],
            whole_may_differ=whole_may_differ,
            state=state,
        )
        first: dict[int, str] = {}
        of_unknown_base = []
        for prefix, layer in layers.items():
            delta = layer.deltas[adapter_name]
            parts = {name: tensors[f"{prefix}.{name}"] for name in delta.names}
            if any(part.is_meta for part in parts.values()):
                continue
            _check_shared(first.setdefault(id(delta), prefix), prefix, parts, tensors)
            _check_entries(prefix, layer, adapter_name, parts)
            if is_unknown(parts["fingerprint"]):
                of_unknown_base.append(prefix)
        if of_unknown_base:
            warnings.warn(
                f"The checkpoint does not say which weights '{of_unknown_base[0]}' ({len(of_unknown_base)} modules in "
                f"all) was made for, so nobody can tell whether adapter '{adapter_name}' fits this base model.",
                stacklevel=2,
            )

    @classmethod
    def check_gathered(cls, tensors: Mapping[str, Tensor]) -> None:
        end = f".{cls.tuner_layer_cls.adapter_layer_names[0]}.indices"
        for key, tensor in tensors.items():
            values = tensors.get(key.removesuffix("indices") + "weight") if key.endswith(end) else None
            if values is not None and (isinstance(values, DTensor) or values.shape != tensor.shape):
                raise ValueError(
                    f"The values beside '{key}' are sharded over several processes, so this file would hold a part of "
                    "the adapter. Pass state_dict=accelerator.get_state_dict(model) to save_pretrained."
                )

    @classmethod
    def check_arrived(cls, model: nn.Module, adapter_name: str) -> None:
        for _, layer in cls.layers_with(model, adapter_name):
            layer.ready(adapter_name)

    @classmethod
    def layers_with(cls, model: nn.Module, adapter_name: str) -> Iterator[tuple[str, SparseLayer]]:
        """State-dict prefix of an adapter's tensors and the layer, for each layer that has the adapter."""
        container = cls.tuner_layer_cls.adapter_layer_names[0]
        for name, module in model.named_modules():
            if isinstance(module, cls.tuner_layer_cls) and adapter_name in module.deltas:
                name = without_wrappers(name)
                yield f"{name}.{container}.{adapter_name}" if name else f"{container}.{adapter_name}", module


def _check_shared(first: str, prefix: str, parts: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Layers with one weight have one set of values, so a checkpoint must not have two."""
    for name, part in parts.items():
        if not torch.equal(tensors[f"{first}.{name}"], part):
            raise MalformedAdapter(
                f"'{first}' and '{prefix}' share one weight in this model, but differ in the checkpoint, which was "
                "trained with a weight for each. Nothing was loaded; untie the weights first."
            )


def _check_entries(prefix: str, layer: SparseLayer, adapter_name: str, parts: dict[str, Tensor]) -> None:
    """The entries lie in the layer's weight, and it is the one that they were chosen in."""
    name = "indices"
    try:
        support = Support.of_integers(parts["indices"], layer.deltas[adapter_name].fan_in, parts.get("offsets"))
        name = "fingerprint"
        check_fingerprint(parts["fingerprint"], support.rows, support.fan_in)
    except ValueError as error:
        raise MalformedAdapter(
            f"'{prefix}.{name}' is corrupted: {error}. Nothing was loaded; save the whole adapter again."
        ) from error
    reason = layer.base_mismatch(support, parts["fingerprint"])
    if reason is not None:
        raise MalformedAdapter(
            f"Adapter '{adapter_name}' was made for another base model: the base weight under '{prefix}' has "
            f"{reason}. Nothing was loaded; {REMEDY}."
        )
