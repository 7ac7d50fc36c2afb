"""Turns the matrices that PEFT's tests are parametrised with into cases for another config.

A row says which model, which modules and which settings of one of PEFT's methods. What the methods have in common
(`target_modules`, `modules_to_save`, ...) is kept, what is special to one (`r`, `lora_alpha`, ...) is dropped, and of
rows that then say the same one is run. So the cases follow PEFT's matrices of whatever release is installed.
"""

from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any

from peft import LoraConfig, PeftConfig, PromptLearningConfig, TrainableTokensConfig
from peft.tuners.tuners_utils import check_target_module_exists

from .methods import Method


SHARED_KEYS = (
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
    "trainable_token_indices", "task_type", "bias",
)  # fmt: skip

# Why a layer that other methods of PEFT target is none of ours.
UNSUPPORTED_LAYERS = {
    "Embedding": "`nn.Embedding` is a look-up: it has no neurons with inputs to choose from",
    "LayerNorm": "`nn.LayerNorm` has one weight per channel, so there is nothing to choose from",
}

_SETTINGS_ONLY_OTHERS_HAVE = {
    "target_parameters": "`target_parameters` is an argument of LoRA",
    "alora_invocation_tokens": "activated LoRA",
}


class Leftovers(dict[str, str]):
    """The rows that were not taken over, with the reason."""


def _shared(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: kwargs[key] for key in SHARED_KEYS if kwargs.get(key) not in (None, "none")}


def _unwrap(row: Any) -> tuple[Any, ...]:
    if hasattr(row, "values") and hasattr(row, "marks"):  # pytest.param
        return tuple(row.values)
    return tuple(row) if isinstance(row, (tuple, list)) else (row,)


def _convert_config(config: PeftConfig, method: Method) -> PeftConfig:
    kwargs = {key: getattr(config, key) for key in SHARED_KEYS if getattr(config, key, None)}
    kwargs.pop("bias", None)
    inits = (getattr(config, name, True) for name in ("init_lora_weights", "init_ia3_weights", "init_weights"))
    return method.config_class(**method.kwargs, **kwargs, init_weights=all(inits))


def _is_tuner(value: Any) -> bool:
    kind = value if isinstance(value, type) else type(value)
    return issubclass(kind, PeftConfig) and not issubclass(kind, (PromptLearningConfig, TrainableTokensConfig))


def _is_config(value: Any) -> bool:
    return isinstance(value, PeftConfig) or (isinstance(value, type) and issubclass(value, PeftConfig))


def mentions_config(rows: Iterable[Any]) -> bool:
    """Whether the values of a `parametrize` mark hold a config or the class of one."""
    return any(_is_config(value) for row in rows for value in _unwrap(row))


def convert_rows(
    names: tuple[str, ...],
    rows: Iterable[Any],
    method: Method,
    layers_of: Callable[[str, Any], Set[str]],
    extra: dict[str, Any],
) -> tuple[list[Any], Leftovers]:
    """
    Rewrites the values of one `parametrize` mark.

    Args:
        names (`tuple[str, ...]`): what the values of a row are called.
        rows (`Iterable`): PEFT's rows.
        method (`Method`): the config to write them for.
        layers_of (`Callable`): gives the types of the modules of a toy model that `target_modules` selects.
        extra (`dict`): settings for each case of this module.

    Returns:
        `tuple[list, Leftovers]`: the rows for the method, and what was left out and why.
    """
    leftovers = Leftovers()
    converted: dict[str, tuple[Any, ...]] = {}
    for row in rows:
        values = dict(zip(names, _unwrap(row), strict=True))
        label = str(values.get("test_name", next(iter(_class_names(values)), "")))
        reason = _why_not(values, method, layers_of)
        if reason is not None:
            leftovers[label] = reason
            continue
        for variant in ({**extra, **variant} for variant in _variants(values, method)):
            fresh = {name: _convert_value(name, value, variant, method) for name, value in values.items()}
            name = method.config_class.__name__.removesuffix("Config")
            if "test_name" in fresh:
                fresh["test_name"] = f"{name} {len(converted) + 1}"
            if "tuner_method" in fresh and "trainable_tokens" not in fresh["tuner_method"]:
                fresh["tuner_method"] = name.lower()  # it selects the toy model, and checks that only LoRA needs
            key = repr([_key(value) for name, value in fresh.items() if name not in ("test_name", "tuner_method")])
            converted.setdefault(key, tuple(fresh.values()))
    unpacked = [row[0] if len(names) == 1 else row for row in converted.values()]
    return unpacked, leftovers


def _class_names(values: dict[str, Any]) -> Iterator[str]:
    for value in values.values():
        if _is_config(value):
            yield (value if isinstance(value, type) else type(value)).__name__


def _key(value: Any) -> Any:
    return sorted((k, str(v)) for k, v in vars(value).items()) if isinstance(value, PeftConfig) else value


def _variants(values: dict[str, Any], method: Method) -> Iterator[dict[str, Any]]:
    yield {}
    # Every backend and selection runs through the tests of the custom models, on a model with both of its layers
    # targeted; elsewhere one setting is enough.
    targets = values.get("config_kwargs", {}).get("target_modules") or ()
    if values.get("model_id") == "MLP" and sorted(targets) == ["lin0", "lin1"]:
        yield from method.variants


def _convert_value(name: str, value: Any, variant: dict[str, Any], method: Method) -> Any:
    if isinstance(value, PeftConfig):
        return _convert_config(value, method)
    if _is_config(value):
        return method.config_class
    if isinstance(value, dict) and name.startswith(("config_kwargs", "mandatory_kwargs")):
        # Two adapters must differ from the start to be told apart; where there is one, the tests set this themselves.
        start = {"init_weights": False} if name.startswith("config_kwargs_") else {}
        return {**method.kwargs, **variant, **_shared(value), **start}
    return value


def _why_not(values: dict[str, Any], method: Method, layers_of: Callable[[str, Any], Set[str]]) -> str | None:
    for value in values.values():
        if _is_config(value) and not _is_tuner(value):
            kind = value if isinstance(value, type) else type(value)
            if issubclass(kind, PromptLearningConfig):
                return "prompt learning"
            return "`TrainableTokensConfig` on its own"
        if isinstance(value, dict):
            for key, reason in _SETTINGS_ONLY_OTHERS_HAVE.items():
                if value.get(key):
                    return reason
    if "test_name" in values and "target_modules" not in values.get("config_kwargs", {"target_modules": None}):
        return "a method that finds its modules without `target_modules`"
    for kwargs in (values.get("config_kwargs"), values.get("config_kwargs_1"), values.get("config_kwargs_2")):
        if kwargs and kwargs.get("target_modules"):
            model_id = values.get("model_id") or ("EmbConv1D" if kwargs.get("trainable_token_indices") else "MLP")
            for layer in sorted(layers_of(str(model_id), kwargs["target_modules"])):
                if layer not in method.layers:
                    return UNSUPPORTED_LAYERS.get(layer, f"`{layer}` is not a layer that the method can target")
    return None


def targeted_layers(model: Any, target_modules: Any) -> set[str]:
    """Class names of the modules of a model that `target_modules` selects."""
    config = LoraConfig(target_modules=target_modules)
    targeted = (module for name, module in model.named_modules() if check_target_module_exists(config, name))
    return {type(module).__name__ for module in targeted}
