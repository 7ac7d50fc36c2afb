"""Options of GPS."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...hf.registration import peft_type
from ...sparse.config import SparseConfig


GPS = peft_type("gps")


@dataclass
class GPSConfig(SparseConfig):
    """
    Configuration of [`GPSModel`], gradient-based parameter selection: of each neuron's inputs the k with the largest
    gradient on the task's data are trained (Zhang et al., CVPR 2024; thesis section 4.3).

    The entries are chosen by [`gradient_scores`], before training and without the classification head; [`gps`] does
    both steps in one call. As in the published code, the biases of the adapted layers are trained too
    (`train_bias=True`), norms stay frozen, and the head is trained whole: of transformers' classifiers it is found, of
    others name it in `modules_to_save`; `modules_to_save=[]` leaves it frozen. See
    [`~peft_ext.sparse.config.SparseConfig`] for the other arguments.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_ext import GPSConfig, gradient_scores

        >>> scores = gradient_scores(model, dataloader)
        >>> model = get_peft_model(model, GPSConfig(k=1).with_scores(scores))
        ```
    """

    selection: str = field(default="gradient", metadata={"help": "How the trained entries are chosen."})
    train_bias: bool = field(default=True, metadata={"help": "Train the adapted layers' biases with the adapter."})

    def __post_init__(self) -> None:
        self.peft_type = GPS
        super().__post_init__()
