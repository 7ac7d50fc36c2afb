"""Scores of weights on a task's data, which selections can rank by; the model is left as it was."""

from .activations import ActivationScores, activation_scores
from .contrastive import SupervisedContrastiveLoss
from .experts import busiest_experts
from .gradients import gradient_scores
from .views import TwoViewCollator


__all__ = [
    "ActivationScores",
    "SupervisedContrastiveLoss",
    "TwoViewCollator",
    "activation_scores",
    "busiest_experts",
    "gradient_scores",
]
