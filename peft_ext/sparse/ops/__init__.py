"""Products with a sparse update: `y += S x` and its gradients, by three paths and a dense oracle."""

from .bypass import bypass
from .dense import dense
from .dispatch import BACKENDS, Backend, choose_backend
from .folded import folded


__all__ = ["BACKENDS", "Backend", "bypass", "choose_backend", "dense", "folded"]
