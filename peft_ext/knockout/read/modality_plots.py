"""Figures of [`~peft_ext.knockout.read.modality.lmar`], several methods in one, with the data behind them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..plots import write_figure
from .modality import ModalityAttention


LABEL = 32  # characters of a name in a legend; of a longer one, such as a path, its end


def plot_modality(
    results: Mapping[str, ModalityAttention],
    path: str | os.PathLike[str],
    trained_parameters: Mapping[str, int] | None = None,
) -> None:
    """
    Draw figures 1 and 2 of the LLaVA Steering paper for several methods: the share of attention on visual tokens per
    layer, LMAR per layer, and the mean share against the number of trained parameters.

    Args:
        results (`dict[str, ModalityAttention]`):
            Results of [`lmar`] by the name of the method, from models with the same number of layers.
        path (`str`):
            File of the PNG. The numbers go into a CSV of the same name beside it.
        trained_parameters (`dict[str, int]`, *optional*):
            Number of trained parameters per method. Without it the third panel is left out.

    Raises:
        `ValueError`: If there is nothing to draw, the number of trained parameters of a method is missing, or the path
            is not that of a PNG.
    """
    if not results:
        raise ValueError("results is empty; pass at least one method's result of lmar().")
    missing = [name for name in results if trained_parameters and name not in trained_parameters]
    if missing:
        raise ValueError(f"trained_parameters lacks {missing[0]!r}; give every method's number, or leave it out.")
    counts: Mapping[str, Any] = trained_parameters or dict.fromkeys(results, "")
    shares = {name: result.image_share.mean(dim=0).tolist() for name, result in results.items()}
    rows = [
        {"method": name, "layer": layer, "lmar": ratio, "image_share": share, "trained_parameters": counts[name]}
        for name, result in results.items()
        for layer, (ratio, share) in enumerate(zip(result.ratio.tolist(), shares[name], strict=True))
    ]

    def draw(figure: Any) -> None:
        panels = 3 if trained_parameters else 2
        figure.set_size_inches(5 * panels, 4)
        axes = figure.subplots(1, panels)
        for name, result in results.items():
            label = name if len(name) <= LABEL else f"…{name[1 - LABEL :]}"
            axes[0].plot(shares[name], marker="o", label=label)
            axes[1].plot(result.ratio.tolist(), marker="o", label=label)
            if trained_parameters:
                axes[2].scatter(
                    [max(trained_parameters[name], 1)], [sum(shares[name]) / len(shares[name])], label=label
                )
        titles = ["Attention on visual tokens (share)", "LMAR (image / text)", "Mean share and trained parameters"]
        for axis, title in zip(axes, titles, strict=False):
            axis.set_title(title)
            axis.set_xlabel("layer")
            axis.legend()
        axes[0].set_ylim(0, 1)
        if trained_parameters:
            axes[2].set_xscale("log")
            axes[2].set_xlabel("trained parameters")

    write_figure(path, draw, rows)
