"""Trained parts of a Llava: a choice for each of vision tower, connector and language model."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText

from .methods import PARTS, Method


def prepare(
    model: Any, vision_tower: str | dict[str, Any], connector: str, language_model: str | dict[str, Any] | Method
) -> Any:
    """
    Choose what is trained.

    Args:
        model (`PreTrainedModel`): a Llava.
        vision_tower (`str` or `dict`): `frozen`, `full` or a method.
        connector (`str`): `frozen` or `full`.
        language_model (`str`, `dict` or [`Method`]): `frozen`, `full` or a method.

    Returns:
        `PreTrainedModel` or `PeftModel`: the model itself where no adapter is asked for.

    Raises:
        `ValueError`: if the combination is none that PEFT can train and save in one adapter.
    """
    lacking = [name for name in PARTS.values() if not hasattr(getattr(model, "model", None), name)]
    if lacking:
        raise ValueError(
            f"A {type(model).__name__} lacks `model.{lacking[0]}`, so it is no Llava that can be adapted."
        )
    if connector not in ("frozen", "full"):
        raise ValueError(f"connector={connector!r}: the connector is 'frozen' or 'full'.")
    chosen = {"vision_tower": _method(vision_tower), "language_model": _method(language_model)}
    kinds = {part: "frozen" if method is None else method.kind for part, method in chosen.items()}
    adapters = {part: method for part, method in chosen.items() if method is not None and kinds[part] not in _WHOLE}
    model.requires_grad_(False)
    if not adapters:
        _train_whole(model, kinds, connector)
    else:
        model = _adapt(model, adapters, kinds, connector)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("vision_tower, connector and language_model are all frozen: nothing is trained.")
    return model


_WHOLE = ("full", "bitfit")


def _method(name: Any) -> Method | None:
    if name == "frozen":
        return None
    return name if isinstance(name, Method) else Method.parse(name)


def connector_modules(model: Any) -> list[str]:
    """Trained part of the connector; for a linear one in transformers' format, its first layer alone."""
    connector = model.model.multi_modal_projector
    fixed = type(getattr(connector, "act", None)).__name__ == "LinearActivation"
    return ["multi_modal_projector.linear_1" if fixed else "multi_modal_projector"]


def _train_whole(model: Any, kinds: dict[str, str], connector: str) -> None:
    if connector == "full":
        for name in connector_modules(model):
            model.model.get_submodule(name).requires_grad_(True)
    if kinds["vision_tower"] == "full":
        model.model.vision_tower.requires_grad_(True)
    decoder, head = model.model.language_model, model.get_output_embeddings()
    if kinds["language_model"] == "full":
        decoder.requires_grad_(True)
        head.requires_grad_(True)
    for part, modules in (("language_model", [decoder, head]), ("vision_tower", [model.model.vision_tower])):
        if kinds[part] != "bitfit":
            continue
        biases = [p for module in modules for name, p in module.named_parameters() if name.endswith("bias")]
        if not biases:
            raise ValueError(f"bitfit trains biases, and the {part} ({type(modules[0]).__name__}) has none.")
        for bias in biases:
            bias.requires_grad_(True)


def _adapt(model: Any, adapters: dict[str, Method], kinds: dict[str, str], connector: str) -> Any:
    rest = {part: kind for part, kind in kinds.items() if part not in adapters and kind != "frozen"}
    if rest.get("language_model") or "bitfit" in rest.values():
        raise ValueError(
            f"{adapters} adapts one part and {rest} trains another's own weights; beside an adapter, only the vision "
            "tower and the connector can be trained in full."
        )
    if len({(method.name, str(method.options)) for method in adapters.values()}) > 1:
        raise ValueError(
            "vision_tower and language_model name different adapters; PEFT saves one kind of adapter with a model. "
            "Name the same one twice, or train the tower in full."
        )
    configs = [method.config(model, part) for part, method in adapters.items()]
    config = configs[-1]
    for other in configs[:-1]:
        for name in ("target_modules", "feedforward_modules"):
            if hasattr(config, name):
                setattr(config, name, f"{getattr(config, name)}|{getattr(other, name)}")
    saved = list(config.modules_to_save or ())
    saved += connector_modules(model) if connector == "full" else []
    saved += ["vision_tower"] if kinds["vision_tower"] == "full" else []
    config.modules_to_save = saved or None
    return get_peft_model(model, config)


def trained_by_part(model: Any) -> dict[str, int]:
    """Number of trained parameters of vision tower, connector and language model; the paper's TP is the last."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((part for part, module in PARTS.items() if module in name), "language_model")
            counts[part] += parameter.numel()
    return counts


def adapt(model: Any, method: str | Method) -> Any:
    """
    The model prepared for training by one method. `full` and `projector` train the connector too; the vision tower
    stays as it is.
    """
    chosen = method if isinstance(method, Method) else Method.parse(method)
    connector = "full" if chosen.kind in ("full", "projector") else "frozen"
    return prepare(model, "frozen", connector, "frozen" if chosen.kind == "projector" else chosen)


def counts(model: str, methods: list[str]) -> dict[str, dict[str, int]]:
    """What methods train in a model, without its weights: [`trained_by_part`] of each method."""
    config = AutoConfig.from_pretrained(model)
    results = {}
    for name in methods:
        with torch.device("meta"):
            results[name] = trained_by_part(adapt(AutoModelForImageTextToText.from_config(config), name))
    return results
