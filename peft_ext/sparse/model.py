"""Put sparse adapters into a model: check and choose everything first, then replace modules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._peft_internals import (
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    BaseTuner,
    BaseTunerLayer,
    get_quantization_kwargs,
    resolve_all_linear,
    resolve_quantization_backend,
)
from ..injection import clean_refusal
from .checkpoint import CheckpointMixin
from .config import SparseConfig
from .layer import SparseLinear
from .mixed_batch import MixedBatchMixin
from .neurons import SUPPORTED, is_supported, neuron_view
from .selection import parse_selection, select_supports
from .selection.plan import kept_neurons
from .support import Support
from .weighted import WeightedAdapterMixin


# Heads of transformers' classification and question-answering models: never adapted by default.
HEADS = ("classifier", "score", "qa_outputs")


@dataclass
class Planned:
    """A target's support; `pending` if it is a placeholder until a checkpoint is loaded."""

    support: Support
    pending: bool = False


class SparseModel(CheckpointMixin, MixedBatchMixin, WeightedAdapterMixin, BaseTuner):
    """
    Base of the sparse tuners' models; see [`NeuroAdaModel`]. Subclasses set `prefix` and `tuner_layer_cls`.

    Everything that can go wrong is found before the first module is replaced: targets of an unsupported type,
    weights that are not finite, missing scores.
    """

    tuner_layer_cls: type[SparseLinear]
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    _given_supports: dict[str, Support] | None = None  # entries chosen elsewhere, for the next injection

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
        self._inject_by_state_dict = state_dict is not None
        try:
            with clean_refusal(self.peft_config, model, adapter_name):
                super().inject_adapter(
                    model,
                    adapter_name,
                    autocast_adapter_dtype=autocast_adapter_dtype,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                    state_dict=state_dict,
                )
        finally:
            self._plan = {}
        self.peft_config[adapter_name].scores = None  # dense, and of no use once the entries are chosen

    def _prepare_adapter_config(self, peft_config: SparseConfig, model_config: dict[str, Any]) -> SparseConfig:
        if peft_config.target_modules is None:
            if not model_config.get("model_type") or model_config["model_type"] == "custom":
                raise ValueError(
                    "Please specify `target_modules` in `peft_config`: this is no transformers model, so its linear "
                    "layers and its output layer can't be told apart."
                )
            peft_config.target_modules = INCLUDE_LINEAR_LAYERS_SHORTHAND
            resolve_all_linear(peft_config, self.model)
            # PEFT's model classes wrap these heads in modules_to_save only after the injection.
            peft_config.target_modules = sorted(
                name
                for name in peft_config.target_modules or ()
                if name.split(".")[0] not in HEADS and _in_layers(name, peft_config)
            )
        return peft_config

    def _prepare_model(self, peft_config: SparseConfig, model: nn.Module) -> None:
        if self._inject_by_state_dict:
            return  # the state dict's keys decide what is adapted
        resolve_all_linear(peft_config, model)
        targets = {
            name: module
            for name, module in model.named_modules()
            if name and not self._inside_adapter(model, name) and self._check_target_module_exists(peft_config, name)
        }
        self._plan = self._make_plan(peft_config, targets)

    def _inside_adapter(self, model: nn.Module, name: str) -> bool:
        """Whether a module is part of an adapter's own machinery, such as the base layer inside it."""
        parts = name.split(".")
        return any(
            isinstance(model.get_submodule(".".join(parts[:depth])), BaseTunerLayer) for depth in range(1, len(parts))
        )

    def _make_plan(self, config: SparseConfig, targets: dict[str, nn.Module]) -> dict[str, Planned]:
        """Check the targets and choose their entries.

        Raises:
            `TypeError`: if a target is of a type that has no neurons.
            `ValueError`: if a weight is not finite, or scores are missing or of another shape.
        """
        bases = {name: _base_of(module) for name, module in targets.items()}
        backends = {name: self._quantization_backend(base) for name, base in bases.items()}
        for name, base in bases.items():
            if not is_supported(base, backends[name]):
                raise TypeError(
                    f"Target module '{name}' is a {type(base).__name__}, which is not supported. Supported are "
                    f"{SUPPORTED}. Narrow `target_modules`, or add '{name}' to `exclude_modules`."
                )
        if self._given_supports is not None:
            return {name: Planned(self._given_supports[name]) for name in bases}
        criterion, scope = parse_selection(config.selection)
        shapes = {name: self._matrix_shape(base) for name, base in bases.items()}
        without_scores = criterion == "gradient" and config.scores is None
        if without_scores and not config.from_checkpoint and not config.inference_mode:
            raise ValueError(
                f"selection={config.selection!r} needs scores; give them before the model is adapted:\n"
                "    config.with_scores({module_name: module.weight.grad, ...})\n"
                "    model = get_peft_model(model, config)"
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
        if criterion != "gradient":
            for name, backend in backends.items():
                if backend is not None and not backend.supports_merge:
                    raise TypeError(
                        f"Target module '{name}' is quantised by {backend.backend_name}, which can't give its weights "
                        "back, so no entries can be ranked. Choose them on the unquantised model and load them here."
                    )
        views = {name: partial(self._matrix, base, backends[name]) for name, base in bases.items()}
        scores = None
        if criterion == "gradient":
            scores = {name: _scores_of(config, name, base, shapes[name]) for name, base in bases.items()}
        supports = select_supports(views, config.selection, config.k, config.neuron_ratio, config.seed, scores)
        if scope == "network":
            config.support_sizes = {name: support.entries for name, support in supports.items()}
        return {name: Planned(support) for name, support in supports.items()}

    def _quantization_backend(self, base_layer: nn.Module) -> Any:
        return resolve_quantization_backend(base_layer, **get_quantization_kwargs(self))

    def _matrix(self, base_layer: Any, backend: Any) -> Tensor:
        weight = base_layer.weight.detach() if backend is None else backend.get_base_weight(base_layer)
        return neuron_view(base_layer, weight)

    def _matrix_shape(self, base_layer: Any) -> tuple[int, int]:
        if hasattr(base_layer, "out_features"):  # packed weights have another shape
            return base_layer.out_features, base_layer.in_features
        rows, fan_in = neuron_view(base_layer, base_layer.weight).shape
        return rows, fan_in

    def _placeholder(self, config: SparseConfig, name: str, rows: int, fan_in: int) -> Support:
        """A support of the shape that the config leads to, with arbitrary entries."""
        k = min(config.k, fan_in)
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
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config, planned.support, planned.pending)
            return
        layer = self._create_new_module(peft_config, adapter_name, target, planned)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trainable until it is activated
        self._replace_module(parent, target_name, layer, target)

    def _create_new_module(
        self, config: SparseConfig, adapter_name: str, target: nn.Module, planned: Planned
    ) -> SparseLinear:
        layer = self.tuner_layer_cls(target, self._quantization_backend(_base_of(target)))
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, config, planned.support, planned.pending)
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

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        owners: dict[int, str] = {}
        for name, layer in self.model.named_modules():
            if isinstance(layer, self.tuner_layer_cls):
                weight = layer.get_base_layer()._parameters.get("weight")
                first = name if weight is None else owners.setdefault(id(weight), name)
                if first != name:
                    raise ValueError(
                        f"'{first}' and '{name}' share one weight, so merging their adapters would add both to each. "
                        "Untie the weights before adapting, or adapt only one of the two."
                    )

    @classmethod
    def sparse_layers(cls, model: nn.Module) -> Iterator[SparseLinear]:
        """The adapted layers of a model."""
        return (module for module in model.modules() if isinstance(module, cls.tuner_layer_cls))


def _parameters_go_to_meta() -> bool:
    """Whether PEFT makes an empty adapter: it doesn't say so to the first one, but changes what new parameters are."""
    probe = nn.Module()
    probe.register_parameter("probe", nn.Parameter(torch.empty(0)))
    return next(probe.parameters()).is_meta


def _base_of(module: nn.Module) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _in_layers(name: str, config: SparseConfig) -> bool:
    """Whether a module is in one of the blocks of `layers_to_transform`. PEFT asks that of suffixes, not of the whole
    names that default targets are."""
    if config.layers_to_transform is None:
        return True
    wanted, pattern = config.layers_to_transform, config.layers_pattern or []
    match = re.match(r"(?:.*\.)?(?P<blocks>[^.]+)\.(?P<number>\d+)\.", name)
    return (
        match is not None
        and int(match["number"]) in ([wanted] if isinstance(wanted, int) else wanted)
        and (not pattern or match["blocks"] in ([pattern] if isinstance(pattern, str) else pattern))
    )


def _has_no_data(base_layer: nn.Module) -> bool:
    weight = getattr(base_layer, "weight", None)
    return isinstance(weight, Tensor) and weight.is_meta


def _scores_of(config: SparseConfig, name: str, base_layer: Any, shape: tuple[int, int]) -> Tensor:
    scores = config.scores or {}
    if name not in scores:
        raise ValueError(f"scores lack the target module '{name}'; add them, or leave it out of `target_modules`.")
    matrix = neuron_view(base_layer, scores[name])
    if tuple(matrix.shape) != shape:
        raise ValueError(
            f"scores['{name}'] has shape {tuple(scores[name].shape)}, but the module's weight is "
            f"{tuple(base_layer.weight.shape)}; give one score per weight."
        )
    return matrix
