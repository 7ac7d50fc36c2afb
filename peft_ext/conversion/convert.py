"""`convert`: read PEFT's sparse adapters, put ours in their place."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftMixedModel, PeftModel, get_peft_model
from torch import Tensor, nn

from ..hf.internals import ModulesToSaveWrapper
from ..install.snapshot import unchanged_on_error
from ..sparse.bases.sharing import weight_key
from ..tuners.neuroada import NeuroAdaConfig
from .folder import loaded
from .peers import Entries, check_convertible, entries_of, selection_of
from .switches import Switches


@dataclass
class _Adapter:
    """One adapter to be made anew: its options, its entries by module, and modules that it trains whole."""

    config: NeuroAdaConfig
    entries: dict[str, Entries]
    whole: dict[str, dict[str, Tensor]]


@torch.no_grad()
def convert(
    model: PeftModel | str | os.PathLike[str],
    base_model: nn.Module | None = None,
    **load_options: Any,
) -> PeftModel:
    """
    Turn SHiRA and Super-Tuning adapters into NeuroAda adapters. They compute the same, at a cost that follows the
    number of their entries. They can be trained on, saved, merged, and unmerged bit by bit.

    In float32, merged weights have the same bits as PEFT's. (Where modules share a weight, PEFT changes the other
    modules too.) In 16 bits, PEFT rounds Super-Tuning's values before it adds them; here the sum is rounded once. The
    `scaling` of a SHiRA adapter becomes part of its values.

    Args:
        model (`PeftModel` or `str`):
            A model with adapters of one of the two methods. Its layers are replaced, so go on with the model that is
            returned. Or the folder or Hub id of such an adapter.
        base_model (`torch.nn.Module`, *optional*):
            The model to load the adapter onto, if `model` is a folder or Hub id.
        **load_options:
            Passed on to `PeftModel.from_pretrained` if `model` is a folder or Hub id, such as `is_trainable`,
            `adapter_name` or `revision`.

    Returns:
        `PeftModel`: A model around the same base model, with the same adapters by name. The same adapters are active,
            disabled and trainable.

    Raises:
        `TypeError`: If an adapter is of another method, `model` is no `PeftModel`, or a load option is not known.
        `ValueError`: If an adapter has a LoRA part (Super-Tuning's `r`), is merged, has no indices, cannot be read, or
            does not fit the base model. After any error the model is as it was.

    Example:

        ```py
        >>> import peft_ext

        >>> model = peft_ext.convert("user/shira-adapter", base_model)
        >>> model.save_pretrained("converted")
        ```
    """
    if isinstance(model, (str, os.PathLike)):
        with loaded(os.fspath(model), base_model, load_options) as peft_model:
            return convert(peft_model)
    if isinstance(model, PeftMixedModel) or not isinstance(model, PeftModel):
        raise TypeError(
            f"model is a {type(model).__name__}, not a PeftModel; pass one with adapters of one method, or the folder "
            "of an adapter."
        )
    if base_model is not None or load_options:
        given = ["base_model"] * (base_model is not None) + list(load_options)
        raise ValueError(f"{', '.join(given)}: only for a folder or Hub id; a PeftModel has its base model.")
    adapters, active, first, training = _read(model), model.active_adapters, model.active_adapter, model.training
    with unchanged_on_error(model):
        base = model.get_base_model()
        switches = Switches(base)
        for name, module in list(base.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):  # `unload` would leave the trained copy
                parent, _, child = name.rpartition(".")
                setattr(base.get_submodule(parent), child, module.original_module)
        converted: Any = _build(model.unload(), adapters).train(training)
        if active != converted.active_adapters:
            converted.base_model.set_adapter(active)
        converted.active_adapter = first
        switches.apply(base)
    return converted


def _read(model: PeftModel) -> dict[str, _Adapter]:
    """All adapters of a model, by name, after every check."""
    if not model.peft_config:
        raise ValueError("model has no adapter, so there is nothing to convert; add or load one.")
    for name, config in model.peft_config.items():
        check_convertible(name, config)
    merged = sorted({name for layer in model.modules() for name in getattr(layer, "merged_adapters", ())})
    if merged:
        raise ValueError(f"Adapters {merged} are merged into the base weights; call unmerge_adapter() first.")
    base = model.get_base_model()
    adapters = {}
    for name, config in model.peft_config.items():
        entries = entries_of(base, name)
        _check_sharing(base, name, entries)
        adapters[name] = _Adapter(_config(base, config, entries), entries, _trained_whole(base, name))
    return adapters


def _config(base: nn.Module, config: PeftConfig, entries: dict[str, Entries]) -> NeuroAdaConfig:
    supports = {name: found.support for name, found in entries.items()}
    neurons = sum(support.rows for support in supports.values())
    copied = ("task_type", "inference_mode", "base_model_name_or_path", "revision", "modules_to_save")
    ours = NeuroAdaConfig(
        k=max(1, round(sum(support.entries for support in supports.values()) / max(neurons, 1))),
        selection=selection_of(config),
        target_modules=_targets(base, entries),
        **{name: getattr(config, name) for name in copied},
    )
    return ours.for_supports(supports)


def _targets(base: nn.Module, names: Iterable[str]) -> list[str] | str:
    """`target_modules` that stand for these modules and no others, though PEFT compares the ends of names."""
    wanted = set(names)
    ends = tuple(f".{name}" for name in wanted)
    if any(name.endswith(ends) and name not in wanted for name, _ in base.named_modules()):
        return "|".join(sorted(map(re.escape, wanted)))
    return sorted(wanted)


def _check_sharing(base: nn.Module, adapter_name: str, entries: dict[str, Entries]) -> None:
    first: dict[Any, str] = {}
    for name in entries:
        layer: Any = base.get_submodule(name)
        key = weight_key(layer.get_base_layer())
        if key is not None and first.setdefault(key, name) != name:
            raise ValueError(
                f"'{first[key]}' and '{name}' share one weight, but adapter '{adapter_name}' trains values for each, "
                "where here both would have the same. Untie the weights first."
            )


def _trained_whole(base: nn.Module, adapter_name: str) -> dict[str, dict[str, Tensor]]:
    """State, by name, of the modules that an adapter trains whole."""
    return {
        name: {key: tensor.clone() for key, tensor in module.modules_to_save[adapter_name].state_dict().items()}
        for name, module in base.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
    }


def _build(base: nn.Module, adapters: dict[str, _Adapter]) -> PeftModel:
    model: Any = None
    for name, adapter in adapters.items():
        if model is None:
            model = get_peft_model(base, adapter.config, adapter_name=name)
        else:
            model.add_adapter(name, adapter.config)
        for module_name, found in adapter.entries.items():
            layer: Any = base.get_submodule(module_name)
            delta = layer.deltas[name]
            delta.to(torch.promote_types(delta.weight.dtype, found.values.dtype))
            delta.weight.copy_(found.values.reshape(delta.weight.shape))
        for module_name, state in adapter.whole.items():
            whole: Any = base.get_submodule(module_name)
            whole.modules_to_save[name].load_state_dict(state)
    return model
