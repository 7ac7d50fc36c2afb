"""PSN: sparse training of the K largest-magnitude inputs of every neuron (thesis chapter 6)."""

from ...hf.registration import register
from .config import PSNConfig
from .layer import PSNConv, PSNLinear
from .model import PSNModel


register("psn", PSNConfig, PSNModel)

__all__ = ["PSNConfig", "PSNConv", "PSNLinear", "PSNModel"]
