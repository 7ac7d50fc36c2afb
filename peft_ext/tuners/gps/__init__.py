"""GPS, gradient-based parameter selection: of every neuron the k inputs of largest gradient (thesis chapter 4)."""

from ...hf.registration import register
from .config import GPSConfig
from .layer import GPSConv, GPSLinear
from .model import GPSModel
from .presets import GPS_PRESETS, GPSPreset
from .select import gps


register("gps", GPSConfig, GPSModel)

__all__ = ["GPS_PRESETS", "GPSConfig", "GPSConv", "GPSLinear", "GPSModel", "GPSPreset", "gps"]
