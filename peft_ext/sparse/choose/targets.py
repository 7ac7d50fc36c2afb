"""Modules that a config's `target_modules` stands for, where it is not a list of names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from ...hf.internals import (
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    resolve_all_linear,
)
from ..bases.neurons import base_of, gives_one_output, is_supported
from ..bases.projection import PROJECTIONS
from ..bases.quantised import backend_of
from ..config import SparseConfig
from .experts import banks_of, expert_modules, warn_of_others
from .heads import HEADS, heads_of, outside_body
from .unsuitable import unsuitable_layers


# `target_modules` that stands for every layer that has neurons, as PEFT's "all-linear" does for the linear ones.
ALL_NEURONS = "all-neurons"


def resolve_targets(config: SparseConfig, model: nn.Module, default: str) -> None:
    """
    Replace a config's `target_modules` by names of modules where it is `None` (which stands for `default`),
    `"all-linear"` or `"all-neurons"`. The model may have adapters in it.

    Raises `ValueError` if the targets are left to the default and the model is not of transformers: only the layers of
    those can be told from their heads.
    """
    by_default = config.target_modules is None
    if by_default and config.target_parameters:
        return  # as in PEFT, these alone
    if by_default:
        model_config = getattr(model, "config", None)
        get = model_config.get if isinstance(model_config, dict) else lambda key: getattr(model_config, key, None)
        if get("model_type") in (None, "", "custom"):
            raise ValueError(
                "Please specify `target_modules` in `peft_config`: this is no transformers model, so its layers and "
                "its output layer can't be told apart."
            )
        config.target_modules = default
    if resolved := str(config.target_modules).lower() in (ALL_NEURONS, INCLUDE_LINEAR_LAYERS_SHORTHAND):
        warn_of_others(model)
    if config.target_modules == ALL_NEURONS:
        config.target_modules = sorted(_layers_with_neurons(config, model))
    elif isinstance(config.target_modules, str) and config.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        resolve_all_linear(config, model)
        # PEFT finds an attention's output projection, which is not called, and not its others.
        linear = set(config.target_modules or ()) - unsuitable_layers(model).keys()
        composite = {*_attentions(model), *(name for name, _ in expert_modules(model))}
        config.target_modules = sorted({name for name in linear if _gives_one_output(model, name)} | composite)
    if by_default:
        # PEFT's model classes wrap these heads in modules_to_save only after the injection.
        config.target_modules = sorted(
            name
            for name in config.target_modules or ()
            if not is_head(model, name, config) and _in_layers(name, config)
        )
        if not config.target_modules:
            if config.layers_to_transform is None:
                raise ValueError(
                    f"target_modules=None stands for no layer of {type(model).__name__}: name the layers to adapt in "
                    "`target_modules`."
                )
            raise ValueError(
                f"layers_to_transform={config.layers_to_transform!r} and layers_pattern={config.layers_pattern!r} "
                "leave no layer to adapt; name blocks that the model has."
            )
    if resolved and config.layers_to_transform is None:  # which goes with a list alone
        config.target_modules = _exactly(model, sorted(config.target_modules or ()))


def _exactly(model: nn.Module, names: list[str]) -> list[str] | str:
    """Names as they are, or as a pattern where they are ends of other modules' names, which PEFT would take too."""
    others = {name for name, _ in model.named_modules() if not inside_adapter(model, name)}.difference(names)
    is_open = not {end for name in others for end in _ends(name)}.isdisjoint(names)
    return "|".join(map(re.escape, names)) if is_open else names


def is_head(model: nn.Module, name: str, config: SparseConfig) -> bool:
    """Whether a module is left out by default: it belongs to what a task puts on top of the pretrained model, which is
    new and random there (so that an adapter would fit no other copy), or is trained whole."""
    parts = name.split(".")
    if parts[0] in HEADS or "pooler" in parts or parts[0] in outside_body(model) or parts[0] in heads_of(model):
        return True
    whole = tuple(config.modules_to_save or ())
    # PEFT matches the end of a name, so that "classifier" is also "pre_classifier".
    return any(part.endswith(whole) for part in parts if whole)


def _layers_with_neurons(config: SparseConfig, model: nn.Module) -> Iterator[str]:
    """Every layer of a supported type but output layers and those that are trained whole."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    whole = {*(config.modules_to_save or ()), *(HEADS if isinstance(model, PreTrainedModel) else ())}
    heads = heads_of(model) if isinstance(model, PreTrainedModel) else {}
    unsuitable = unsuitable_layers(model)
    for name, module in model.named_modules():
        base = base_of(module)
        if (
            name
            and base is not output
            and name.partition(".")[0] not in heads
            and whole.isdisjoint(name.split("."))
            and not inside_adapter(model, name)
            and not isinstance(module, AuxiliaryTrainingWrapper)
            and not _is_inside(model, name, AuxiliaryTrainingWrapper)
            and name not in unsuitable
            and is_supported(base, backend_of(model, base))
            and _gives_one_output(model, name)
        ):
            yield name


def _gives_one_output(model: nn.Module, name: str) -> bool:
    """[`gives_one_output`] of a module that may be quantised, as PEFT's backends are known to."""
    base = base_of(model.get_submodule(name))
    if backend_of(model, base) is not None:
        return True
    is_empty = isinstance(base, nn.Linear) and not is_supported(base, None)
    return not is_empty and gives_one_output(base)


def _attentions(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if name and isinstance(base_of(module), nn.MultiheadAttention) and not inside_adapter(model, name):
            yield name


def _is_part(model: nn.Module, name: str) -> bool:
    """Whether a module belongs to an `nn.MultiheadAttention`, which reads its weight without calling it."""
    parent, _, _ = name.rpartition(".")
    return isinstance(base_of(model.get_submodule(parent)), nn.MultiheadAttention)


def without_parts(model: nn.Module, targets: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """
    Targets without the parts of targeted attention modules.

    Raises:
        `ValueError`: if a part is targeted without the attention.
    """
    parts = {name for name in targets if _is_part(model, name)}
    for name in sorted(parts):
        attention = name.rpartition(".")[0]
        if attention not in targets:
            raise ValueError(
                f"Target module '{name}' is a part of the nn.MultiheadAttention '{attention}', which uses its weight "
                f"without calling it. Target '{attention}' to adapt the attention's projections, or add '{name}' to "
                "`exclude_modules`."
            )
    return {name: module for name, module in targets.items() if name not in parts}


def check_names(model: nn.Module, config: SparseConfig) -> None:
    """
    Check that every name in a config's `target_modules` stands for a module, or for a weight of fused experts. A
    warning lists names that stand for none, and names of modules that layers fused into such a weight have too.

    Raises:
        `TypeError`: if one is the name of a layer that is fused into a weight, or of a fused weight that can't be
            adapted, and of nothing else: PEFT would pass over it, or say that there is no such module.
    """
    given = config.target_modules
    if given is None:
        return
    banks = banks_of(model)
    modules = [*(name for name, _ in model.named_modules()), *banks]
    fused = {name: name for name, p in model.named_parameters() if p.dim() >= 3 and not _is_weight(model, name)}
    if not config.from_checkpoint:  # whose adapter may have been made without asking for those
        fused |= _fused_layers(model, [*fused, *banks])
    if isinstance(given, str):
        targets = {given: [name for name in (*modules, *fused) if re.fullmatch(given, name)]}
    else:
        targets = {target: [] for target in sorted(given)}
        for name in (*modules, *fused):
            for end in _ends(name):
                if end in targets:
                    targets[end].append(name)
    for target, names in targets.items():
        if names and fused.keys() >= set(names):
            parameter = fused[names[0]]
            shape = "x".join(map(str, model.get_parameter(parameter).shape))
            advice = (
                f"Name '{parameter.rpartition('.')[2]}'."
                if parameter in banks
                else "It is computed in a way that can't be adapted. Leave it out: the model's layers can be adapted "
                "without it."
            )
            raise TypeError(
                f"target_modules={given!r}: '{target}' is no module here, but a part of '{parameter}', a parameter of "
                f"{shape}, which fuses the weights of all experts. {advice}"
            )
    if config.from_checkpoint:
        return
    in_others = {target: fused.keys() & set(names) for target, names in targets.items()}
    with_experts = [
        target
        for target, names in in_others.items()
        if any(fused[n] not in {*banks} & {*targets[target]} for n in names)
    ]
    if with_experts:
        warnings.warn(
            f"target_modules={with_experts}: only the layers of this name are adapted, not the experts', whose "
            "weights are fused into parameters of other names, such as 'experts.gate_up_proj'.",
            stacklevel=2,
        )
    without_module = [target for target, names in targets.items() if not names]
    if without_module and len(without_module) < len(targets):  # else PEFT says so
        warnings.warn(
            f"target_modules={without_module}: {type(model).__name__} has no modules of this name, so nothing is "
            "adapted for it. Look for the right name in model.named_modules(), or leave it out.",
            stacklevel=2,
        )


def _ends(name: str) -> Iterator[str]:
    """A module's name and what PEFT takes for it: `a.b.c`, `b.c`, `c`."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _fused_layers(model: nn.Module, parameters: list[str]) -> dict[str, str]:
    """
    Layers that are fused into parameters, under the names that they have in checkpoints, such as `w1` of Mixtral's
    experts, and the parameter that holds each. Of the experts, the first stands for all.
    """
    if not parameters or not isinstance(model, PreTrainedModel):
        return {}
    layers = {}
    for rule in get_model_conversion_mapping(model):
        if isinstance(rule, WeightConverter):
            for end in (target.lstrip(".") for target in rule.target_patterns):
                for parameter in (name for name in parameters if name.endswith(f".{end}")):
                    for source in rule.source_patterns:
                        layer = source.lstrip(".").removesuffix(".weight").replace("*", "0")
                        layers[parameter.removesuffix(end) + layer] = parameter
    return layers


def _is_weight(model: nn.Module, name: str) -> bool:
    """Whether a parameter belongs to a layer that can be adapted."""
    return is_supported(base_of(model.get_submodule(name.rpartition(".")[0])), None)


def named_by_target(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keys of an adapter's state dict under the names of the modules to replace: an attention or experts, not
    their parts."""
    attentions = [name for name, module in model.named_modules() if isinstance(base_of(module), nn.MultiheadAttention)]
    parts = {f"{name}.{part}.": f"{name}." for name in attentions for part in PROJECTIONS}
    parts |= {f"{bank}.": f"{name}." for bank, name in banks_of(model).items()}
    renamed = {}
    for key, tensor in state_dict.items():
        part = next((part for part in parts if key.startswith(part)), None)
        renamed[key if part is None else parts[part] + key.removeprefix(part)] = tensor
    return renamed


def inside_adapter(model: nn.Module, name: str) -> bool:
    """Whether a module is part of an adapter's own machinery, such as the base layer inside it."""
    return _is_inside(model, name, BaseTunerLayer)


def _is_inside(model: nn.Module, name: str, kind: type) -> bool:
    parts = name.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:depth])), kind) for depth in range(1, len(parts)))


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
