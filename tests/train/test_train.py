"""`peft-ext train`: every recipe and every trainer on a tiny model, and errors that name file, line and key."""

import json
from pathlib import Path

import pytest
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_ext import cli
from peft_ext.train.options import TRAINERS
from tests._words import save_language_model


RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))
WORDS = [f"w{number}" for number in range(40)] + ["###", "Instruction:", "Response:", "user", "assistant"]
CPU = ["--use_cpu", "true", "--bf16", "false", "--dtype", "float32", "--report_to", "none", "--max_steps", "2"]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}{{ eos_token }}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("model"), WORDS, TEMPLATE)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A larger model with the same words."""
    folder = tmp_path_factory.mktemp("teacher")
    return save_language_model(folder, WORDS, TEMPLATE, num_key_value_heads=2, tie_word_embeddings=True)


ROWS = {
    "instructions": {"instruction": "w1 w2 w3", "input": "", "output": "w4 w5", "answer": "w5"},
    "texts": {"text": "w1 w2 w3 w4 w5 w6"},
    "preferences": {"prompt": "w1 w2", "chosen": " w3 w4", "rejected": " w5 w6"},
    "labelled": {"prompt": "w1 w2", "completion": " w3 w4", "label": True},
    "prompts": {"prompt": "w1 w2 w3"},
    "conversations": {"prompt": [{"role": "user", "content": "w1 w2 w3"}]},
}
DATA = {
    "sft": "texts", "dpo": "preferences", "reward": "preferences", "kto": "labelled", "grpo": "prompts",
    "rloo": "conversations", "distillation": "conversations",
}  # fmt: skip
WRITES = ["--max_completion_length", "4"]
REWARDS = "def by_length(completions, **kwargs):\n    return [float(len(str(c))) for c in completions]\n"
# A tiny model never earns the recipe's reward, so there is one more.
FURTHER = {
    "rloo": [*WRITES, "--reward_funcs", "trl.rewards.think_format_reward", "my_rewards.by_length"],
    "distillation": WRITES,
}


def data_file(folder, kind):
    rows = [dict(ROWS[kind]) for _ in range(8)]
    for number, row in enumerate(rows):
        if "label" in row:
            row["label"] = number % 2 == 0
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(path, *options):
    return cli.main(["train", "--config", str(path), *map(str, options)])


def adapter_of(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe(recipe, model, teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    text = recipe.read_text()
    trainer = yaml.safe_load(text)["trainer"]
    kind = "instructions" if "{instruction}" in text else DATA[trainer]
    options = ["--model_name_or_path", model, "--dataset_name", data_file(tmp_path, kind), *FURTHER.get(trainer, [])]
    options += ["--teacher_model_name_or_path", teacher] if trainer == "distillation" else []
    out = tmp_path / "out"
    assert run(recipe, *options, *CPU, "--output_dir", out, "--save_strategy", "no") == 0, capsys.readouterr().err
    config, tensors = adapter_of(out)
    assert config["peft_type"] in text
    assert any(bool(tensor.any()) for key, tensor in tensors.items() if key.endswith(".weight"))
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), out)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trainer", ["reward", "kto", "grpo"])
def test_other_trainers_and_methods(trainer, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    lines = [
        f"trainer: {trainer}",
        f"model_name_or_path: {model}",
        f"dataset_name: {data_file(tmp_path, DATA[trainer])}",
    ]
    lines += ["output_dir: out", "save_strategy: 'no'", "per_device_train_batch_size: 4"]
    if trainer == "grpo":
        lines += ["reward_funcs: [my_rewards.by_length]", "num_generations: 4", "max_completion_length: 4"]
    method = "LORA" if trainer == "kto" else "NEUROADA"
    lines += ["peft:", f"  peft_type: {method}", f"  task_type: {'SEQ_CLS' if trainer == 'reward' else 'CAUSAL_LM'}"]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    assert run(tmp_path / "run.yaml", *CPU) == 0, capsys.readouterr().err
    assert adapter_of(tmp_path / "out")[0]["peft_type"] == method


WRONG = {
    "trainer: sftt\n": ("run.yaml:1: trainer: 'sftt' is not known", "sft, dpo"),
    "trainer: sft\nlerning_rate: 1\n": ("run.yaml:2: lerning_rate: no option of SFTConfig",),
    "model_name_or_path: m\npeft:\n  peft_type: NEUROADA\n  kk: 1\n": ("run.yaml:4: peft.kk: no option",),
    "model_name_or_path: m\npeft:\n  peft_type: NEUROADA\n  k: 0\n": ("run.yaml:4: peft.k: k=0 must be",),
    "model_name_or_path: m\npeft:\n  peft_type: NOPE\n": ("run.yaml:3: peft.peft_type: NOPE is no method",),
    "dataset_name: d\n": ("model_name_or_path: is missing",),
    "model_name_or_path: m\ndataset_name: d\nuse_peft: true\n": ("run.yaml:3: use_peft: builds a LoRA",),
    "- a\n": ("run.yaml:1: a run is a mapping",),
    "a: [\n": ("no YAML",),
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_named_with_its_line(text, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text)
    assert run(tmp_path / "run.yaml", "--output_dir", tmp_path / "out") == 1
    error = capsys.readouterr().err
    for part in WRONG[text]:
        assert part in error
    assert not (tmp_path / "out").exists()


def test_data_that_do_not_fit_are_named(model, tmp_path, capsys):
    lines = [
        f"model_name_or_path: {model}",
        f"dataset_name: {data_file(tmp_path, 'texts')}",
        f"output_dir: {tmp_path / 'o'}",
    ]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    assert run(tmp_path / "run.yaml", *CPU, "--prompt_template", "{question}") == 1
    assert "no column 'question'" in capsys.readouterr().err
    assert run(tmp_path / "run.yaml", *CPU, "--trainer", "distillation") == 1
    assert "teacher_model_name_or_path: trainer distillation needs one" in capsys.readouterr().err
    assert run(tmp_path / "run.yaml", *CPU, "--trainer=grpo") == 1
    assert "reward_funcs: trainer grpo needs at least one" in capsys.readouterr().err
    assert run(tmp_path / "run.yaml", *CPU, "--dataset_train_split", "other") == 1
    assert "dataset_train_split: there is no split 'other'" in capsys.readouterr().err


def test_a_file_that_is_not_there(tmp_path, capsys):
    assert run(tmp_path / "no.yaml") == 1
    assert "no.yaml" in capsys.readouterr().err


def test_trainers_are_those_of_trl():
    import trl

    assert all(hasattr(trl, f"{name}Trainer") for name in TRAINERS.values())
