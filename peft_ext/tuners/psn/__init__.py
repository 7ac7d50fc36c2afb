"""PSN: sparse training of the K largest-magnitude inputs of every neuron (thesis chapter 6)."""

from ...hf.registration import register
from .config import PSNConfig
from .model import PSNConv, PSNLinear, PSNModel


register("psn", PSNConfig, PSNModel)

__all__ = ["PSNConfig", "PSNConv", "PSNLinear", "PSNModel"]
