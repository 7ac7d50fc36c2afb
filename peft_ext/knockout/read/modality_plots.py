"""Figures of [`~peft_ext.knockout.read.modality.lmar`], several methods in one, with the data behind them."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping

from ...extras import needs
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
        `ValueError`: If there is nothing to draw, or the number of trained parameters of a method is missing.
    """
    if not results:
        raise ValueError("results is empty; pass at least one method's result of lmar().")
    missing = [name for name in results if trained_parameters and name not in trained_parameters]
    if missing:
        raise ValueError(f"trained_parameters lacks {missing[0]!r}; give every method's number, or leave it out.")
    with needs("plot"):
        from matplotlib.figure import Figure

    path = os.fspath(path)
    panels = 3 if trained_parameters else 2
    figure = Figure(figsize=(5 * panels, 4), layout="constrained")
    axes = figure.subplots(1, panels)
    for name, result in results.items():
        layers = range(len(result.ratio))
        share = result.image_share.mean(dim=0).tolist()
        label = name if len(name) <= LABEL else f"…{name[1 - LABEL :]}"
        axes[0].plot(layers, share, marker="o", label=label)
        axes[1].plot(layers, result.ratio.tolist(), marker="o", label=label)
        if trained_parameters:
            axes[2].scatter([max(trained_parameters[name], 1)], [sum(share) / len(share)], label=label)
    titles = ["Attention on visual tokens (share)", "LMAR (image / text)", "Mean share and trained parameters"]
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title)
        axis.set_xlabel("layer")
        axis.legend()
    axes[0].set_ylim(0, 1)
    if trained_parameters:
        axes[2].set_xscale("log")
        axes[2].set_xlabel("trained parameters")
    figure.savefig(path, dpi=120)
    with open(os.path.splitext(path)[0] + ".csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "layer", "lmar", "image_share", "trained_parameters"])
        for name, result in results.items():
            shares = result.image_share.mean(dim=0).tolist()
            for layer, (ratio, share_) in enumerate(zip(result.ratio.tolist(), shares, strict=True)):
                number = trained_parameters[name] if trained_parameters else ""
                writer.writerow([name, layer, ratio, share_, number])
