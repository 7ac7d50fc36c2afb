"""Losses and metrics of dense prediction as NYUv2's benchmark has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


IGNORED = -100
HIGHER_IS_BETTER = {
    "miou": True,
    "pixel_accuracy": True,
    "absolute_error": False,
    "relative_error": False,
    "mean_angle": False,
    "median_angle": False,
    "within_11.25": True,
    "within_22.5": True,
    "within_30": True,
}


def dense_losses(outputs: dict[str, Tensor], labels: Any) -> dict[str, Tensor]:
    """
    Cross-entropy for `segmentation`, L1 for `depth`, one minus the cosine for `normal`; means over labelled pixels.
    Depth 0 and normal 0 mean "not measured", as in the data sets' files.
    """
    losses = {}
    for task, prediction in outputs.items():
        target = labels[f"labels_{task}"]
        if task == "segmentation":
            losses[task] = functional.cross_entropy(prediction, target, ignore_index=IGNORED)
            continue
        known = known_pixels(target)  # [batch, height, width]
        if task == "depth":
            error = (prediction - target).abs()[:, 0]
        else:
            error = 1 - (functional.normalize(prediction, dim=1) * target).sum(1)
        losses[task] = (error * known).sum() / known.sum().clamp(min=1)
    return losses


def known_pixels(target: Tensor) -> Tensor:
    """Pixels with a depth or normal, `[batch, height, width]`."""
    return target.abs().sum(1) > 0


def segmentation_metrics(logits: Tensor, target: Tensor) -> dict[str, float]:
    """Mean intersection over union (classes that occur) and pixel accuracy, in percent."""
    classes = logits.shape[1]
    known = target != IGNORED
    prediction = logits.argmax(1)[known]
    table = torch.bincount(target[known] * classes + prediction, minlength=classes**2).view(classes, classes).double()
    hits = table.diagonal()
    union = table.sum(0) + table.sum(1) - hits
    occurs = table.sum(1) > 0
    return {
        "miou": 100.0 * float((hits[occurs] / union[occurs]).mean()),
        "pixel_accuracy": 100.0 * float(hits.sum() / table.sum()),
    }


def depth_metrics(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """Mean absolute error (in the target's unit) and mean relative error."""
    known = known_pixels(target)
    error = (prediction - target)[:, 0][known].abs().double()
    return {
        "absolute_error": float(error.mean()),
        "relative_error": float((error / target[:, 0][known].double()).mean()),
    }


def normal_metrics(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """Mean and median angle in degrees, and percent of pixels within 11.25, 22.5 and 30 degrees."""
    known = known_pixels(target)
    cosine = (functional.normalize(prediction, dim=1) * target).sum(1)[known].clamp(-1, 1)
    angle = torch.rad2deg(torch.acos(cosine)).double()
    return {
        "mean_angle": float(angle.mean()),
        "median_angle": float(angle.median()),
        **{f"within_{limit:g}": 100.0 * float((angle < limit).double().mean()) for limit in (11.25, 22.5, 30.0)},
    }


METRICS = {"segmentation": segmentation_metrics, "depth": depth_metrics, "normal": normal_metrics}
