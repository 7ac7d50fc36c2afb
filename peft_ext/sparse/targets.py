"""Which modules a config's `target_modules` stands for, where it is no list of names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .._peft_internals import (
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    resolve_all_linear,
)
from .config import SparseConfig
from .heads import HEADS, heads_of, outside_body
from .neurons import gives_one_output, is_supported
from .projection import PROJECTIONS
from .quantised import backend_of


# `target_modules` that stands for every layer that has neurons, as PEFT's "all-linear" does for the linear ones.
ALL_NEURONS = "all-neurons"


def resolve_targets(config: SparseConfig, model: nn.Module, default: str) -> None:
    """
    Replace `target_modules` by names of modules where it is `None`, `"all-linear"` or `"all-neurons"`.

    Args:
        config ([`SparseConfig`]): changed in place.
        model (`nn.Module`): the base model, perhaps with adapters in it.
        default (`str`): what `None` stands for. Only the layers of transformers' models can be told from their heads.

    Raises:
        `ValueError`: if the targets are left to the default and the model is not of transformers.
    """
    by_default = config.target_modules is None
    if by_default:
        model_config = getattr(model, "config", None)
        get = model_config.get if isinstance(model_config, dict) else lambda key: getattr(model_config, key, None)
        if get("model_type") in (None, "", "custom"):
            raise ValueError(
                "Please specify `target_modules` in `peft_config`: this is no transformers model, so its layers and "
                "its output layer can't be told apart."
            )
        config.target_modules = default
    if config.target_modules == ALL_NEURONS:
        config.target_modules = sorted(_layers_with_neurons(config, model))
    elif isinstance(config.target_modules, str) and config.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        resolve_all_linear(config, model)
        # PEFT finds an attention's output projection, which is not called, and not its others.
        linear = {name for name in config.target_modules or () if not is_part(model, name)}
        config.target_modules = sorted(
            {name for name in linear if _gives_one_output(model, name)} | set(_attentions(model))
        )
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
    for name, module in model.named_modules():
        base = base_of(module)
        if (
            name
            and base is not output
            and name.partition(".")[0] not in heads
            and whole.isdisjoint(name.split("."))
            and not inside_adapter(model, name)
            and not _is_trained_whole(model, name)
            and not is_part(model, name)
            and is_supported(base, backend_of(model, base))
            and _gives_one_output(model, name)
        ):
            yield name


def _gives_one_output(model: nn.Module, name: str) -> bool:
    """[`gives_one_output`] of a module that may be quantised, as PEFT's backends are known to."""
    base = base_of(model.get_submodule(name))
    return backend_of(model, base) is not None or gives_one_output(base)


def _is_trained_whole(model: nn.Module, name: str) -> bool:
    """Whether a module is, or is inside, one that PEFT has wrapped to train it or its tokens beside adapters."""
    parts = name.split(".")
    ancestors = (model.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts) + 1))
    return any(isinstance(module, AuxiliaryTrainingWrapper) for module in ancestors)


def _attentions(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if name and isinstance(base_of(module), nn.MultiheadAttention) and not inside_adapter(model, name):
            yield name


def is_part(model: nn.Module, name: str) -> bool:
    """Whether a module belongs to an `nn.MultiheadAttention`, which reads its weight without calling it."""
    parent, _, _ = name.rpartition(".")
    return isinstance(base_of(model.get_submodule(parent)), nn.MultiheadAttention)


def without_parts(model: nn.Module, targets: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """
    Targets without the parts of targeted attention modules.

    Raises:
        `ValueError`: if a part is targeted without the attention.
    """
    parts = {name for name in targets if is_part(model, name)}
    for name in sorted(parts):
        attention = name.rpartition(".")[0]
        if attention not in targets:
            raise ValueError(
                f"Target module '{name}' is a part of the nn.MultiheadAttention '{attention}', which uses its weight "
                f"without calling it. Target '{attention}' to adapt the attention's projections, or add '{name}' to "
                "`exclude_modules`."
            )
    return {name: module for name, module in targets.items() if name not in parts}


def check_no_fused(model: nn.Module, target_modules: Any) -> None:
    """
    Raises:
        `TypeError`: if a target is the name of a parameter that fuses several layers, as those of experts are, and of
            no module: PEFT would pass over it, or say that there is no such module.
    """
    if target_modules is None:
        return
    modules = [name for name, _ in model.named_modules()]
    fused = [
        name for name, parameter in model.named_parameters() if parameter.dim() >= 3 and not _is_weight(model, name)
    ]
    for target in [target_modules] if isinstance(target_modules, str) else sorted(target_modules):
        pattern = target if isinstance(target_modules, str) else rf"(?:.*\.)?{re.escape(target)}"
        found = next((name for name in fused if re.fullmatch(pattern, name)), None)
        if found is not None and not any(re.fullmatch(pattern, name) for name in modules):
            shape = "x".join(map(str, model.get_parameter(found).shape))
            raise TypeError(
                f"target_modules={target_modules!r}: '{found}' is no module but a parameter of {shape}. Adapters are "
                "put on layers; experts whose weights are fused into one parameter are not supported. Leave it out: "
                "the model's layers can be adapted without it."
            )


def _is_weight(model: nn.Module, name: str) -> bool:
    """Whether a parameter belongs to a layer that can be adapted."""
    return is_supported(base_of(model.get_submodule(name.rpartition(".")[0])), None)


def named_by_target(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keys of an adapter's state dict under the names of the modules to replace: an attention, not its parts."""
    attentions = [name for name, module in model.named_modules() if isinstance(base_of(module), nn.MultiheadAttention)]
    parts = {f"{name}.{part}.": f"{name}." for name in attentions for part in PROJECTIONS}
    renamed = {}
    for key, tensor in state_dict.items():
        part = next((part for part in parts if key.startswith(part)), None)
        renamed[key if part is None else parts[part] + key.removeprefix(part)] = tensor
    return renamed


def base_of(module: nn.Module) -> Any:
    """The layer inside a tuner's layer, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def inside_adapter(model: nn.Module, name: str) -> bool:
    """Whether a module is part of an adapter's own machinery, such as the base layer inside it."""
    parts = name.split(".")
    return any(
        isinstance(model.get_submodule(".".join(parts[:depth])), BaseTunerLayer) for depth in range(1, len(parts))
    )


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
