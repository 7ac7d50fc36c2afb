"""LLM-Adapters' tasks: the answers' extraction, the prompt and the data's layout."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml


pytest.importorskip("datasets")
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "eval"


@pytest.fixture(scope="module")
def tasks():
    spec = importlib.util.spec_from_file_location("llm_adapters", FOLDER / "llm_adapters.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("rule", "answer", "response", "right"),
    [
        ("choice", "answer3", "the correct answer is answer3", True),
        ("choice", "answer3", "answer2, not answer3", False),  # the first counts
        ("choice", "answer3", "Answer3", False),
        ("choice", "answer3", "it is true that answer3", True),  # a choice of another data set is none
        ("choice", "answer3", "", False),
        ("choice", "true", "the correct answer is true", True),
        ("choice", "true", "false, or true", False),
        ("choice", "solution2", "solution2", True),
        ("choice", "ending4", "the correct answer is ending4.", True),
        ("choice", "option1", "option2", False),
        ("number", "576.0", "so 24 * 24 = 576 tiles. The answer is 576.", True),
        ("number", "16", "The answer in Arabic numerals is:\n\n16", True),
        ("number", "1234", "That makes $1,234", True),
        ("number", "9.8", "9.8 of 10", False),  # the last counts
        ("number", "-3", "the answer is -3", True),
        ("number", "0.333", "0.3335", True),
        ("number", "0.333", "0.335", False),
        ("number", "4", "four", False),
        ("letter", "B", "The answer is B", True),
        ("letter", "B", "A or B", False),
        ("letter", "B", "none", False),
    ],
)
def test_extraction(tasks, rule, answer, response, right):
    assert getattr(tasks, rule)({"answer": answer}, [response]) == {"acc": float(right)}


def test_an_answer_of_another_form_is_an_error(tasks):
    with pytest.raises(ValueError, match="answer='yes' is none of"):
        tasks.choice({"answer": "yes"}, ["yes"])


@pytest.mark.parametrize("recipe", ["neuroada_commonsense_k1", "neuroada_math_k1"])
def test_the_prompt_is_that_of_the_recipes(tasks, recipe):
    trained = yaml.safe_load((ROOT / "examples" / "recipes" / f"{recipe}.yaml").read_text())["prompt_template"]
    assert tasks.prompt({"instruction": "Say {it}.", "input": ""}) == trained.format(instruction="Say {it}.")
    assert "### Input:\nhere\n" in tasks.prompt({"instruction": "Say it.", "input": "here"})


def test_data_in_both_layouts(tasks, tmp_path):
    rows = [{"instruction": "a", "input": "", "output": "b", "answer": 4.0}]
    (tmp_path / "ARC-Easy").mkdir()
    (tmp_path / "ARC-Easy" / "test.json").write_text(json.dumps(rows))
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text(json.dumps(rows[0]) + "\n")
    for name in ("arc_easy", "gsm8k"):
        assert list(tasks.load(name, str(tmp_path))["test"]) == [{"instruction": "a", "input": "", "answer": "4.0"}]
    with pytest.raises(ValueError, match="has no boolq/test.jsonl"):
        tasks.load("boolq", str(tmp_path))
    with pytest.raises(ValueError, match="pass --data"):
        tasks.load("boolq")


def test_groups_have_every_data_set():
    texts = [path.read_text().replace("!function", "") for path in FOLDER.glob("[a-z]*.yaml")]
    files = [yaml.safe_load(text) for text in texts]
    grouped = [task for content in files if "group" in content for task in content["task"]]
    alone = [content["task"] for content in files if "group" not in content]
    assert sorted(grouped) == sorted(alone) and len(alone) == 15
