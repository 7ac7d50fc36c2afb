"""What adapters say about themselves: their base model and the kind of task."""

from __future__ import annotations

from collections.abc import Sequence

from peft import PeftConfig


def adapters_of(adapters: Sequence[str], base: str | None = None) -> tuple[str, str | None]:
    """
    The base model (`base`, if it is given) and the task type that adapters have in common. Raises `ValueError` if
    something is no adapter, or the adapters don't fit into one table.
    """
    configs = {}
    for adapter in adapters:
        try:
            configs[adapter] = PeftConfig.from_pretrained(adapter)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{adapter} is no adapter that PEFT knows: {error}") from error
    bases = {base or config.base_model_name_or_path or "" for config in configs.values()}
    types = {str(getattr(config.task_type, "value", config.task_type)) for config in configs.values()}
    if len(bases) > 1 or len(types) > 1:
        raise ValueError(
            f"the adapters have several base models or task types ({', '.join(sorted(bases | types))}); evaluate them "
            "one by one, or pass the base as --base."
        )
    (found,), (task_type,) = bases, types
    if not found:
        raise ValueError(f"{', '.join(adapters)} name no base model; pass it as --base.")
    return found, None if task_type == "None" else task_type
