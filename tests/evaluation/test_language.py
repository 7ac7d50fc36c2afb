"""`peft-ext eval` with lm_eval: the scores are those of the adapter, by plain transformers too."""

import json
import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_ext import NeuroAdaConfig, cli
from tests._words import save_language_model


pytest.importorskip("lm_eval", reason="needs the extra eval")
ANSWERS = [f"answer{number}" for number in range(1, 5)]
WORDS = [*ANSWERS, "###", "Instruction:", "Response:", *(f"w{number}" for number in range(8))]
ROWS = [f"w{first} w{second}" for first in range(6) for second in (6, 7)]
MULTIPLE_CHOICE = """task: which_word
dataset_path: json
dataset_kwargs:
  data_files: {test: FILE}
test_split: test
output_type: multiple_choice
doc_to_text: "{{instruction}}"
doc_to_choice: [w1, w2, w3]
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("base"), WORDS, initializer_range=0.3)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), NeuroAdaConfig(k=4, task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def models(base, adapter):
    yield AutoModelForCausalLM.from_pretrained(base)
    yield PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


@torch.no_grad()
def chosen(model, base, text):
    """The first choice in a greedy response."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    start = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{text}\n\n### Response:\n"
    )
    ids = tokenizer(start, return_tensors="pt").input_ids
    written = model.generate(input_ids=ids, max_new_tokens=32, do_sample=False, pad_token_id=0)
    words = re.findall("answer[1-4]", tokenizer.decode(written[0, ids.shape[1] :]))
    return words[0] if words else None


def evaluate(capsys, *options):
    assert cli.main(["eval", *map(str, options), "--device", "cpu", "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_scores_are_those_of_the_model(base, adapter, tmp_path, capsys):
    plain, adapted = ([chosen(model, base, text) for text in ROWS] for model in models(base, adapter))
    assert plain != adapted  # else the test could not tell whether the adapter was there
    gold = [answer or "answer1" for answer in adapted[:8]] + ["answer2"] * 4
    expected = [
        sum(said == right for said, right in zip(answers, gold, strict=True)) / len(gold)
        for answers in (plain, adapted)
    ]
    assert expected[0] != expected[1]
    (tmp_path / "arc_easy").mkdir()
    with open(tmp_path / "arc_easy" / "test.jsonl", "w") as file:
        for text, right in zip(ROWS, gold, strict=True):
            file.write(json.dumps({"instruction": text, "input": "", "output": "", "answer": right}) + "\n")
    found = evaluate(capsys, adapter, "--before", "--tasks", "llm_adapters_arc_easy", "--data", tmp_path)
    assert list(found) == [str(base), str(adapter)]
    assert [scores["llm_adapters_arc_easy"]["acc"] for scores in found.values()] == pytest.approx(expected)


@torch.no_grad()
def test_likelihoods_are_those_of_the_model(base, adapter, tmp_path, capsys):
    """A task of the user's own, of choices that lm_eval compares by likelihood."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    choices = tokenizer.convert_tokens_to_ids(["w1", "w2", "w3"])
    *_, model = models(base, adapter)
    best = [model(**tokenizer(t, return_tensors="pt")).logits[0, -1, choices].argmax().item() for t in ROWS]
    labels = best[:9] + [(label + 1) % 3 for label in best[9:]]
    rows = [{"instruction": text, "label": label} for text, label in zip(ROWS, labels, strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text(MULTIPLE_CHOICE.replace("FILE", str(tmp_path / "rows.jsonl")))
    found = evaluate(capsys, adapter, "--tasks", "which_word", "--include-path", tmp_path)
    assert found[str(adapter)]["which_word"]["acc"] == pytest.approx(9 / 12)


def test_what_is_wrong_is_said_before_a_model_is_loaded(base, adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    wrong = {
        ("--tasks", "llm_adapters_boolq", "--data", str(tmp_path)): "has no boolq/test.jsonl",
        ("--tasks", "llm_adapters_boolq"): "pass --data",
    }
    for options, message in wrong.items():
        assert cli.main(["eval", str(adapter), *options]) == 1
        assert message in capsys.readouterr().err
    assert cli.main(["eval", str(base), "--tasks", "llm_adapters_boolq"]) == 1
    assert "is no adapter" in capsys.readouterr().err
