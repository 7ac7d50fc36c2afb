"""GLUE's metrics for `evaluate`, as a module to load by its path: the Hub's needs a network."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


DESCRIPTION = "The metrics of the GLUE benchmark (Wang et al., 2019), by scikit-learn and scipy."


class Glue(evaluate.Metric):
    """
    Metrics of one GLUE task: `Glue(config_name="mrpc").compute(predictions=…, references=…)`.

    Accuracy everywhere but in two tasks: stsb has the correlations `pearson` and `spearmanr`, cola has
    `matthews_correlation`. mrpc and qqp have `f1` of class 1 beside the accuracy.
    """

    def _info(self) -> evaluate.MetricInfo:
        kind = datasets.Value("float32" if self.config_name == "stsb" else "int64")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            features=datasets.Features({"predictions": kind, "references": kind}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        if self.config_name == "stsb":
            return {
                "pearson": float(pearsonr(references, predictions)[0]),
                "spearmanr": float(spearmanr(references, predictions)[0]),
            }
        if self.config_name == "cola":
            return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}
        found = {"accuracy": float(accuracy_score(references, predictions))}
        if self.config_name in ("mrpc", "qqp"):
            found["f1"] = float(f1_score(references, predictions))
        return found
