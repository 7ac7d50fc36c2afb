"""Which layers of fused experts a config's targets stand for: they are parameters, not modules."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from ...hf.internals import BaseTunerLayer, ExcludedModule, check_target_module_exists
from ..bases.experts import bank_names
from ..bases.neurons import base_of
from ..config import SparseConfig


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name of each module of fused experts that can be adapted, and the module without adapters."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):  # of no prefixes, none
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (f"{name}.",)
        if name and bank_names(base_of(module)):
            yield name, base_of(module)


def banks_of(model: nn.Module) -> dict[str, str]:
    """Names of the parameters of fused experts that can be adapted, and the name of their module."""
    return {f"{name}.{bank}": name for name, base in expert_modules(model) for bank in bank_names(base)}


def wanted_banks(model: nn.Module, config: SparseConfig) -> dict[str, list[str]]:
    """
    Per module of experts, the parameters that a config asks for: by the module's name, its own, or
    `target_parameters`. Of a saved adapter, those that it was made for; of given entries, theirs. The model may have
    adapters in it.
    """
    return {
        name: [bank for bank in bank_names(base) if _is_wanted(name, bank, config)]
        for name, base in expert_modules(model)
    }


def _is_wanted(module: str, bank: str, config: SparseConfig) -> bool:
    key = f"{module}.{bank}"
    if config.supports is not None:
        return key in config.supports
    if config.from_checkpoint:
        return key in (config.expert_weights or ())
    found = [check_target_module_exists(config, name) for name in (module, key)]
    if any(isinstance(match, ExcludedModule) for match in found):
        return False
    return any(found) or any(f".{key}".endswith(f".{name}") for name in config.target_parameters or ())


def banks_in(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Per module of experts, the parameters that the keys of an adapter's state dict name."""
    return {
        name: [bank for bank in bank_names(base) if any(key.startswith(f"{name}.{bank}.") for key in state_dict)]
        for name, base in expert_modules(model)
    }


def check_target_parameters(model: nn.Module, config: SparseConfig, wanted: Mapping[str, list[str]]) -> None:
    """
    Raises:
        `ValueError`: if one of `target_parameters` stands for no layer of experts.
    """
    keys = [f".{name}.{bank}" for name, banks in wanted.items() for bank in banks]
    missing = [name for name in config.target_parameters or () if not any(key.endswith(f".{name}") for key in keys)]
    if missing and not config.from_checkpoint:
        raise ValueError(
            f"target_parameters={config.target_parameters!r}: '{missing[0]}' is no weight of fused experts in "
            f"{type(model).__name__}, or is excluded. Name parameters such as 'experts.gate_up_proj', and layers in "
            "`target_modules`."
        )


@contextmanager
def exclusions_noted(model: nn.Module, config: SparseConfig) -> Iterator[None]:
    """While the context is open, PEFT does not warn that `exclude_modules` fits no module, if it fits a weight of
    experts."""
    given = config.exclude_modules or ()
    names = banks_of(model)
    if isinstance(given, str):
        fits = any(re.fullmatch(given, name) for name in names)
    else:
        fits = any(f".{name}".endswith(f".{end}") for name in names for end in given)
    if not fits:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You have passed exclude_modules=.* no modules were excluded")
        yield


# Formats whose products are computed in kernels, by the class of the experts, and how to load the base without them.
_SEALED = {
    "Mxfp4GptOssExperts": ("mxfp4", "quantization_config=Mxfp4Config(dequantize=True)"),
    "FbgemmFp8Llama4TextExperts": (
        "fbgemm's fp8",
        "quantization_config=FbgemmFp8Config(modules_to_not_convert=[...])",
    ),
    "FP8Experts": ("packed fp4", "quantization_config=FineGrainedFP8Config(dequantize=True)"),
}


def why_not_adapted(module: nn.Module) -> str | None:
    """The reason why a module of fused experts can't be adapted, with the remedy; `None` if it can, or has none."""
    kind = type(module).__name__
    if bank_names(module):
        return None
    if kind in _SEALED:
        format, remedy = _SEALED[kind]
        return (
            f"its weights are in {format}, which kernels multiply by that adapters can't see into. Load the base with "
            f"{remedy}"
        )
    packs = any(parameter is not None and parameter.dim() >= 3 for parameter in module._parameters.values())
    if not packs or "expert" not in kind.lower():
        return None
    return (
        "it fuses the weights of several experts in a way that can't be adapted (packed or quantised weights, or a "
        "class that does not use transformers' use_experts_implementation)"
    )


def warn_of_others(model: nn.Module) -> None:
    """Name the modules of fused experts that are left out, and why."""
    others: dict[str, tuple[str, str]] = {}
    for name, module in model.named_modules():
        base = base_of(module)
        reason = why_not_adapted(base)
        if reason is not None:
            others.setdefault(type(base).__name__, (name, reason))
    for kind, (name, reason) in others.items():
        warnings.warn(f"{kind} ('{name}') is left out of the targets: {reason}.", stacklevel=2)
