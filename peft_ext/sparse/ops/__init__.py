"""Products with a sparse update: `y += S x` and its gradients, by three paths and a dense oracle."""

from .bypass import bypass
from .dense import dense
from .dispatch import BACKENDS, Backend, choose_backend, choose_conv_backend
from .folded import copied, folded
from .geometry import ConvGeometry
from .in_place import add_in_place, may_add_in_place


__all__ = [
    "BACKENDS",
    "Backend",
    "ConvGeometry",
    "add_in_place",
    "bypass",
    "choose_backend",
    "choose_conv_backend",
    "copied",
    "dense",
    "folded",
    "may_add_in_place",
]
