"""The snippets in docstrings of public classes and functions run as they stand, on tiny models."""

import copy
import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from peft import ShiraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

import peft_ext
from peft_ext import MoReSConfig, NeuroAdaConfig, knockout, mtl
from tests.docs import _world
from tests.docs.test_snippets import hub as hub
from tests.docs.test_snippets import stay_on_the_cpu


SNIPPET = re.compile(r"^(?:Example|Usage):\n\n( *)```(?:py|python)\n(.*?)^\1```$", re.M | re.S)


def _snippets():
    for module in (peft_ext, mtl, knockout):
        for name in module.__all__:
            documentation = inspect.cleandoc(getattr(module, name).__doc__ or "")
            for number, match in enumerate(SNIPPET.finditer(documentation)):
                yield pytest.param(module, name, match[2], id=f"{name}-{number}" if number else name)


def _code(text):
    """A snippet without prompts and printed results."""
    lines = inspect.cleandoc(text).splitlines()
    if not any(line.startswith(">>> ") for line in lines):
        return "\n".join(lines)
    return "\n".join(line[4:] for line in lines if line.startswith((">>> ", "... ")))


class _TwoOutputs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.seg, self.depth = (torch.nn.Linear(4, size) for size in (4, 3, 1))

    def forward(self, x, labels_seg=None, labels_depth=None):
        features = self.trunk(x)
        return {"seg": self.seg(features), "depth": self.depth(features)[:, 0]}


def _plain():
    rows = _world._sentences()
    names = {"model": _world._classifier(), "base_model": _world._classifier(), "train_dataset": rows}
    names |= {"dataloader": _world._loader(rows), "DataLoader": DataLoader, "augment": dict, "MyTrainer": Trainer}
    return names | {"summaries": _world._texts(), "questions": _world._texts()}


def _mixture():
    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B")
    return {"model": model, "dataloader": _world._loader(_world._language_rows())}


def _encoder():
    names = _plain()
    names["model"] = torch.nn.ModuleDict(
        {"vision_encoder": torch.nn.Sequential(torch.nn.Linear(8, 8)), "mask_decoder": torch.nn.Linear(8, 2)}
    )
    return names


def _adapted():
    names = _plain()
    names["model"] = get_peft_model(names["model"], NeuroAdaConfig(k=1))
    for folder in ("user/another-adapter", "adapter-of-the-pretrained-model"):
        names["model"].save_pretrained(folder)
    shira = ShiraConfig(r=2, target_modules=["q_lin"])
    get_peft_model(_world._classifier(), shira).save_pretrained("user/shira-adapter")
    return names | {"instruct_model": _world._classifier(), "inputs": {"input_ids": torch.tensor([[5, 6]])}}


def _steered():
    question = _world._question()
    text = get_peft_model(_world._language_model(), MoReSConfig(token_positions="f1+l1"))
    ids = torch.randint(4, 60, (1, 6))
    return question | {
        "llava": question["model"], "model": text, "copy": copy,
        "torch": torch, "visual_tokens": peft_ext.visual_tokens,
        "unfinished_prompt": peft_ext.unfinished_prompt, "system_prompt": {"input_ids": ids[:, :3]},
        "whole_prompt": {"input_ids": ids, "max_new_tokens": 2}, "mask": torch.ones(1, 6, dtype=torch.bool),
        "embeddings": torch.randn(1, 6, 32), "attention_mask": torch.ones(1, 6, dtype=torch.long),
    }  # fmt: skip


def _flow():
    names = _world._question() | {name: getattr(knockout, name) for name in knockout.__all__}
    names["groups"] = knockout.find_token_groups(
        names["processor"], names["inputs"], spans={"question": names["question"]}
    )
    return names | {"range": lambda *_: range(2)}  # the snippet's layers, on a model with few


def _tasks():
    dataset = [
        {"x": torch.randn(4), "labels_seg": torch.tensor(1), "labels_depth": torch.tensor(0.5)} for _ in range(16)
    ]
    return _plain() | {"F": F, "model": _TwoOutputs(), "dataset": dataset}


def _conflicts():
    rows = _world._sentences()
    model = _world._classifier()
    arguments = TrainingArguments("out", max_steps=10, use_cpu=True, report_to="none", save_strategy="no")
    return {
        "math_samples": rows, "code_samples": rows, "collator": default_data_collator,
        "trainer": Trainer(model, arguments, train_dataset=rows),
    }  # fmt: skip


NAMES = {
    "busiest_experts": _mixture,
    "PSNConfig": _encoder,
    "MoReSConfig": _steered,
    "convert": _adapted,
    "hotswap_adapter": _adapted,
    "another_base": _adapted,
    "set_scale": _adapted,
    "rescale_adapter_scale": _adapted,
    "selection_report": _adapted,
    "visual_tokens": _steered,
    "unfinished_prompt": _steered,
    "MTLTrainer": _tasks,
    "GradientConflictCallback": _conflicts,
}


@pytest.mark.parametrize(("module", "name", "snippet"), list(_snippets()))
@pytest.mark.filterwarnings("ignore")
def test_the_snippet_runs(module, name, snippet, hub, monkeypatch):
    monkeypatch.chdir(hub)
    stay_on_the_cpu(monkeypatch)
    torch.manual_seed(0)
    make = _flow if module is knockout else NAMES.get(name, _plain)
    names = make() | {name: getattr(module, name)}
    exec(compile(_code(snippet), f"{name}: {snippet}", "exec"), names)


def test_trainers_and_callbacks_have_one():
    shown = {parameters.values[1] for parameters in _snippets()}
    assert {"MTLTrainer", "MTLTrainerMixin", "MTLSFTTrainer", "GradientConflictCallback"} <= shown
    assert {"NeuroAdaConfig", "GPSConfig", "PSNConfig", "MoReSConfig", "MTLConfig", "gps", "layer_sweep"} <= shown
