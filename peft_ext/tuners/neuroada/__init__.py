"""NeuroAda (https://arxiv.org/abs/2510.18940): train a bypass on each neuron's k inputs of largest magnitude."""

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
