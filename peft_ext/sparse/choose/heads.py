"""Task heads: the modules that a task puts on top of a pretrained model."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import MODEL_MAPPING, PreTrainedModel

from ..bases.neurons import is_supported


# Heads of transformers' classification and question-answering models: never adapted by default.
HEADS = ("classifier", "score", "qa_outputs", "classification_head")


def body_of(model: nn.Module) -> nn.Module | None:
    """The pretrained part of a transformers model with a head, under its own name; `None` where there is none such."""
    body = getattr(model, getattr(model, "base_model_prefix", None) or "", None)
    return body if isinstance(body, nn.Module) else None


def outside_body(model: nn.Module) -> dict[str, nn.Module]:
    """The children beside the pretrained part."""
    body = body_of(model)
    return {} if body is None else {name: child for name, child in model.named_children() if child is not body}


def heads_of(model: nn.Module) -> dict[str, nn.Module]:
    """
    The children of a model that its task puts on top of it, by name: new and random in a model that is fine-tuned.

    Of a transformers model with a body, these are the children beside it that have parameters, such as the pooler and
    the classifier of DeBERTa; a language model's output layer is none. Of others, children that are called like a
    head, or a linear layer with as many outputs as the model has labels; and if there is one, and one child is a model
    of transformers, all others too, such as the projector between Whisper's encoder and its classifier. Not those of
    architectures that come with a head only, such as PP-LCNet: the layers before it are pretrained.
    """
    outside = outside_body(model)
    if outside:
        if getattr(model, "get_output_embeddings", lambda: None)() is not None:
            return {}
        return _with_parameters(outside)
    labels = getattr(model.config, "num_labels", None) if isinstance(model, PreTrainedModel) else None
    children = dict(model.named_children())
    heads = {
        name: child
        for name, child in children.items()
        if (name in HEADS and any(is_supported(module, None) for module in child.modules()))
        or (labels is not None and _outputs_of(child) == labels)
    }
    bodies = [name for name, child in children.items() if isinstance(child, PreTrainedModel)]
    if heads and len(bodies) == 1 and type(model.config) in MODEL_MAPPING:
        return _with_parameters({name: child for name, child in children.items() if name not in bodies})
    return heads


def heads_to_save(model: nn.Module) -> list[str]:
    """
    Names for `modules_to_save` that train the heads, and them only.

    PEFT takes the end of a module's name for its name. Of a head that is called like a part of the body, such as
    ModernVBERT's, the parts are named; a layer that is called so is left out, with a warning.
    """
    heads = {**heads_of(model), **_new_pooler(model)}
    others = [name for name, _ in model.named_modules() if not _is_inside(name, heads)]
    return [name for head, module in heads.items() for name in _names(head, module, others)]


def _names(name: str, module: nn.Module, others: list[str]) -> list[str]:
    """Unambiguous names for a module, or otherwise for the modules in it. PEFT takes no lists."""
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and not any(other.endswith(name) for other in others):
        return [name]
    if next(module.parameters(recurse=False), None) is not None:
        alike = next(other for other in others if other.endswith(name))
        warnings.warn(
            f"'{name}' belongs to the head but stays frozen: PEFT takes the end of a name for a module, and would "
            f"train '{alike}' too. Set `requires_grad` of its parameters yourself, and save it beside the adapter.",
            stacklevel=2,
        )
        return []
    parts = _with_parameters(dict(module.named_children()))
    return [found for part, child in parts.items() for found in _names(f"{name}.{part}", child, others)]


def _new_pooler(model: nn.Module) -> dict[str, nn.Module]:
    """The pooler of a body that has none but for a task, as Nomic's and GTE's have: no pretrained model holds it."""
    body = body_of(model)
    pooler: Any = getattr(body, "pooler", None)
    if not isinstance(pooler, nn.Module):
        return {}
    option = inspect.signature(type(body)).parameters.get("add_pooling_layer")
    return {"pooler": pooler} if option is not None and option.default is False else {}


def _is_inside(name: str, heads: Mapping[str, nn.Module]) -> bool:
    return name.partition(".")[0] in heads or ("pooler" in heads and "pooler" in name.split("."))


def _with_parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {name: module for name, module in modules.items() if next(module.parameters(), None) is not None}


def _outputs_of(child: nn.Module) -> int | None:
    layer = getattr(child, "original_module", child)  # PEFT's wrapper of modules that are trained whole
    return layer.out_features if isinstance(layer, nn.Linear) else None
