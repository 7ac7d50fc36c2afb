"""An adapter's card: complete whoever writes it, without placeholders, and what a user wrote stays."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from peft_ext import GPSConfig, NeuroAdaConfig, PSNConfig
from peft_ext.hf import cards
from peft_ext.hf.cards import BEGIN, END, complete_card
from tests._words import save_language_model


PLACEHOLDERS = re.compile(r"More Information Needed|\[optional\]|<your|<owner|\{\{ |\{%")


def gps_config(model):
    scores = {name: torch.rand_like(m.weight) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return GPSConfig(k=1).with_scores(scores)


CONFIGS = {
    "neuroada": lambda model: NeuroAdaConfig(k=2),
    "gps": gps_config,
    "psn": lambda model: PSNConfig(k=3),
}


def loaded(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir("llama"))


def peft_saves(model, config, folder):
    get_peft_model(model, config).save_pretrained(folder)


def transformers_saves(model, config, folder):
    model.add_adapter(config)
    model.save_pretrained(folder)


SAVERS = pytest.mark.parametrize("save", [peft_saves, transformers_saves], ids=lambda save: save.__name__)


def checked(folder, method="neuroada"):
    text = (folder / "README.md").read_text()
    card = ModelCard(text)
    assert card.data["library_name"] == "peft" and card.data["base_model_relation"] == "adapter"
    assert {"peft_ext", method, "sparse", f"base_model:adapter:{card.data.base_model}"} <= set(card.data.tags)
    assert card.data.pipeline_tag == "text-generation"
    part = text[text.index(BEGIN) : text.index(END)]
    assert text.count(BEGIN) == text.count(END) == 1
    code = re.search(r"```python\n(.*?)```", part, re.S)[1]
    assert code.startswith("import peft_ext")
    assert not PLACEHOLDERS.search(part)
    for row in ("trained entries", "share of these weights", "| file |", "adapted layers", "PyTorch", "`selection`"):
        assert row in part
    return card


@SAVERS
@pytest.mark.parametrize("method", CONFIGS)
def test_complete_and_without_placeholders(method, save, model_dir, tmp_path):
    model = loaded(model_dir)
    save(model, CONFIGS[method](model), tmp_path)
    card = checked(tmp_path, method)
    assert not PLACEHOLDERS.search(card.content)
    if method == "neuroada":
        linear = [m for m in loaded(model_dir).model.layers.modules() if isinstance(m, torch.nn.Linear)]
        rows = sum(layer.out_features for layer in linear)
        assert f"{2 * rows:,} in 14 weights" in card.content


@SAVERS
def test_the_snippet_runs_as_it_stands(save, model_dir, tmp_path, monkeypatch):
    save(loaded(model_dir), NeuroAdaConfig(k=2), tmp_path / "my-adapter")
    code = re.search(r"```python\n(.*?)```", (tmp_path / "my-adapter" / "README.md").read_text(), re.S)[1]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert any("neuroada_delta" in name for name, _ in names["model"].named_parameters())


def test_what_a_user_wrote_is_kept(model_dir, tmp_path):
    model = get_peft_model(loaded(model_dir), NeuroAdaConfig(k=1))
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    card.data["license"], card.data["datasets"] = "mit", ["me/data"]
    card.data["tags"] = [*card.data.tags, "mine"]
    card.text = (
        card.text.replace("# " + tmp_path.name.replace("-", " "), "# My adapter\n\nOf mine.") + "\nMy results.\n"
    )
    card.text = card.text.replace("1 |", "one |", 1)  # between the marks
    (tmp_path / "README.md").write_text(card.content)
    for _ in range(2):
        model.save_pretrained(tmp_path)
    card = checked(tmp_path)
    assert card.data["license"] == "mit" and card.data["datasets"] == ["me/data"] and "mine" in card.data.tags
    assert card.text.count("My results.") == 1 and "Of mine." in card.text and "one |" not in card.text


def test_a_card_of_the_user_gets_our_part(model_dir, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nText.\n")
    get_peft_model(loaded(model_dir), NeuroAdaConfig(k=1)).save_pretrained(tmp_path)
    card = checked(tmp_path)
    assert card.data["license"] == "mit" and card.text.strip().startswith("# Mine\n\nText.")


def test_every_adapter_of_several_has_its_own(model_dir, tmp_path):
    model = get_peft_model(loaded(model_dir), NeuroAdaConfig(k=1))
    model.add_adapter("second", NeuroAdaConfig(k=2))
    model.save_pretrained(tmp_path)
    checked(tmp_path)
    assert "`2`" in checked(tmp_path / "second").text


class Tokens(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        ids = torch.arange(3, 9)
        return {"input_ids": ids, "labels": ids}


@SAVERS
def test_trainer_and_its_checkpoints(save, model_dir, tmp_path):
    out = tmp_path / "out"
    model = loaded(model_dir)
    if save is peft_saves:
        model = get_peft_model(model, NeuroAdaConfig(k=1))
    else:
        model.add_adapter(NeuroAdaConfig(k=1))
    options = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(str(out), max_steps=1, save_steps=1, **options)
    trainer = Trainer(model, arguments, train_dataset=Tokens())
    trainer.train()
    checked(out / "checkpoint-1")
    trainer.save_model()
    trainer.create_model_card(tags="mine", dataset="me/data", dataset_tags="me/data")
    card = checked(out)
    assert "### Training hyperparameters" in card.text and "mine" in card.data.tags
    assert card.data["datasets"] == ["me/data"]
    trainer.create_model_card()
    checked(out)


def test_trl(tmp_path, monkeypatch):
    trl = pytest.importorskip("trl")
    from datasets import Dataset as Table

    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    base = save_language_model(tmp_path / "base", [f"w{number}" for number in range(8)], template)
    out = tmp_path / "out"
    options = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "max_length": 8}
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        trl.SFTConfig(str(out), max_steps=1, save_steps=1, **options),
        train_dataset=Table.from_dict({"input_ids": [[3, 4, 5, 6]] * 4}),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=NeuroAdaConfig(k=1),
    )
    trainer.train()
    checked(out / "checkpoint-1")
    trainer.save_model()
    trainer.create_model_card(dataset_name="me/data")
    assert "TRL" in checked(out).text
    trainer.save_model()
    card = checked(out)
    assert "TRL" in card.text
    quick_start = re.search(r"## Quick start\n\n```python\n(.*?)```", card.text, re.S)[1]
    assert quick_start.count("import peft_ext") == 1
    monkeypatch.chdir(tmp_path)
    short = quick_start.replace("max_new_tokens=128", "max_new_tokens=2").replace('device_map="auto"', 'device="cpu"')
    names = {}
    exec(short, names)
    assert any("neuroada_delta" in name for name, _ in names["generator"].model.named_parameters())


def test_pushed_cards_name_the_repository(model_dir, monkeypatch):
    seen = {}

    def upload(self, working_dir, repo_id, **kwargs):
        with open(os.path.join(working_dir, "README.md"), encoding="utf-8") as file:
            seen[repo_id] = file.read()

    def absent(repo_id, *args, **kwargs):
        if str(repo_id) == "me/an-adapter":
            raise EntryNotFoundError("no card")
        return load(repo_id, *args, **kwargs)

    load = ModelCard.load
    made = SimpleNamespace(create_repo=lambda repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
    model = get_peft_model(loaded(model_dir), NeuroAdaConfig(k=1))
    monkeypatch.setattr(type(model), "_upload_modified_files", upload)
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: made)
    monkeypatch.setattr(ModelCard, "load", absent)
    model.push_to_hub("me/an-adapter")
    text = seen["me/an-adapter"]
    assert 'PeftModel.from_pretrained(base_model, "me/an-adapter")' in text and "# an adapter" in text
    assert not PLACEHOLDERS.search(text)


def test_cards_pushed_by_trainer_name_the_repository(model_dir, tmp_path, monkeypatch):
    seen = []

    def upload(self, *, repo_id, folder_path, **kwargs):
        seen.append((Path(folder_path) / "README.md").read_text())

    monkeypatch.setattr(HfApi, "upload_folder", cards.naming_cards_in_folder(upload))
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = Trainer(get_peft_model(loaded(model_dir), NeuroAdaConfig(k=1)), arguments)
    trainer.hub_model_id = "me/an-adapter"
    trainer.push_to_hub()
    assert 'PeftModel.from_pretrained(base_model, "me/an-adapter")' in seen[0]
    monkeypatch.undo()
    assert hasattr(HfApi.upload_folder, "wrapped_by_peft_ext")


def test_other_methods_are_left_alone(model_dir, tmp_path):
    get_peft_model(loaded(model_dir), LoraConfig()).save_pretrained(tmp_path)
    before = (tmp_path / "README.md").read_text()
    complete_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == before and "peft_ext" not in before


def test_a_card_that_cannot_be_read_is_a_warning(model_dir, tmp_path):
    model = get_peft_model(loaded(model_dir), NeuroAdaConfig(k=1))
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\n- a list\n---\n")
    with pytest.warns(UserWarning, match=r"README\.md was not completed"):
        cards.complete_quietly(tmp_path)
