"""Put sparse adapters into a model: check and choose everything first, then replace modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...hf.injection import clean_refusal, is_loading
from ...hf.internals import INCLUDE_LINEAR_LAYERS_SHORTHAND, BaseTuner, ExcludedModule
from ..bases.experts import bank_names
from ..bases.neurons import (
    SUPPORTED,
    base_of,
    check_real,
    experts_of,
    is_supported,
    matrix_shape,
    neuron_view,
    parameter_of,
    weights_of,
)
from ..bases.offloaded import is_offloaded
from ..bases.quantised import backend_of, float_weight
from ..bases.sharded import check_gatherable
from ..bases.sharing import identity, weight_key
from ..choose.by_expert import ExpertMatrices
from ..choose.experts import banks_in, check_target_parameters, exclusions_noted, wanted_banks
from ..choose.placeholders import placeholder, support_from, tables_in
from ..choose.targets import check_names, inside_adapter, named_by_target, resolve_targets, without_parts
from ..choose.unsuitable import check_suitable
from ..config import SparseConfig
from ..delta import SparseDelta
from ..layers import LayerTypes, SparseComposite, SparseLayer, part_biases, weights_of_layer
from ..memory import Region
from ..selection import SCORED, ScoreMatrices, parse_selection, select_supports
from ..selection.given import uncompiled
from ..support import Support
from .checkpoint import CheckpointMixin
from .merge import MergeMixin
from .merge_once import note_sharing
from .mixed_batch import MixedBatchMixin
from .uncalled import warn_of_untrained
from .weighted import WeightedAdapterMixin


@dataclass
class Planned:
    """A target's support; `pending` if it is a placeholder until a checkpoint is loaded."""

    support: Support
    pending: bool = False


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
        self._low_cpu_mem_usage = low_cpu_mem_usage or _parameters_go_to_meta()
        self._plan: dict[str, Planned] = {}
        self._deltas: dict[Any, SparseDelta] = {}  # of this adapter, by the weight that they are for
        self._dense_dtype = _float_dtype(model)
        self._kept_padded = getattr(self, "_kept_padded", [])
        self._given = tables_in(state_dict or {}, self.tuner_layer_cls.adapter_layer_names[0])
        self._named: set[str] | None = None
        self._banks: dict[str, list[str]] = {}  # of this adapter, by their module of experts
        if state_dict is not None:  # its keys decide what is adapted
            self._banks = banks_in(model, state_dict)
            state_dict = named_by_target(model, state_dict)
            self._named = {uncompiled(key.rsplit(f".{self.prefix}", 1)[0]) for key in state_dict}
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
            self._plan, self._deltas, self._given, self._banks = {}, {}, {}, {}
        note_sharing(model, self.tuner_layer_cls)
        # Of no use once the entries are chosen, and the scores are dense.
        self.peft_config[adapter_name].scores = self.peft_config[adapter_name].supports = None

    def _prepare_adapter_config(self, peft_config: SparseConfig, model_config: dict[str, Any]) -> SparseConfig:
        resolve_targets(peft_config, self.model, self.default_targets)
        return peft_config

    def _prepare_model(self, peft_config: SparseConfig, model: nn.Module) -> None:
        if self._named is None:
            check_names(model, peft_config)
            self._banks, self._given_targets = wanted_banks(model, peft_config), peft_config.target_modules
            check_target_parameters(model, peft_config, self._banks)
        targets = {
            name: module
            for name, module in model.named_modules()
            if name and not inside_adapter(model, name) and self._is_wanted(peft_config, name)
        }
        targets = without_parts(model, targets)
        exists = peft_config.from_checkpoint or peft_config.supports is not None or self._named is not None
        check_suitable(model, targets, trained=exists)
        # PEFT names the modules of a compiled model with or without its prefix, as a state dict does.
        self._plan = {uncompiled(name): planned for name, planned in self._make_plan(peft_config, targets).items()}

    def _is_wanted(self, config: SparseConfig, name: str) -> bool:
        if self._named is None:
            return self._check_target_module_exists(config, name)
        return uncompiled(name) in self._named

    def _take_entries_of_same_config(self, adapter_name: str) -> None:
        """
        An adapter made with the config of another one is a copy of it, as TRL makes them for a reference, and needs
        its entries. Choosing again would need scores, and could find others on a base that is not the adapter's own.
        """
        config = self.peft_config[adapter_name]
        of = next((name for name, other in self.peft_config.items() if other is config and name != adapter_name), None)
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, self.tuner_layer_cls)}
        deltas = {name: layer.deltas[of] for name, layer in layers.items() if of in layer.deltas}
        if deltas and not any(delta.pending for delta in deltas.values()):
            config.supports = {name: copy.deepcopy(delta.support) for name, delta in deltas.items()}

    def _keep_names_exact(self, config: SparseConfig) -> None:
        """PEFT shortens long lists of names so that they fit the same modules, but not the same weights of experts."""
        if self._named is None and wanted_banks(self.model, config) != self._banks:
            config.target_modules = self._given_targets

    def _make_plan(self, config: SparseConfig, targets: dict[str, nn.Module]) -> dict[str, Planned]:
        """
        Check the targets and choose their entries; where a checkpoint or a state dict brings the entries, only their
        shapes are planned.

        Raises:
            `TypeError`: if a target is of a type that has no neurons.
            `ValueError`: if a weight is not finite, or scores are missing or of another shape.
        """
        bases: dict[str, Any] = {}
        for name, module in targets.items():
            base = base_of(module)
            self._check_type(name, module, base)
            bases.update(self._weights_of(name, base))
        config.expert_weights = sorted(name for name, base in bases.items() if experts_of(base)) or None
        backends = {name: backend_of(self, base) for name, base in bases.items()}
        if config.supports is not None:
            return {name: Planned(config.supports[name]) for name in bases}
        # Layers that share a weight share their entries: each weight is looked at once, under its first name.
        first: dict[Any, str] = {}
        source = {name: first.setdefault(weight_key(base) or name, name) for name, base in bases.items()}
        for name, base in bases.items():
            other = bases[source[name]]
            biases = [getattr(layer, "bias", None) for layer in (base, other)]
            ours, theirs = (None if bias is None else Region.of(bias) for bias in biases)
            if config.train_bias and base is not other and ours != theirs:
                raise ValueError(
                    f"'{source[name]}' and '{name}' share a weight, so they share what an adapter trains, but their "
                    "biases differ. Set train_bias=False, or adapt only one of the two."
                )
        criterion, scope = parse_selection(config.selection)
        shapes = {name: matrix_shape(base) for name, base in bases.items()}
        for name, base in bases.items():
            if backends[name] is None:
                check_gatherable(name, parameter_of(base), *shapes[name])
                check_real(name, parameter_of(base))
        no_data = self._low_cpu_mem_usage or any(_has_no_data(base) for base in bases.values())
        awaits = is_loading() or self._low_cpu_mem_usage or self._named is not None
        if criterion in SCORED and config.scores is None and not awaits:
            raise ValueError(
                f"selection={config.selection!r} needs scores. Load a saved adapter with PeftModel.from_pretrained. "
                "For a new one, compute them before the model is adapted:\n"
                f"    scores = peft_ext.{criterion}_scores(model, dataloader)\n"
                "    model = get_peft_model(model, config.with_scores(scores))"
            )
        if awaits or no_data:  # a checkpoint brings the entries, or there is nothing to choose from
            return {name: self._awaiting(config, name, base, no_data) for name, base in bases.items()}
        sealed = {name: b for name, b in backends.items() if b is not None and not b.supports_merge}
        for name, backend in sealed.items() if criterion not in SCORED else ():
            raise TypeError(
                f"Target module '{name}' is quantised by {backend.backend_name}, which can't give its weights back, "
                "so no entries can be ranked. Choose them on the unquantised model, save that adapter, and load it "
                "here."
            )
        chosen = {name: bases[name] for name in first.values()}
        views: dict[str, Callable[[], Tensor]] = {
            name: partial(_matrix, base, backends[name]) for name, base in chosen.items()
        }
        # An adapter is chosen for the base weight, not for what is merged into it at the moment.
        merged = {identity(layer.get_base_layer()): layer for layer in self.sparse_layers(self.model) if layer.merged}
        views |= {
            name: merged[identity(base)].original_matrix for name, base in chosen.items() if identity(base) in merged
        }
        scores = ScoreMatrices(config.scores, chosen, shapes) if criterion in SCORED else None
        unused = sorted({*(config.k_pattern or {})} - {config.pattern_of(name) for name in bases})
        if unused:
            raise ValueError(f"k_pattern has {unused[0]!r}, which fits no adapted module; mend it or leave it out.")
        by_expert = ExpertMatrices(chosen, config)
        supports = by_expert.join(
            select_supports(
                by_expert.split(views),
                config.selection,
                lambda fan_in, key: config.entries_per_neuron(fan_in, by_expert.origin.get(key, (key,))[0]),
                config.neuron_ratio,
                config.seed,
                by_expert.split_scores(scores),
                config.column_budget,
            )
        )
        sizes = {name: supports[source[name]].entries for name in bases}
        config.support_sizes = sizes if scope == "network" else None
        return {name: Planned(supports[source[name]]) for name in bases}

    def _awaiting(self, config: SparseConfig, name: str, base: Any, no_data: bool) -> Planned:
        """Plan for a module whose tensors are about to be loaded."""
        tables = self._given.get(uncompiled(name), {})
        given = "indices" in tables
        support = support_from(tables, config, name, base) if given else placeholder(config, name, base)
        pending = not given or tables["indices"].is_meta or no_data
        return Planned(support.to("meta" if no_data else "cpu"), pending)

    def _weights_of(self, name: str, base: Any) -> dict[str, Any]:
        """The layers of a target that this adapter is for: of experts, those that it asks for."""
        wanted = self._banks.get(name)
        weights = weights_of(name, base)
        return weights if wanted is None else {f"{name}.{bank}": weights[f"{name}.{bank}"] for bank in wanted}

    def _check_target_module_exists(self, peft_config: SparseConfig, key: str) -> Any:
        match = super()._check_target_module_exists(peft_config, key)
        if key not in self._banks or isinstance(match, ExcludedModule):
            return match
        return bool(self._banks[key])

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
                self._update_layer(part, adapter_name, peft_config, self._plan[uncompiled(name)])
        if not is_new:
            return
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trainable until it is activated
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
        layer = self.layer_types.around(target, backend_of(self, base_of(target)))
        for part in weights_of_layer("", layer).values():
            part._active_adapter = adapter_name
            part.dense_dtype = self._dense_dtype
        layer._active_adapter = adapter_name
        return layer

    def _update_layer(self, layer: SparseLayer, adapter_name: str, config: SparseConfig, planned: Planned) -> None:
        key = weight_key(layer.get_base_layer())
        shared = None if key is None else self._deltas.get(key)
        layer.update_layer(adapter_name, config, planned.support, planned.pending, shared)
        if key is not None:
            self._deltas[key] = layer.deltas[adapter_name]

    def _check_type(self, name: str, module: nn.Module, base: nn.Module) -> None:
        advice = f"Narrow `target_modules`, or add '{name}' to `exclude_modules`."
        if not is_supported(base, backend_of(self, base)):
            fused = [key for key, parameter in base.named_parameters(recurse=False) if parameter.dim() == 3]
            size = " with an empty weight" if isinstance(base, nn.Linear) else ""
            hint = f" Its '{fused[0]}' fuses the weights of several layers into one." if fused else ""
            if isinstance(base, nn.Embedding):
                hint = " To train the embeddings of some tokens, name these in `trainable_token_indices`."
            raise TypeError(
                f"Target module '{name}' is a {type(base).__name__}{size}, which is not supported.{hint} Supported "
                f"are {SUPPORTED}. {advice}"
            )
        if not isinstance(base, nn.MultiheadAttention) and not bank_names(base):
            return
        is_attention = isinstance(base, nn.MultiheadAttention)
        if module is not base and not isinstance(module, self.layer_types.own):
            kind = "an attention" if is_attention else "a module of fused experts"
            raise TypeError(f"Target module '{name}' is {kind} that another method has adapted. {advice}")
        if is_offloaded(base):
            kind = "nn.MultiheadAttention" if is_attention else type(base).__name__
            raise TypeError(
                f"Target module '{name}' is an offloaded {kind}. Its weights are there only while the module itself "
                f"runs, which an adapted one does not. Keep it on a device. {advice}"
            )

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


def _matrix(base_layer: nn.Module, backend: Any) -> Tensor:
    return neuron_view(base_layer, float_weight(base_layer, backend))


def _float_dtype(model: nn.Module) -> torch.dtype | None:
    """Dtype of the first unquantised parameter of a model."""
    return next((p.dtype for p in model.parameters() if type(p) is nn.Parameter and p.is_floating_point()), None)


def _has_no_data(base_layer: nn.Module) -> bool:
    weight = getattr(base_layer, "weight", None)
    return isinstance(weight, Tensor) and weight.is_meta and not is_offloaded(base_layer)
