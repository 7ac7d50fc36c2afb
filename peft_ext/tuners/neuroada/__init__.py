"""NeuroAda: per neuron, a trainable bypass on its k largest-magnitude inputs (thesis chapter 5)."""

from ...hf.registration import register
from .config import NeuroAdaConfig
from .layer import NeuroAdaConv, NeuroAdaLinear, NeuroAdaMultiheadAttention
from .model import NeuroAdaModel
from .presets import NEUROADA_PRESETS, NEUROADA_SEARCH_SPACES, Preset, SearchSpace


register("neuroada", NeuroAdaConfig, NeuroAdaModel)

__all__ = [
    "NEUROADA_PRESETS",
    "NEUROADA_SEARCH_SPACES",
    "NeuroAdaConfig",
    "NeuroAdaConv",
    "NeuroAdaLinear",
    "NeuroAdaModel",
    "NeuroAdaMultiheadAttention",
    "Preset",
    "SearchSpace",
]
