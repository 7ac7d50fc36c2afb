"""GPS (https://arxiv.org/abs/2312.10136): train each neuron's k inputs with the largest gradient."""

from ...hf.registration import register
from .config import GPSConfig
from .layer import GPSConv, GPSLinear
from .model import GPSModel
from .presets import GPS_PRESETS, GPSPreset
from .select import gps


register("gps", GPSConfig, GPSModel)

__all__ = ["GPS_PRESETS", "GPSConfig", "GPSConv", "GPSLinear", "GPSModel", "GPSPreset", "gps"]
