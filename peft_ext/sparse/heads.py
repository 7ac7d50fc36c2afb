"""What a task puts on top of a pretrained model."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from .neurons import is_supported


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

    Of a transformers model with a body, these are the children beside it that have neurons, such as the pooler and the
    classifier of DeBERTa; a language model's output layer is none. Of others, children that are called like a head, or
    a linear layer with as many outputs as the model has labels.
    """
    outside = outside_body(model)
    if outside:
        if getattr(model, "get_output_embeddings", lambda: None)() is not None:
            return {}
        return {name: child for name, child in outside.items() if any(map(_has_neurons, child.modules()))}
    labels = getattr(model.config, "num_labels", None) if isinstance(model, PreTrainedModel) else None
    return {
        name: child
        for name, child in model.named_children()
        if (name in HEADS and any(map(_has_neurons, child.modules())))
        or (labels is not None and _outputs_of(child) == labels)
    }


def heads_to_save(model: nn.Module) -> list[str]:
    """
    Names for `modules_to_save` that train the heads, and them only.

    PEFT takes the end of a module's name for its name, so a head that is called like a part of the body is left out.
    """
    heads = heads_of(model)
    others = [name for name, _ in model.named_modules() if name.partition(".")[0] not in heads]
    return [head for head in heads if not any(name.endswith(head) for name in others)]


def _has_neurons(module: nn.Module) -> bool:
    return is_supported(module, None)


def _outputs_of(child: nn.Module) -> int | None:
    layer = getattr(child, "original_module", child)  # PEFT's wrapper of modules that are trained whole
    return layer.out_features if isinstance(layer, nn.Linear) else None
