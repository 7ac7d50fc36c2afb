"""Losses and metrics of the public data sets' tasks."""

from __future__ import annotations

from typing import Any

import torch
from _benches.dense_metrics import METRICS, dense_losses
from torch import Tensor, nn


def losses(outputs: dict[str, Tensor], labels: Any, num_items_in_batch: Any = None) -> dict[str, Tensor]:
    """Dense losses, binary cross-entropy for one logit, cross-entropy for several."""
    if "segmentation" in outputs:
        return dense_losses(outputs, labels)
    result = {}
    for task, logits in outputs.items():
        target = labels[f"labels_{task}"]
        if logits.shape[1] == 1:
            result[task] = nn.functional.binary_cross_entropy_with_logits(logits[:, 0], target)
        else:
            result[task] = nn.functional.cross_entropy(logits, target)
    return result


@torch.no_grad()
def evaluate(model: nn.Module, data: Any, batch_size: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Dense metrics; F1 for binary tasks; top-1 and top-5 accuracy for the others. In percent where that applies."""
    model.eval()
    outputs: dict[str, list[Tensor]] = {}
    targets: dict[str, list[Tensor]] = {}
    for batch in torch.utils.data.DataLoader(data, batch_size):
        for task, value in model(pixel_values=batch["pixel_values"].to(device)).items():
            outputs.setdefault(task, []).append(value.cpu())
            targets.setdefault(task, []).append(batch[f"labels_{task}"])
    metrics = {}
    for task in outputs:
        prediction, target = torch.cat(outputs[task]), torch.cat(targets[task])
        if task in METRICS:
            metrics[task] = METRICS[task](prediction, target)
        elif prediction.shape[1] == 1:
            positive, true = prediction[:, 0] > 0, target > 0
            f1 = 2 * (positive & true).sum() / (positive.sum() + true.sum()).clamp(min=1)
            metrics[task] = {"f1": 100.0 * float(f1)}
        else:
            ranked = prediction.argsort(1, descending=True)[:, :5] == target[:, None]
            metrics[task] = {f"top{k}": 100.0 * float(ranked[:, :k].any(1).double().mean()) for k in (1, 5)}
    return metrics
