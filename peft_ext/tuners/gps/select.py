"""Both stages of GPS in one call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from ...sparse.choose.scoring import gradient_scores
from ...sparse.selection import parse_selection
from .config import GPSConfig


def gps(
    model: nn.Module,
    config: GPSConfig,
    dataloader: Iterable[Any],
    adapter_name: str = "default",
    **scoring: Any,
) -> PeftModel:
    """
    Score the weights on the task's data, choose the entries and adapt the model (thesis section 4.3).

    Args:
        model (`torch.nn.Module`): the model; a `PeftModel` gets another adapter, for which its base is scored.
        config ([`GPSConfig`]): options of the adapter.
        dataloader (`Iterable`): the task's batches, see [`gradient_scores`].
        adapter_name (`str`, *optional*, defaults to `"default"`): name of the adapter.
        scoring: the other arguments of [`gradient_scores`]: `loss`, `features`, `absolute`, `training`, ….

    Returns:
        `PeftModel`: to be trained.

    Raises:
        `ValueError`: if the config is no [`GPSConfig`], or selects by something else than gradients.
    """
    if not isinstance(config, GPSConfig):
        raise ValueError(f"config={config!r} must be a GPSConfig.")
    if parse_selection(config.selection)[0] != "gradient":
        raise ValueError(
            f"selection={config.selection!r} does not rank by gradients, so there is nothing for gps() to compute. "
            "Call get_peft_model(model, config), for 'activation' with the scores of activation_scores."
        )
    if not isinstance(model, PeftModel):
        scores = gradient_scores(model, dataloader, config=config, **scoring)
        return get_peft_model(model, config.with_scores(scores), adapter_name)
    with model.disable_adapter():
        scores = gradient_scores(model, dataloader, config=config, **scoring)
    model.add_adapter(adapter_name, config.with_scores(scores))
    return model
