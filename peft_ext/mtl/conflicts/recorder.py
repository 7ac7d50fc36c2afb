"""Record of gradient conflicts: per step, over training, per pair and per layer."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from ..aggregators.base import Array


_PLAIN_STATE = ("steps", "epochs", "noise", "layers", "window", "logged")  # of a recorder, beside its cosines


def cosines_of(gramian: Array) -> Array:
    """
    Cosines of the angles between gradients, `[tasks, tasks]`, from their Gramian; NaN where one of the two has norm
    zero.
    """
    norms = np.sqrt(np.maximum(np.diagonal(gramian), 0.0))
    norms = np.where(norms > 0, norms, np.nan)
    return np.clip(gramian / np.outer(norms, norms), -1.0, 1.0)


def pair_cosines(gramian: Array) -> Array:
    """The cosines above the diagonal, `[tasks * (tasks - 1) / 2]`, in the order of `itertools.combinations`."""
    cosines = cosines_of(gramian)
    return cosines[np.triu_indices(len(cosines), k=1)]


def conflict_incidence(cosines: Any) -> float:
    """
    Average incidence of gradient conflicts in percent: the share of pairs with a negative cosine in each step,
    averaged over the steps.

    Paper: Zhang et al., [Proactive Gradient Conflict Mitigation in Multi-Task
    Learning](https://arxiv.org/abs/2411.18615).

    Args:
        cosines (array, `[pairs]` or `[steps, pairs]`):
            Cosines between gradients; NaN for pairs that a step does not have.

    Returns:
        Percent, or NaN if there is no pair at all.
    """
    cosines = np.atleast_2d(np.asarray(cosines, dtype=np.float64))
    pairs = (~np.isnan(cosines)).sum(axis=1)
    conflicts = (cosines < 0).sum(axis=1)
    steps = pairs > 0
    return float(100.0 * (conflicts[steps] / pairs[steps]).mean()) if steps.any() else float("nan")


class ConflictRecorder:
    """
    Record of gradient conflicts: it keeps the cosines of every recorded step, computes the figures for the log, and
    writes one JSON line per step.

    Args:
        tasks (`list[str]`):
            Names of the tasks.
        path (`str`, *optional*):
            File of JSON lines.

    Attributes:
        pairs (`list[str]`):
            Names of the pairs of tasks, `"a__b"`, in the order of `cosines`.
        steps (`list[int]`):
            Global steps that were recorded.
        cosines (`list[np.ndarray]`):
            Cosines `[pairs]` per recorded step.
    """

    def __init__(self, tasks: Sequence[str], path: str | None = None) -> None:
        self.tasks = list(tasks)
        self.pairs = [f"{a}__{b}" for a, b in combinations(self.tasks, 2)]
        self.path = path
        self.continues = False  # whether the file has this run's earlier steps
        self.steps: list[int] = []
        self.epochs: list[float] = []
        self.cosines: list[Array] = []
        self.noise: list[bool] = []  # one entry per comparison of two halves
        self.layers: dict[str, list[int]] = {}  # conflicts and pairs so far
        self.window: list[dict[str, float]] = []
        self.logged = 0  # recorded steps that earlier logs have covered

    def record(
        self,
        step: int,
        epoch: float,
        gramian: Array,
        losses: Array | None = None,
        weights: Array | None = None,
        layers: Mapping[str, Array] | None = None,
        floor: Array | None = None,
    ) -> None:
        """
        Record one optimiser step.

        Args:
            step (`int`):
                Global step.
            epoch (`float`):
                Epoch.
            gramian (`np.ndarray`):
                Inner products of the gradients, `[tasks, tasks]`.
            losses (`np.ndarray`, *optional*):
                Loss per task, `[tasks]`.
            weights (`np.ndarray`, *optional*):
                Weight per task, `[tasks]`.
            layers (`dict`, *optional*):
                Gramian per layer.
            floor (`np.ndarray`, *optional*):
                Cosine between the two halves of each task's batch, `[tasks]`.
        """
        cosines = pair_cosines(gramian)
        norms = np.sqrt(np.maximum(np.diagonal(gramian), 0.0))
        self.steps.append(step)
        self.epochs.append(float(epoch))
        self.cosines.append(cosines)
        line: dict[str, Any] = {"step": step, "epoch": float(epoch), "cos": _plain(cosines), "norms": _plain(norms)}
        values = {f"grad_norm/{task}": norms[i] for i, task in enumerate(self.tasks)}
        if losses is not None:
            line["losses"] = _plain(losses)
        if weights is not None:
            line["weights"] = _plain(weights)
            values |= {f"task_weight/{task}": weights[i] for i, task in enumerate(self.tasks)}
        if layers:
            line["layers"] = {}
            for name, part in layers.items():
                self._count_layer(name, pair_cosines(part))
                line["layers"][name] = _plain(pair_cosines(part))
        if floor is not None:
            self.noise += [bool(c < 0) for c in floor if not np.isnan(c)]
            line["noise_cos"] = _plain(floor)
        self.window.append({key: float(value) for key, value in values.items() if not np.isnan(value)})
        self._write(line)

    def _write(self, line: dict[str, Any]) -> None:
        if self.path:
            os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
            # An earlier run's file is replaced, unless this one continues it.
            with open(self.path, "a" if self.continues else "w", encoding="utf-8") as file:
                file.write(json.dumps({"tasks": self.tasks, **line}) + "\n")
        self.continues = True

    def read_back(self, last: int) -> None:
        """
        Read the steps up to `last` from the file of a run that is resumed, and cut the file after them. Means over the
        last logging interval start again.

        Raises:
            `ValueError`: If the file was written for other tasks.
        """
        kept = self._cut(last)
        for text in kept:
            line = json.loads(text)
            if line["tasks"] != self.tasks:
                raise ValueError(f"{self.path} was written for the tasks {line['tasks']}, not {self.tasks}.")
            self.steps.append(line["step"])
            self.epochs.append(line["epoch"])
            self.cosines.append(np.array(line["cos"], dtype=np.float64))
            self.noise += [cosine < 0 for cosine in line.get("noise_cos", ()) if cosine is not None]
            for name, cosines in line.get("layers", {}).items():
                self._count_layer(name, np.array(cosines, dtype=np.float64))
        self.logged = len(self.cosines)

    def _cut(self, last: int) -> list[str]:
        self.continues = True
        if not self.path or not os.path.isfile(self.path):
            return []
        from ...io import write_atomically

        with open(self.path, encoding="utf-8") as file:
            kept = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= last]
        write_atomically(self.path, "".join(kept))
        return kept

    def _count_layer(self, name: str, cosines: Array) -> None:
        counts = self.layers.setdefault(name, [0, 0])
        counts[0] += int((cosines < 0).sum())
        counts[1] += int((~np.isnan(cosines)).sum())

    def logs(self, total_steps: int | None = None) -> dict[str, float]:
        """
        Figures for the log: means over the steps since the last call, and the incidence so far, as plain floats.

        Args:
            total_steps (`int`, *optional*):
                Number of steps of the whole training. `incidence_last_half` is the incidence over the second half of
                them.
        """
        logs: dict[str, float] = {}
        recent = self.cosines[self.logged :]
        if recent and self.pairs:
            block = np.stack(recent)  # [steps, pairs]
            logs["gradient_conflict/incidence"] = conflict_incidence(block)
            logs["gradient_conflict/mean_cos"] = mean_of_known(block)
            logs["gradient_conflict/mean_abs_cos"] = mean_of_known(np.abs(block))
            for i, pair in enumerate(self.pairs):
                logs[f"gradient_conflict/cos/{pair}"] = mean_of_known(block[:, i])
                logs[f"gradient_conflict/conflict/{pair}"] = conflict_incidence(block[:, i : i + 1])
            logs["gradient_conflict/incidence_all"] = self.incidence()
            logs["gradient_conflict/incidence_last_half"] = self.incidence(last_half_of=total_steps or self.steps[-1])
        for name, (conflicts, pairs) in self.layers.items():
            if pairs and recent:
                logs[f"gradient_conflict/layer/{name}"] = 100.0 * conflicts / pairs
        if self.noise and recent:
            logs["gradient_conflict/noise_floor"] = self.noise_floor()
        for key in sorted({key for entry in self.window for key in entry}):
            prefix = "gradient_conflict/" if key.startswith("grad_norm/") else ""
            logs[prefix + key] = float(np.mean([entry[key] for entry in self.window if key in entry]))
        self.window = []
        self.logged = len(self.cosines)
        return {key: value for key, value in logs.items() if not np.isnan(value)}

    def incidence(self, last_half_of: int | None = None) -> float:
        """
        Incidence in percent over all recorded steps.

        Args:
            last_half_of (`int`, *optional*):
                Number of steps; only those after half of them count.
        """
        chosen = [c for s, c in zip(self.steps, self.cosines, strict=True) if not last_half_of or 2 * s > last_half_of]
        return conflict_incidence(np.stack(chosen)) if chosen and self.pairs else float("nan")

    def noise_floor(self) -> float:
        """Percent of comparisons between halves of one task's batch that conflict; NaN without any."""
        return 100.0 * float(np.mean(self.noise)) if self.noise else float("nan")

    def summary(self, total_steps: int | None = None) -> dict[str, float]:
        """Incidence over all steps, the last half, per pair and per layer, and the noise floor; for a results file."""
        if not self.cosines:
            return {}
        block = np.stack(self.cosines)
        values = {
            "gradient_conflict_incidence_all": self.incidence(),
            "gradient_conflict_incidence_last_half": self.incidence(last_half_of=total_steps or self.steps[-1]),
            "gradient_conflict_mean_cos": mean_of_known(block),
            "gradient_conflict_mean_abs_cos": mean_of_known(np.abs(block)),
            "gradient_conflict_noise_floor": self.noise_floor(),
        }
        for i, pair in enumerate(self.pairs):
            values[f"gradient_conflict_incidence_{pair}"] = conflict_incidence(block[:, i : i + 1])
        for name, (conflicts, pairs) in self.layers.items():
            values[f"gradient_conflict_incidence_layer_{name}"] = 100.0 * conflicts / pairs if pairs else float("nan")
        return {key: value for key, value in values.items() if not np.isnan(value)}

    def state_dict(self) -> dict[str, Any]:
        """Everything recorded, as plain values."""
        plain = copy.deepcopy({name: getattr(self, name) for name in _PLAIN_STATE})
        return {"tasks": self.tasks, "cosines": [c.tolist() for c in self.cosines], **plain}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`, and cut the file back to the steps it had then."""
        for name in _PLAIN_STATE:
            setattr(self, name, copy.deepcopy(state[name]))
        self.cosines = [np.array(c, dtype=np.float64) for c in state["cosines"]]
        self._cut(self.steps[-1] if self.steps else 0)


def mean_of_known(values: Array) -> float:
    """Mean of the values that are not NaN; NaN without any."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _plain(values: Array) -> list[float | None]:
    """For JSON, which has no NaN."""
    return [float(v) if np.isfinite(v) else None for v in values]
