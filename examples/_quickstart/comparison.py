"""The offline comparison: pretrain on digits 0-4, adapt to 5-9 with every method, measure, check."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn
from tqdm.auto import tqdm
from transformers import ViTForImageClassification

from . import pretraining
from .checks import Check, roundtrip
from .data import Digits
from .memory import peak_bytes
from .methods import Method, trained_parameters
from .report import Row
from .search import Search, Trial, search
from .storage import save
from .timing import interleaved, relative, training_step
from .training import Recipe, evaluate, predict, train


REFERENCE = "lora"  # times and memory are relative to this method
SEARCH_SEED = 1000  # none of the seeds that the test accuracy is reported for


@dataclass(frozen=True)
class Settings:
    """The size of the comparison."""

    hidden: int
    layers: int
    pretraining: Recipe
    adaptation: Recipe
    trials: int
    seeds: int
    timing_rounds: int
    timing_warmup: int


QUICK = Settings(
    hidden=128,
    layers=2,
    pretraining=Recipe(epochs=16, batch_size=32),
    adaptation=Recipe(epochs=5, batch_size=32),
    trials=4,
    seeds=3,
    timing_rounds=30,
    timing_warmup=3,
)
SMOKE = Settings(
    hidden=16,
    layers=1,
    pretraining=Recipe(epochs=1, batch_size=64),
    adaptation=Recipe(epochs=1, batch_size=64),
    trials=1,
    seeds=1,
    timing_rounds=2,
    timing_warmup=1,
)


class Comparison:
    """
    One pretrained model and what is done with it.

    Args:
        settings (`Settings`): Sizes.
        digits (`Digits`): Data.
        methods (`list[Method]`): Rows of the table.
        out (`Path`): Folder for the base model and the adapters.
    """

    def __init__(self, settings: Settings, digits: Digits, methods: list[Method], out: Path):
        self.settings = settings
        self.digits = digits
        self.methods = methods
        self.out = out
        runs = len(methods) * (settings.trials + settings.seeds)
        steps = settings.pretraining.steps(digits.pretrain) + runs * settings.adaptation.steps(digits.train)
        self.progress = tqdm(total=steps, unit="step", smoothing=0.05)

    def build_base(self) -> nn.Module:
        """The model before pretraining; a subclass may take another one."""
        return pretraining.build(self.settings.hidden, self.settings.layers, seed=0)

    def pretrain(self) -> float:
        """Train the base model, save it, and return its accuracy on held-out digits 0-4."""
        self.progress.set_description("pretraining on 0-4")
        self.base = self.build_base()
        accuracy = pretraining.pretrain(
            self.base, self.digits, self.settings.pretraining, seed=0, on_step=self.progress.update
        )
        self.base.save_pretrained(self.out / "base")
        return accuracy

    def _adapted(self, method: Method, seed: int) -> nn.Module:
        return method.adapt(pretraining.fresh_task(self.base, seed), seed)

    def _run(self, method: Method, learning_rate: float, seed: int) -> nn.Module:
        model = self._adapted(method, seed)
        train(model, self.digits.train, self.settings.adaptation, learning_rate, seed, self.progress.update)
        return model

    def _trial(self, method: Method, learning_rate: float) -> Trial:
        model = self._run(method, learning_rate, SEARCH_SEED)
        accuracy, loss = evaluate(model, self.digits.validation)
        return Trial(learning_rate, loss, accuracy)

    def adapt(self, method: Method) -> tuple[Search, list[float], nn.Module]:
        """Search the learning rate on validation, then touch the test split once per seed; also the first model."""
        self.progress.set_description(f"{method.label}, search")
        found = search(method.learning_rate, self.settings.trials, lambda rate: self._trial(method, rate))
        self.progress.set_description(f"{method.label}, test")
        models = [self._run(method, found.best.learning_rate, seed) for seed in range(self.settings.seeds)]
        return found, [evaluate(model, self.digits.test)[0] for model in models], models[0]

    def step_seconds(self) -> dict[str, list[float]]:
        """Training steps of all methods on the same batch, side by side in this process."""
        batch = self.digits.train.batch(self.settings.adaptation.batch_size)
        steps = {
            method.name: training_step(self._adapted(method, seed=0), batch, method.learning_rate)
            for method in self.methods
        }
        return interleaved(steps, self.settings.timing_rounds, self.settings.timing_warmup)

    def peak(self, method: Method) -> int:
        batch = self.digits.train.batch(self.settings.adaptation.batch_size)
        base = pretraining.fresh_task(self.base, seed=0)
        return peak_bytes(lambda: training_step(method.adapt(base, 0), batch, method.learning_rate))

    def run(self) -> tuple[list[Row], list[Check]]:
        """All rows, and the checks of the trained NeuroAda model."""
        self.progress.set_description("timing steps")
        seconds = self.step_seconds()
        ratios = relative(seconds, REFERENCE)
        peaks = {method.name: self.peak(method) for method in self.methods}
        rows: list[Row] = []
        checks: list[Check] = []
        for method in self.methods:
            found, scores, model = self.adapt(method)
            adapter, head = trained_parameters(model)
            rows.append(
                Row(
                    name=method.name,
                    label=method.label,
                    learning_rate=found.best.learning_rate,
                    search=found,
                    adapter_parameters=adapter,
                    head_parameters=head,
                    seeds=list(range(self.settings.seeds)),
                    scores=scores,
                    step_seconds=seconds[method.name],
                    step_ratio=ratios[method.name],
                    peak_bytes=peaks[method.name],
                    peak_ratio=peaks[method.name] / peaks[REFERENCE],
                    file_bytes=save(model, self.out / "adapters" / method.name),
                )
            )
            if method.name == "neuroada":
                checks = self.check(model)
        self.progress.set_description("done")
        self.progress.close()
        return rows, checks

    def check(self, model: nn.Module) -> list[Check]:
        """Save, reload and merge `model` and compare its predictions on the test images."""
        return roundtrip(
            model,
            self.out / "adapters" / "neuroada",
            lambda: ViTForImageClassification.from_pretrained(self.out / "base"),
            lambda candidate: predict(candidate, self.digits.test),
        )
