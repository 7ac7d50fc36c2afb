"""Put sparse adapters into a model: check and choose everything first, then replace modules."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...hf.injection import clean_refusal, is_loading
from ...hf.internals import INCLUDE_LINEAR_LAYERS_SHORTHAND, BaseTuner, ExcludedModule
from ..bases.neurons import (
    base_of,
    weights_of,
)
from ..bases.quantised import backend_of
from ..bases.sharing import identity, weight_key
from ..choose.experts import banks_in, check_target_parameters, exclusions_noted, wanted_banks
from ..choose.placeholders import tables_in
from ..choose.planning import Planned, plan
from ..choose.targets import check_names, inside_adapter, named_by_target, resolve_targets, without_parts
from ..choose.unsuitable import check_suitable, check_supported
from ..config import SparseConfig
from ..delta import SparseDelta
from ..layers import LayerTypes, SparseComposite, SparseLayer, part_biases, weights_of_layer
from ..selection.given import uncompiled
from .checkpoint import CheckpointMixin
from .merge import MergeMixin
from .merge_once import note_sharing
from .mixed_batch import MixedBatchMixin
from .uncalled import warn_of_untrained
from .weighted import WeightedAdapterMixin


@dataclass
class _Injection:
    """State while one adapter is injected."""

    tables: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # of a state dict, by module
    named: set[str] | None = None  # the modules that a state dict names: they are the targets
    banks: dict[str, list[str]] = field(default_factory=dict)  # weights to adapt, by their module of experts
    target_modules: list[str] | str | None = None  # before PEFT shortens them
    empty: bool = False  # without memory for the adapter's tensors
    dense_dtype: torch.dtype | None = None
    plan: dict[str, Planned] = field(default_factory=dict)
    deltas: dict[Hashable, SparseDelta] = field(default_factory=dict)  # by the weight that they are for


class SparseModel(CheckpointMixin, MergeMixin, MixedBatchMixin, WeightedAdapterMixin, BaseTuner):
    """
    Base of the sparse tuners' models; see [`NeuroAdaModel`]. Subclasses set `prefix` and the classes of their layers.

    Everything that can go wrong is found before the first module is replaced: targets of an unsupported type,
    weights that are not finite, missing scores.
    """

    prefix: str
    layer_types: ClassVar[LayerTypes]
    tuner_layer_cls: type[SparseLayer]
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    default_targets: ClassVar[str] = INCLUDE_LINEAR_LAYERS_SHORTHAND  # what `target_modules=None` means

    # ------------------------------------------------------------------ injection

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        injection = self._injection = _Injection(
            tables=tables_in(state_dict or {}, self.tuner_layer_cls.adapter_layer_names[0]),
            empty=low_cpu_mem_usage or _parameters_go_to_meta(),
            dense_dtype=_float_dtype(model),
        )
        self._kept_padded = getattr(self, "_kept_padded", [])
        if state_dict is not None:  # its keys decide what is adapted
            injection.banks = banks_in(model, state_dict)
            state_dict = named_by_target(model, state_dict)
            injection.named = {uncompiled(key.rsplit(f".{self.prefix}", 1)[0]) for key in state_dict}
        else:
            self._take_entries_of_same_config(adapter_name)
        try:
            noted = exclusions_noted(model, self.peft_config[adapter_name])
            with clean_refusal(self.peft_config, model, adapter_name), noted:
                super().inject_adapter(
                    model,
                    adapter_name,
                    autocast_adapter_dtype=autocast_adapter_dtype,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                    state_dict=state_dict,
                )
            self._keep_names_exact(self.peft_config[adapter_name])
        finally:
            self._injection = _Injection()
        note_sharing(model, self.tuner_layer_cls)
        # Of no use once the entries are chosen, and the scores are dense.
        self.peft_config[adapter_name].scores = self.peft_config[adapter_name].supports = None

    def _prepare_adapter_config(self, peft_config: SparseConfig, model_config: dict[str, Any]) -> SparseConfig:
        resolve_targets(peft_config, self.model, self.default_targets)
        return peft_config

    def _prepare_model(self, peft_config: SparseConfig, model: nn.Module) -> None:
        injection = self._injection
        if injection.named is None:
            check_names(model, peft_config)
            injection.banks, injection.target_modules = wanted_banks(model, peft_config), peft_config.target_modules
            check_target_parameters(model, peft_config, injection.banks)
        targets = {
            name: module
            for name, module in model.named_modules()
            if name and not inside_adapter(model, name) and self._is_wanted(peft_config, name)
        }
        targets = without_parts(model, targets)
        exists = peft_config.from_checkpoint or peft_config.supports is not None or injection.named is not None
        check_suitable(model, targets, trained=exists)
        weights: dict[str, Any] = {}
        for name, module in targets.items():
            base = base_of(module)
            check_supported(name, module, backend_of(self, base), self.layer_types.own)
            weights.update(self._weights_of(name, base))
        merged = (layer for layer in self.sparse_layers(model) if layer.merged)
        planned = plan(
            peft_config,
            weights,
            backends={name: backend_of(self, base) for name, base in weights.items()},
            originals={identity(layer.get_base_layer()): layer.original_matrix for layer in merged},
            tables=injection.tables,
            awaits=is_loading() or injection.empty or injection.named is not None,
            empty=injection.empty,
        )
        # PEFT names the modules of a compiled model with or without its prefix, as a state dict does.
        injection.plan = {uncompiled(name): of_weight for name, of_weight in planned.items()}

    def _is_wanted(self, config: SparseConfig, name: str) -> bool:
        named = self._injection.named
        if named is None:
            return self._check_target_module_exists(config, name)
        return uncompiled(name) in named

    def _take_entries_of_same_config(self, adapter_name: str) -> None:
        """
        An adapter made with the config of another one is a copy of it, as TRL makes them for a reference, and needs
        its entries. Choosing again would need scores, and could find others on a base that is not the adapter's own.
        """
        config = self.peft_config[adapter_name]
        for other in [name for name, its in self.peft_config.items() if its is config and name != adapter_name]:
            layers = {n: m for n, m in self.model.named_modules() if isinstance(m, self.tuner_layer_cls)}
            deltas = {name: layer.deltas[other] for name, layer in layers.items() if other in layer.deltas}
            if not any(delta.pending for delta in deltas.values()):
                config.supports = {name: copy.deepcopy(delta.support) for name, delta in deltas.items()}

    def _keep_names_exact(self, config: SparseConfig) -> None:
        """PEFT shortens long lists of names so that they fit the same modules, but not the same weights of experts."""
        injection = self._injection
        if injection.named is None and wanted_banks(self.model, config) != injection.banks:
            config.target_modules = injection.target_modules

    def _weights_of(self, name: str, base: Any) -> dict[str, Any]:
        """The layers of a target that this adapter is for: of experts, those that it asks for."""
        wanted = self._injection.banks.get(name)
        weights = weights_of(name, base)
        return weights if wanted is None else {f"{name}.{bank}": weights[f"{name}.{bank}"] for bank in wanted}

    def _check_target_module_exists(self, peft_config: SparseConfig, key: str) -> Any:
        match = super()._check_target_module_exists(peft_config, key)
        if key not in self._injection.banks or isinstance(match, ExcludedModule):
            return match
        return bool(self._injection.banks[key])

    def _inject_parameters(self, peft_config: SparseConfig, **kwargs: Any) -> list[str]:
        # Their modules are targets, and adapted by now.
        return sorted(peft_config.target_parameters or ())

    def _create_and_replace(
        self,
        peft_config: SparseConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(parent, SparseComposite):
            return  # an attention's projection, adapted with it
        weights = self._weights_of(current_key, base_of(target))
        is_new = not isinstance(target, self.layer_types.own)
        layer: Any = self._create_new_module(target, adapter_name) if is_new else target
        for name, part in weights_of_layer(current_key, layer).items():
            if name in weights:
                self._update_layer(part, adapter_name, peft_config, self._injection.plan[uncompiled(name)])
        if not is_new:
            return
        if isinstance(parent, nn.TransformerEncoderLayer):
            # In inference this class reads the weights of its layers, unless one of them has a hook; and the encoder
            # around it packs padded batches for that.
            layer.register_forward_pre_hook(_keep_calling)
            for encoder in self.model.modules():
                if isinstance(encoder, nn.TransformerEncoder) and parent in encoder.layers:
                    self._kept_padded += [encoder] if encoder.use_nested_tensor else []
                    encoder.use_nested_tensor = False
        self._replace_module(parent, target_name, layer, target)

    def _create_new_module(self, target: nn.Module, adapter_name: str) -> SparseLayer | SparseComposite:
        layer = self.layer_types.around(target, partial(backend_of, self))
        for part in weights_of_layer("", layer).values():
            part._active_adapter = adapter_name
            part.dense_dtype = self._injection.dense_dtype
        layer._active_adapter = adapter_name
        return layer

    def _update_layer(self, layer: SparseLayer, adapter_name: str, config: SparseConfig, planned: Planned) -> None:
        key = weight_key(layer.get_base_layer())
        shared = None if key is None else self._injection.deltas.get(key)
        layer.update_layer(adapter_name, config, planned.support, planned.pending, shared)
        if key is not None:
            self._injection.deltas[key] = layer.deltas[adapter_name]

    def train(self, mode: bool = True) -> SparseModel:
        """As PEFT's; between training and evaluation, tells of layers that training has not called."""
        if self.training and not mode:
            warn_of_untrained(self.model, self.tuner_layer_cls, self.active_adapters)
        return super().train(mode)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        for adapter_name in self.active_adapters:
            for _, parameter in part_biases(model, self.peft_config[adapter_name].bias):
                parameter.requires_grad = True

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        dtype = self.peft_config[adapter_name].values_dtype
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype and dtype is None)
        if dtype is not None:
            for layer in self.sparse_layers(self):
                if adapter_name in layer.deltas:
                    layer.deltas[adapter_name].to(getattr(torch, dtype))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # A new layer makes its adapters on the base's device, and a base layer comes back as it is. PEFT's own version
        # hands over `child.weight`, which is no parameter where a wrapper computes it (trainable tokens).
        setattr(parent, child_name, new_module)

    @classmethod
    def sparse_layers(cls, model: nn.Module) -> Iterator[SparseLayer]:
        """The adapted layers of a model."""
        return (module for module in model.modules() if isinstance(module, cls.tuner_layer_cls))


def _parameters_go_to_meta() -> bool:
    """Whether PEFT makes an empty adapter: it doesn't say so to the first one, but changes what new parameters are."""
    probe = nn.Module()
    probe.register_parameter("probe", nn.Parameter(torch.empty(0)))
    return next(probe.parameters()).is_meta


def _keep_calling(module: nn.Module, args: Any) -> None:
    """A hook that changes nothing."""


def _float_dtype(model: nn.Module) -> torch.dtype | None:
    """Dtype of the first unquantised parameter of a model."""
    return next((p.dtype for p in model.parameters() if type(p) is nn.Parameter and p.is_floating_point()), None)
