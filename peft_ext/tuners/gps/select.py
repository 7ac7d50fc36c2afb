"""Both stages of GPS in one call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from ...sparse.choose.scoring import gradient_scores
from ...sparse.selection.plan import parse_selection
from .config import GPSConfig


def gps(
    model: nn.Module,
    config: GPSConfig,
    dataloader: Iterable[Any],
    adapter_name: str = "default",
    **scoring: Any,
) -> PeftModel:
    """
    Score the weights on the task's data, select the entries and adapt the model, in one call.

    Paper: Zhang et al., [Gradient-based Parameter Selection for Efficient
    Fine-Tuning](https://arxiv.org/abs/2312.10136).

    Args:
        model (`torch.nn.Module`):
            The model to adapt. A `PeftModel` gets a further adapter; its other adapters are disabled while it is
            scored.
        config ([`GPSConfig`]):
            Options of the adapter.
        dataloader (`Iterable`):
            Batches of the task, as for [`gradient_scores`].
        adapter_name (`str`, *optional*, defaults to `"default"`):
            Name of the adapter.
        **scoring:
            Other arguments of [`gradient_scores`], such as `loss`, `features`, `absolute` or `training`.

    Returns:
        `PeftModel`: The adapted model, ready to be trained.

    Raises:
        `ValueError`: If `config` is no [`GPSConfig`], or its `selection` does not use gradients.

    Example:

        ```py
        >>> from peft_ext import GPSConfig, gps

        >>> model = gps(model, GPSConfig(k=1), dataloader)
        ```
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
