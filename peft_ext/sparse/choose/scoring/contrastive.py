"""The loss that GPS chooses entries by: it needs labels and features, but no classification head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_flag
from .batches import IGNORED


class SupervisedContrastiveLoss(nn.Module):
    """
    Loss that pulls features of one class together and pushes those of other classes apart. It is averaged over the
    samples that have a partner of their class.

    Paper: Khosla et al., [Supervised Contrastive Learning](https://arxiv.org/abs/2004.11362). GPS scores weights with
    it.

    Args:
        temperature (`float`, *optional*, defaults to 0.07):
            Divisor of the similarities.
        normalize (`bool`, *optional*, defaults to `True`):
            Whether to scale features to length 1, as the published code of GPS does.

    Raises:
        `ValueError`: If the temperature is not positive.
    """

    def __init__(self, temperature: float = 0.07, normalize: bool = True) -> None:
        super().__init__()
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not temperature > 0:
            raise ValueError(f"temperature={temperature!r} must be positive: a number above 0, such as 0.07.")
        check_flag("normalize", normalize)
        self.temperature = temperature
        self.normalize = normalize

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """
        Compute the loss.

        Args:
            features (`torch.Tensor`):
                Float `[samples, size]`.
            labels (`torch.Tensor`):
                Integer `[samples]`. Two views of an image are two samples with one label. Samples with the label -100
                are left out, as in transformers.

        Returns:
            `torch.Tensor`: A float32 scalar. It is zero, with zero gradient, if no two samples share a label.
        """
        if not isinstance(features, Tensor) or not isinstance(labels, Tensor):
            raise ValueError(f"features={features!r} and labels={labels!r} must be tensors.")
        if features.dim() != 2 or labels.shape != features.shape[:1]:
            raise ValueError(
                f"features have shape {tuple(features.shape)} and labels {tuple(labels.shape)}; needed are "
                "[samples, size] and [samples]. Pass `features=` to say where the features are, or another `loss`, "
                "such as 'model', for labels that are no classes."
            )
        if labels.is_floating_point():
            raise ValueError(
                f"labels are {labels.dtype}; needed are whole numbers, one class per sample. Pass another `loss`, "
                "such as 'model', for labels that are no classes."
            )
        labelled = labels != IGNORED
        features, labels = features.float()[labelled], labels[labelled]
        if self.normalize:
            features = F.normalize(features, dim=1)
        itself = torch.eye(len(labels), dtype=torch.bool, device=features.device)
        partners = (labels[:, None] == labels[None, :]) & ~itself  # [samples, samples]
        count = partners.sum(1)
        if not bool(count.any()):
            return features.sum() * 0.0
        similarity = (features @ features.t() / self.temperature).masked_fill(itself, -torch.inf)
        log_share = (similarity - similarity.logsumexp(1, keepdim=True)).masked_fill(itself, 0.0)
        paired = count > 0
        return -((log_share * partners).sum(1)[paired] / count[paired]).mean()

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, normalize={self.normalize}"
