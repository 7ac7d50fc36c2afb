"""PSN (https://arxiv.org/abs/2411.18615): train each neuron's K inputs of largest magnitude."""

from ...hf.registration import register
from .config import PSNConfig
from .layer import PSNConv, PSNLinear
from .model import PSNModel


register("psn", PSNConfig, PSNModel)

__all__ = ["PSNConfig", "PSNConv", "PSNLinear", "PSNModel"]
