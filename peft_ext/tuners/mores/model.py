"""Put MoReS adapters into a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...hf.adapter_state import MalformedAdapter, check_state, without_wrappers
from ...hf.injection import clean_refusal
from ...hf.internals import BaseTuner
from ...hf.loadable import LoadableTuner
from ...sparse.bases.sharded import with_wrapped
from .architecture import inspect_model
from .config import MoReSConfig
from .finder import TokenFinder
from .generate import attach_generate, detach_generate
from .layer import CHILD, MoReSLayer, attach, detach, remove_hooks, steer_output, steer_outside_checkpoints
from .targets import targets_of


class MoReSModel(LoadableTuner, BaseTuner):
    """
    MoReS on a model: after decoder layers, the states `h` of some tokens become `h + R(W h + b − Rᵀh)` with `RᵀR = I`.

    Paper: Bi et al., [LLaVA Steering](https://arxiv.org/abs/2412.12359), equations 3 and 4.

    Visual tokens are found in `input_ids` in each forward pass, or in a bool `visual_token_mask` `[batch, tokens]`
    passed to it. Samples without visual tokens keep every bit. In generation the prompt is steered, with any cache and
    in chunks; generated tokens are not. A call is refused before anything is computed if its cache was not steered as
    the whole prompt would be.

    Args:
        model (`torch.nn.Module`):
            The model to adapt.
        config ([`MoReSConfig`]):
            Options of the adapter.
        adapter_name (`str`):
            Name of the adapter, `"default"` by default.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`):
            Create an empty adapter that is loaded later.

    Attributes:
        model (`torch.nn.Module`):
            The adapted model.
        peft_config (`dict[str, MoReSConfig]`):
            Options of each adapter.
    """

    prefix: str = "mores_"
    tuner_layer_cls = MoReSLayer

    # ------------------------------------------------------------------ injection

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        config = self.peft_config[adapter_name]
        if state_dict is not None:  # its keys decide what is steered
            marker = f".{CHILD}.{self.prefix}"
            config.target_modules = {key.split(marker)[0] for key in state_dict if marker in key}
        with clean_refusal(self.peft_config, model, adapter_name):
            self._targets: set[str] = set()
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
            )
        config.target_modules = set(self._targets)  # in full, where PEFT shortens a long list

    def _prepare_adapter_config(self, peft_config: MoReSConfig, model_config: dict[str, Any]) -> MoReSConfig:
        architecture = inspect_model(self.model)
        targets = targets_of(peft_config, architecture)
        rank, size = peft_config.rank, architecture.hidden_size
        if rank > size:
            raise ValueError(
                f"rank={rank} is larger than the hidden size, {size}; an orthonormal R has at most {size}."
            )
        if peft_config.connector == "train":
            if architecture.connector is None:
                raise ValueError(
                    f"connector='train', but no connector was found in {architecture.kind}; name the module in "
                    "modules_to_save instead."
                )
            saved = dict.fromkeys([*(peft_config.modules_to_save or ()), architecture.connector.name])
            peft_config.modules_to_save = list(saved)
        peft_config.target_modules = self._targets = targets
        self._architecture = architecture
        return peft_config

    def _check_target_module_exists(self, peft_config: MoReSConfig, key: str) -> bool:
        return key in self._targets

    def _create_and_replace(
        self,
        peft_config: MoReSConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        layer = getattr(target, CHILD, None)
        if not isinstance(layer, MoReSLayer):
            finder = self._finder() if current_key in self._architecture.layers else None
            layer = MoReSLayer(target, self._architecture.hidden_size, finder)
            if finder is not None:
                finder.layers.append(layer)
            layer._active_adapter = adapter_name
            attach(layer)
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.mores_steering[adapter_name].requires_grad_(False)

    def _finder(self) -> TokenFinder:
        """The model's one finder, with its hooks on the way to the decoder and around `generate`."""
        for layer in _layers(self.model):
            if layer.finder is not None:
                return layer.finder
        finder = TokenFinder(self._architecture.visual_token_ids)
        for depth, module in enumerate(self._architecture.path):
            module.register_forward_pre_hook(partial(finder.enter, depth), with_kwargs=True)
            module.register_forward_hook(partial(finder.leave, depth), always_call=True)
        self._architecture.path[-1].register_forward_pre_hook(steer_outside_checkpoints)
        attach_generate(self.model, finder)
        return finder

    # ------------------------------------------------------------------ saving and loading

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: MoReSConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return with_wrapped(model, state_dict, selected)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MoReSConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        cls.check_state(model, config, adapter_name, mapped, whole_may_differ=config.awaits_weights)
        return mapped

    @classmethod
    def check_state(
        cls,
        model: nn.Module,
        config: MoReSConfig,
        adapter_name: str,
        tensors: dict[str, Tensor],
        whole_may_differ: bool = False,
    ) -> None:
        """
        Compare tensors, by their names in the model, with the adapter that awaits them, before they are loaded.
        `whole_may_differ`: see `peft_ext.hf.adapter_state.check_state`.

        Raises [`MalformedAdapter`] if they are not the whole adapter and nothing else, or cannot be an adapter's.
        """
        own = {
            f"{without_wrappers(name)}.mores_steering.{adapter_name}.{key}": tensor
            for name, module in model.named_modules()
            if isinstance(module, MoReSLayer) and adapter_name in module.mores_steering
            for key, tensor in module.mores_steering[adapter_name].state_dict().items()
        }
        check_state(model, adapter_name, tensors, own, "mores_steering", whole_may_differ=whole_may_differ)
        for key in own:
            if key.rpartition(".")[2].startswith("raw_") and not tensors[key].is_meta:
                # Only its directions count, so compare with its own largest number: the scale may be anything.
                singular = torch.linalg.svdvals(tensors[key].double())
                if not singular[-1] > 1e-10 * singular[0]:
                    raise MalformedAdapter(
                        f"'{key}' has linearly dependent columns, from which no orthonormal R follows. Nothing was "
                        "loaded; save the adapter again."
                    )

    # ------------------------------------------------------------------ calls

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this around the user's calls."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names: MoReS does not support batches with several adapters; call the model once per adapter."
            )
        yield

    # ------------------------------------------------------------------ merging and unloading

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's; first asks whether every one of the adapters can be merged."""
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _check_mergeable(self, adapter_names: list[str] | None) -> None:
        for layer in _layers(self.model):
            names = layer.active_adapters if adapter_names is None else adapter_names
            if any(name in layer.mores_steering for name in names):
                layer.check_mergeable()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """
        Raises:
            `NotImplementedError`: always.
        """
        raise NotImplementedError(
            "MoReS adapters cannot be combined into one: a weighted mean of orthonormal matrices is not orthonormal, "
            "and each adapter may steer other tokens. Activate several, one after the other, with "
            "`model.base_model.set_adapter([…])`."
        )

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layers = list(_layers(self.model))
        if merge:
            self._check_merge_allowed()
            self._check_mergeable(adapter_names)
            for layer in layers:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        _take_out(self.model)
        return super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )


def _take_out(model: nn.Module) -> None:
    """Remove all steering from a model, with its hooks."""
    detach_generate(model)
    for layer in list(_layers(model)):
        if layer.finder is not None:
            for module in model.modules():
                for hook in (layer.finder.enter, layer.finder.leave, steer_outside_checkpoints, steer_output):
                    remove_hooks(module, hook)
        detach(layer)


def _layers(model: nn.Module) -> Iterator[MoReSLayer]:
    return (module for module in model.modules() if isinstance(module, MoReSLayer))
