"""GPS: gradient-based parameter selection, the k inputs of every neuron with the largest gradient (thesis chapter 4)."""

from ...registration import register
from .config import GPSConfig
from .model import GPSLinear, GPSModel


register("gps", GPSConfig, GPSModel)

__all__ = ["GPSConfig", "GPSLinear", "GPSModel"]
