"""Put sparse adapters into a model: check and choose everything first, then replace modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._peft_internals import (
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    BaseTuner,
    resolve_all_linear,
)
from .checkpoint import CheckpointMixin
from .config import SparseConfig
from .delta import SparseDelta
from .layers import LayerTypes, SparseLayer
from .merge import MergeMixin
from .mixed_batch import MixedBatchMixin
from .neurons import SUPPORTED, is_supported, matrix_shape, neuron_view
from .quantised import backend_of, float_weight
from .selection import SCORED, ScoreMatrices, parse_selection, select_supports
from .selection.plan import kept_neurons
from .sharing import note_sharing, weight_key
from .support import Support
from .targets import base_of, inside_adapter, resolve_targets
from .weighted import WeightedAdapterMixin


@dataclass
class Planned:
    """A target's support; `pending` if it is a placeholder until a checkpoint is loaded."""

    support: Support
    pending: bool = False


class SparseModel(CheckpointMixin, MergeMixin, MixedBatchMixin, WeightedAdapterMixin, BaseTuner):
    """
    Base of the sparse tuners' models; see [`NeuroAdaModel`]. Subclasses set `prefix` and are named `<Method>Model`;
    the classes of their layers, `<Method>Linear` and so on, are made from that.

    Everything that can go wrong is found before the first module is replaced: targets of an unsupported type,
    weights that are not finite, missing scores.
    """

    prefix: str
    layer_types: ClassVar[LayerTypes]
    tuner_layer_cls: type[SparseLayer]
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    default_targets: ClassVar[str] = INCLUDE_LINEAR_LAYERS_SHORTHAND  # what `target_modules=None` means
    _given_supports: dict[str, Support] | None = None  # entries chosen elsewhere, for the next injection

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "prefix" in vars(cls):
            cls.layer_types = LayerTypes.of_method(cls.__name__.removesuffix("Model"), cls.prefix, cls.__module__)
            cls.tuner_layer_cls = cls.layer_types.layer

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
        config = self.peft_config[adapter_name]
        config.awaits_weights = config.from_checkpoint
        config.trainable_before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._plan: dict[str, Planned] = {}
        self._deltas: dict[Any, SparseDelta] = {}  # of this adapter, by the weight that they are for
        self._dense_dtype = _float_dtype(model)
        self._inject_by_state_dict = state_dict is not None
        try:
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
        except BaseException:
            self.peft_config.pop(adapter_name, None)  # transformers shares this table with the adapters before
            # transformers marks the model as adapted before it calls us, and then expects a `peft_config` on it.
            if getattr(model, "_hf_peft_config_loaded", False) and not hasattr(model, "peft_config"):
                model.__dict__.pop("_hf_peft_config_loaded", None)
            raise
        finally:
            self._plan, self._deltas = {}, {}
        note_sharing(model, self.tuner_layer_cls)
        self.peft_config[adapter_name].scores = None  # dense, and of no use once the entries are chosen

    def _prepare_adapter_config(self, peft_config: SparseConfig, model_config: dict[str, Any]) -> SparseConfig:
        resolve_targets(peft_config, self.model, self.default_targets)
        return peft_config

    def _prepare_model(self, peft_config: SparseConfig, model: nn.Module) -> None:
        if self._inject_by_state_dict:
            return  # the state dict's keys decide what is adapted
        resolve_all_linear(peft_config, model)
        targets = {
            name: module
            for name, module in model.named_modules()
            if name and not inside_adapter(model, name) and self._check_target_module_exists(peft_config, name)
        }
        self._plan = self._make_plan(peft_config, targets)

    def _make_plan(self, config: SparseConfig, targets: dict[str, nn.Module]) -> dict[str, Planned]:
        """Check the targets and choose their entries.

        Raises:
            `TypeError`: if a target is of a type that has no neurons.
            `ValueError`: if a weight is not finite, or scores are missing or of another shape.
        """
        bases = {name: base_of(module) for name, module in targets.items()}
        backends = {name: backend_of(self, base) for name, base in bases.items()}
        for name, base in bases.items():
            if not is_supported(base, backends[name]):
                raise TypeError(
                    f"Target module '{name}' is a {type(base).__name__}, which is not supported. Supported are "
                    f"{SUPPORTED}. Narrow `target_modules`, or add '{name}' to `exclude_modules`."
                )
        if self._given_supports is not None:
            return {name: Planned(self._given_supports[name]) for name in bases}
        # Layers that share a weight share their entries: each weight is looked at once, under its first name.
        first: dict[Any, str] = {}
        source = {name: first.setdefault(weight_key(base) or name, name) for name, base in bases.items()}
        for name, base in bases.items():
            other = bases[source[name]]
            if config.train_bias and getattr(base, "bias", None) is not getattr(other, "bias", None):
                raise ValueError(
                    f"'{source[name]}' and '{name}' share a weight, so they share what an adapter trains, but their "
                    "biases differ. Set train_bias=False, or adapt only one of the two."
                )
        criterion, scope = parse_selection(config.selection)
        shapes = {name: matrix_shape(base) for name, base in bases.items()}
        without_scores = criterion in SCORED and config.scores is None
        if without_scores and not config.from_checkpoint and not config.inference_mode:
            raise ValueError(
                f"selection={config.selection!r} needs scores; compute them before the model is adapted:\n"
                f"    scores = peft_ext.{criterion}_scores(model, dataloader)\n"
                "    model = get_peft_model(model, config.with_scores(scores))"
            )
        # Nothing to choose from, or a checkpoint brings the entries: shapes are all that is needed.
        in_checkpoint = config.from_checkpoint and config.support_sizes is not None
        no_data = self._low_cpu_mem_usage or any(_has_no_data(base) for base in bases.values())
        if without_scores or in_checkpoint or no_data:
            device = torch.device("meta" if no_data else "cpu")
            return {
                name: Planned(self._placeholder(config, name, *shapes[name]).to(device), pending=True)
                for name in bases
            }
        if criterion not in SCORED:
            for name, backend in backends.items():
                if backend is not None and not backend.supports_merge:
                    raise TypeError(
                        f"Target module '{name}' is quantised by {backend.backend_name}, which can't give its weights "
                        "back, so no entries can be ranked. Choose them on the unquantised model and load them here."
                    )
        chosen = {name: bases[name] for name in first.values()}
        views = {name: partial(_matrix, base, backends[name]) for name, base in chosen.items()}
        scores = ScoreMatrices(config.scores, chosen, shapes) if criterion in SCORED else None
        supports = select_supports(
            views, config.selection, config.entries_per_neuron, config.neuron_ratio, config.seed, scores
        )
        if scope == "network":
            config.support_sizes = {name: supports[source[name]].entries for name in bases}
        return {name: Planned(supports[source[name]]) for name in bases}

    def _placeholder(self, config: SparseConfig, name: str, rows: int, fan_in: int) -> Support:
        """A support of the shape that the config leads to, with arbitrary entries."""
        k = config.entries_per_neuron(fan_in)
        _, scope = parse_selection(config.selection)
        if config.support_sizes is not None:
            entries = config.support_sizes.get(name, 0)
        elif scope == "neuron" and config.neuron_ratio == 1.0:
            return Support(torch.arange(k, dtype=torch.int32).repeat(rows, 1), fan_in)
        else:  # network-wide sizes are unknown before the weights are: as if shared out evenly
            entries = k * (rows if scope != "neuron" else kept_neurons(rows, config.neuron_ratio))
        columns = torch.arange(entries, dtype=torch.int32) % fan_in
        offsets = (torch.arange(rows + 1) * fan_in).clamp(max=entries).to(torch.int32)
        return Support(columns, fan_in, offsets)

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
        planned = self._plan.get(current_key)
        if planned is None:  # chosen by the keys of a state dict, not by the config
            planned = self._make_plan(peft_config, {current_key: target})[current_key]
        key = weight_key(base_of(target))
        shared = None if key is None else self._deltas.get(key)
        if isinstance(target, self.tuner_layer_cls):
            layer = target
            layer.update_layer(adapter_name, peft_config, planned.support, planned.pending, shared)
        else:
            layer = self._create_new_module(peft_config, adapter_name, target, planned, shared)
        if key is not None:
            self._deltas[key] = layer.deltas[adapter_name]
        if layer is target:
            return
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trainable until it is activated
        self._replace_module(parent, target_name, layer, target)

    def _create_new_module(
        self,
        config: SparseConfig,
        adapter_name: str,
        target: nn.Module,
        planned: Planned,
        shared: SparseDelta | None = None,
    ) -> SparseLayer:
        base = base_of(target)
        layer = self.layer_types.for_base(base)(target, backend_of(self, base))
        layer._active_adapter = adapter_name
        layer.dense_dtype = self._dense_dtype
        layer.update_layer(adapter_name, config, planned.support, planned.pending, shared)
        return layer

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


def _matrix(base_layer: nn.Module, backend: Any) -> Tensor:
    return neuron_view(base_layer, float_weight(base_layer, backend))


def _float_dtype(model: nn.Module) -> torch.dtype | None:
    """What an unquantised part of a model computes in."""
    return next((p.dtype for p in model.parameters() if type(p) is nn.Parameter and p.is_floating_point()), None)


def _has_no_data(base_layer: nn.Module) -> bool:
    weight = getattr(base_layer, "weight", None)
    return isinstance(weight, Tensor) and weight.is_meta
