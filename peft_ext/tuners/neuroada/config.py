"""Options of NeuroAda."""

from __future__ import annotations

from dataclasses import dataclass

from ...hf.registration import peft_type
from ...sparse.config import SparseConfig


NEUROADA = peft_type("neuroada")


@dataclass
class NeuroAdaConfig(SparseConfig):
    """
    Configuration of [`NeuroAdaModel`]: for each neuron, a zero-initialised bypass on each of its k inputs of largest
    magnitude; the base stays frozen (Zhang et al., NeuroAda; thesis chapter 5, eqs. 5.2–5.4).

    The defaults are the paper's: selection by magnitude, per neuron. See [`~peft_ext.sparse.config.SparseConfig`] for
    the arguments, and `NEUROADA_PRESETS` for the thesis's training hyperparameters.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_ext import NeuroAdaConfig

        >>> model = get_peft_model(model, NeuroAdaConfig(k=1))
        ```
    """

    def __post_init__(self) -> None:
        self.peft_type = NEUROADA
        super().__post_init__()
