"""Options of PSN."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ...hf.registration import peft_type
from ...sparse.checks import check_share
from ...sparse.config import SparseConfig


PSN = peft_type("psn")
PRETRAINED_DENSITY = 0.3


@dataclass
class PSNConfig(SparseConfig):
    r"""
    Configuration of [`PSNModel`], parameter selection per neuron: of each neuron's inputs the K of largest magnitude
    are trained, with a fixed choice made before training (thesis section 6.3.4). Meant for encoders that several tasks
    share; their decoders or heads are trained whole through `modules_to_save`.

    The size is given by `k` or by `density`, without either as `density=0.3`. The thesis's optima are about 0.3 for a
    pretrained encoder and 0.6 for training from scratch (section 6.4); most of its models of one kind share K=300. It
    trains sparse encoders with 4 times the learning rate of dense ones, 2e-4 instead of 5e-5 (appendix D.4). See
    [`~peft_ext.sparse.config.SparseConfig`] for the other arguments.

    Args:
        k (`int`, *optional*):
            Trained entries per neuron, capped at the fan-in.
        density (`float`, *optional*):
            Share of each neuron's inputs that is trained, in (0, 1]: `round(density * fan_in)` entries, at least one.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_ext import PSNConfig

        >>> config = PSNConfig(density=0.3, target_modules=r"vision_encoder\..*", modules_to_save=["mask_decoder"])
        >>> model = get_peft_model(model, config)
        ```
    """

    k: int | None = field(default=None, metadata={"help": "Trained entries per neuron, capped at the fan-in."})
    density: float | None = field(default=None, metadata={"help": "Share of each neuron's inputs that is trained."})

    def __post_init__(self) -> None:
        self.peft_type = PSN
        if self.k is None and self.density is None:
            self.density = PRETRAINED_DENSITY
        super().__post_init__()

    def _check_size(self) -> None:
        if self.density is None:
            super()._check_size()
        elif self.k is not None:
            raise ValueError(f"k={self.k!r} and density={self.density!r} both give the size; pass one of them.")
        else:
            check_share("density", self.density, "each neuron's inputs")

    def entries_per_neuron(self, fan_in: int) -> int:
        if self.density is None:
            return super().entries_per_neuron(fan_in)
        return self._within_budget(max(1, round(self.density * fan_in)))

    def as_table(self, k: int) -> PSNConfig:
        return replace(self, k=k, density=None, selection="magnitude", neuron_ratio=1.0, column_budget=None)
