"""Aggregators of the TorchJD library, with their own random stream and a state that can be saved."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .base import Aggregator, Array, Step


# Name here: (class in torchjd.aggregation, whether scaling all gradients scales the direction likewise).
METHODS = {
    "upgrad": ("UPGrad", True),
    "aligned_mtl": ("AlignedMTL", True),
    "config": ("ConFIG", True),
    "dualproj": ("DualProj", True),
    "gradvac": ("GradVac", True),
    "fairgrad": ("FairGrad", False),
    "excess_mtl": ("ExcessMTL", False),
    "pcd": ("PCD", False),
    "krum": ("Krum", True),
    "trimmed_mean": ("TrimmedMean", True),
    "constant": ("Constant", True),
    "random": ("Random", True),
}
_PLAIN = (bool, int, float, str, type(None), torch.dtype, tuple, list)


class TorchJDAggregator(Aggregator):
    """
    Adapter for an aggregator of [TorchJD](https://torchjd.org).

    TorchJD runs on float64 copies on the CPU: on the Gramian if it offers that, otherwise on the gradients. Random
    draws come from a stream of this object. The direction has TorchJD's own scale; `reduction` has no effect.

    Args:
        aggregator (`torchjd.aggregation.Aggregator`):
            The method.
        homogeneous (`bool`, *optional*, defaults to `False`):
            Whether scaling all gradients scales the method's direction alike. Gradients are then scaled to norms of
            about one, because TorchJD's thresholds are absolute.
        **kwargs:
            See [`Aggregator`].
    """

    def __init__(self, aggregator: nn.Module, homogeneous: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.aggregator = aggregator
        self.homogeneous = homogeneous
        self.weighting = getattr(aggregator, "gramian_weighting", None)
        # An instance attribute here: it depends on the wrapped method.
        self.needs_rows = self.weighting is None  # type: ignore[misc]

    def _scale(self, gramian: Array, step: Step) -> float:
        trace = float(np.trace(gramian))
        return (trace / len(gramian)) ** 0.5 if self.homogeneous and trace > 0 else 1.0

    def solve(self, gramian: Array, step: Step) -> Array:
        assert self.weighting is not None
        with self._calling(len(gramian)):
            weights = self.weighting(torch.from_numpy(gramian / self._scale(gramian, step) ** 2))
        return weights.detach().numpy().astype(np.float64)

    def combine(self, rows: Tensor, step: Step) -> Tensor:
        active = step.active
        scale = self._scale(step.gramian[np.ix_(active, active)], step)
        with self._calling(len(rows)):
            direction = self.aggregator(rows.double().cpu() / scale)
        return (direction * scale).to(rows)

    @contextmanager
    def _calling(self, count: int) -> Iterator[None]:
        """With this object's random stream, and errors that say how many tasks were given."""
        try:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self.generator.get_state())
                yield
                self.generator.set_state(torch.get_rng_state())
        except ValueError as error:
            raise ValueError(
                f"{type(self.aggregator).__name__} cannot combine the gradients of {count} tasks, as many as have one "
                f"in this step: {error} Use a method without a least number of tasks, or batches that have all."
            ) from error

    def state_dict(self) -> dict[str, Any]:
        # Attribute by attribute: TorchJD's own state_dict leaves out plain ones and refuses to load what it saved.
        modules = {
            name: {
                key: value.clone() if isinstance(value, Tensor) else value
                for key, value in {**module.__dict__, **module._buffers, **module._parameters}.items()
                if isinstance(value, (Tensor, *_PLAIN)) and key != "training"
            }
            for name, module in self.aggregator.named_modules()
        }
        return {**super().state_dict(), "modules": modules}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        modules = dict(self.aggregator.named_modules())
        for name, values in state["modules"].items():
            for key, value in values.items():
                setattr(modules[name], key, value.clone() if isinstance(value, Tensor) else value)


class Constant(Aggregator):
    """
    Fixed weights per task.

    Args:
        weights (`list[float]`): one per task.
        **kwargs: see [`Aggregator`].
    """

    def __init__(self, weights: Sequence[float], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fixed = np.asarray(weights, dtype=np.float64)

    def solve(self, gramian: Array, step: Step) -> Array:
        return self.fixed[step.active]


def make_torchjd(method: str, **kwargs: Any) -> Aggregator:
    """
    Build a [`TorchJDAggregator`] by name.

    Raises:
        `ImportError`: if TorchJD, or what the method needs, is not installed.
        `ValueError`: if an option is missing or unknown.
    """
    class_name, homogeneous = METHODS[method]
    own = {key: kwargs.pop(key) for key in ("reduction", "seed") if key in kwargs}
    try:
        if method == "constant":  # TorchJD's asks for every task in every step
            return Constant(**kwargs, **own)
        aggregation = importlib.import_module("torchjd.aggregation")
        aggregator = getattr(aggregation, class_name)(**kwargs)
    except ImportError as error:
        raise ImportError(f"method={method!r} comes from TorchJD: run `pip install 'peft-ext[mtl]'`.") from error
    except TypeError as error:
        raise ValueError(f"method={method!r} does not take the options {kwargs!r}: {error}") from error
    return TorchJDAggregator(aggregator, homogeneous, **own)
