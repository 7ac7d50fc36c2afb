"""Training hyperparameters of the thesis for NeuroAda, and the spaces it searched (appendix C.4, tables 14–16)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """
    One training recipe: AdamW, linear schedule, at most 512 tokens.

    Attributes:
        k (`int`):
            Trained entries per neuron.
        learning_rate (`float`):
            As in `transformers.TrainingArguments`.
        batch_size (`int`):
            Effective batch size.
        warmup_ratio (`float`):
            As in `transformers.TrainingArguments`.
        epochs (`int`):
            Number of epochs.
        weight_decay (`float`):
            As in `transformers.TrainingArguments`.
        source (`str`):
            Where the values are printed.
    """

    k: int
    learning_rate: float
    batch_size: int
    warmup_ratio: float
    epochs: int = 3
    weight_decay: float = 0.0
    source: str = ""


@dataclass(frozen=True)
class SearchSpace:
    """
    A grid searched in Zhi Zhang's thesis on LLaMA-7B, with AdamW, a linear schedule, 3 epochs and no weight decay.
    """

    learning_rates: tuple[float, ...]
    batch_sizes: tuple[int, ...]
    warmup_ratios: tuple[float, ...]
    ks: tuple[int, ...]


# The text of tables 14 and 15 shows the best values for k=1 only; those for k=20 are from the published scripts.
NEUROADA_PRESETS: dict[str, Preset] = {
    "math_k1": Preset(1, 9e-3, 16, 0.06, source="thesis table 14 (GSM8K; used for MATH10K)"),
    "math_k20": Preset(20, 3e-3, 8, 0.0, weight_decay=0.1, source="published script for math_10k, k=20"),
    "commonsense_k1": Preset(1, 8e-3, 8, 0.10, source="thesis table 15 (COMMONSENSE15K; used for COMMONSENSE170K)"),
    "commonsense_k20": Preset(20, 7e-4, 16, 0.06, source="published script for commonsense_170k, k=20"),
}

NEUROADA_SEARCH_SPACES: dict[str, SearchSpace] = {
    "table_14": SearchSpace((6e-4, 9e-4, 1e-3, 3e-3, 6e-3, 9e-3, 1e-2, 3e-2), (8, 16, 32), (0.0, 0.06, 0.10), (1, 20)),
    "table_15": SearchSpace((7e-4, 9e-4, 2e-3, 4e-3, 6e-3, 8e-3, 1e-2, 2e-2), (8, 16, 32), (0.0, 0.06, 0.10), (1, 20)),
    "table_16": SearchSpace(
        (6e-5, 9e-5, 5e-4, 7e-4, 9e-4, 3e-3, 6e-3, 9e-3, 1e-2), (16,), (0.06,), (1, 5, 10, 20, 50, 100, 300, 500)
    ),
}
