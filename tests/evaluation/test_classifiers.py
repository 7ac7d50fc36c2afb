"""`peft-ext eval` of classifiers: GLUE's metrics by their formulas, and the predictions of the adapter."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from peft_ext import NeuroAdaConfig, cli
from tests._words import save_tokenizer


evaluate = pytest.importorskip("evaluate", reason="needs the extra eval")
pytest.importorskip("lm_eval", reason="needs the extra eval")
METRICS = Path(cli.__file__).parent / "evaluation" / "glue.py"
WORDS = [f"w{number}" for number in range(20)]


def ranks(values):
    """Ranks, with their mean for equal values."""
    return np.array([(values < value).sum() + (values == value).sum() / 2 for value in values])


def reference(task, said, right):
    if task == "stsb":
        return {
            "pearson": np.corrcoef(said, right)[0, 1],
            "spearmanr": np.corrcoef(ranks(said), ranks(right))[0, 1],
        }
    if task == "cola":
        return {"matthews_correlation": np.corrcoef(said, right)[0, 1]}  # the same for two classes
    found = {"accuracy": np.mean(said == right)}
    if task in ("mrpc", "qqp"):
        hits = np.sum((said == 1) & (right == 1))
        found["f1"] = 2 * hits / (np.sum(said == 1) + np.sum(right == 1))
    return found


@pytest.mark.parametrize("task", ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "mnli_mismatched", "qnli", "rte"])
def test_metrics_by_their_formulas(task, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path))
    generator = np.random.default_rng(0)
    if task == "stsb":
        said, right = generator.normal(size=40).astype("float32"), generator.integers(0, 5, 40).astype("float32")
    else:
        said, right = generator.integers(0, 3 if "mnli" in task else 2, (2, 40))
    metric = evaluate.load(str(METRICS), task, cache_dir=str(tmp_path))
    found = metric.compute(predictions=said, references=right)
    assert found == pytest.approx(reference(task, said, right), abs=1e-6)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Base and adapter, with a head of its own."""
    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    config = BertConfig(
        vocab_size=save_tokenizer(base, WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    model = get_peft_model(model, NeuroAdaConfig(k=2, task_type="SEQ_CLS"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(adapter)
    return base, adapter, model.eval()


@torch.no_grad()
def test_predictions_are_those_of_the_adapter(classifier, tmp_path, capsys):
    base, adapter, model = classifier
    tokenizer = AutoTokenizer.from_pretrained(base)
    generator = np.random.default_rng(1)
    pairs = [
        [" ".join(generator.choice(WORDS, generator.integers(1, 9))) for _ in range(2)] for _ in range(30)
    ]  # of several lengths: padding must not matter
    said = np.array([model(**tokenizer(*pair, return_tensors="pt")).logits[0].argmax().item() for pair in pairs])
    assert 5 < said.sum() < 25
    right = np.where(generator.random(30) < 0.7, said, 1 - said)
    (tmp_path / "mrpc").mkdir()
    with open(tmp_path / "mrpc" / "validation.jsonl", "w") as file:
        for (first, second), label in zip(pairs, right.tolist(), strict=True):
            file.write(json.dumps({"sentence1": first, "sentence2": second, "label": label}) + "\n")
    options = ["--tasks", "mrpc", "--data", str(tmp_path), "--device", "cpu"]
    assert cli.main(["eval", str(adapter), *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[str(adapter)]["mrpc"] == pytest.approx(reference("mrpc", said, right))
    assert cli.main(["eval", str(adapter), *options, "--limit", "5"]) == 0
    first = capsys.readouterr().out.splitlines()[2]
    assert first == f"| mrpc | accuracy | {np.mean(said[:5] == right[:5]):.4f} |"


def test_what_is_wrong_is_said(classifier, tmp_path, capsys):
    _, adapter, _ = classifier
    wrong = {
        ("--tasks", "gsm8k"): "is evaluated on cola, sst2",
        ("--tasks", "mrpc", "--data", str(tmp_path)): "has no mrpc/validation.jsonl",
        ("--tasks", "mrpc", "--before"): "no trained head",
    }
    for options, message in wrong.items():
        assert cli.main(["eval", str(adapter), *options]) == 1
        assert message in capsys.readouterr().err
