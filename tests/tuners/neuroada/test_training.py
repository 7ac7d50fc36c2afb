"""Training through `transformers.Trainer`: only the values move, and stopping and resuming changes nothing."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_ext import NeuroAdaConfig
from tests.tuners.neuroada._common import adapter_bits, assert_equal_bits, base_bits, fill, logits, wrapped


class Counting(Dataset):
    """Sequences of consecutive numbers: a few steps are enough to learn some of it."""

    def __len__(self):
        return 32

    def __getitem__(self, i):
        ids = torch.arange(5 + i % 4, 17 + i % 4)
        return {"input_ids": ids, "labels": ids}


def train(model, folder, resume=None, callbacks=None, **options):
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "max_steps": 8,
            "learning_rate": 3e-2,
            "weight_decay": 0.1,
            "warmup_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 7,
            **options,
        }
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Counting(), eval_dataset=Counting(), callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_only_the_values_move(llama, tmp_path):
    model = get_peft_model(llama, NeuroAdaConfig(k=2))
    base, before = base_bits(model), adapter_bits(model)
    trainer = train(model, tmp_path, logging_steps=1)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert_equal_bits(base_bits(model), base)
    for name, tensor in adapter_bits(model).items():
        assert torch.equal(tensor, before[name]) == (not name.endswith(".weight")), name


def test_only_the_values_move_in_half_precision(tiny, tmp_path):
    model = get_peft_model(tiny("llama", torch.bfloat16), NeuroAdaConfig(k=2))
    base = base_bits(model)
    trainer = train(model, tmp_path, logging_steps=1)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert_equal_bits(base_bits(model), base)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_bf16_autocast(llama, tmp_path):
    model = get_peft_model(llama, NeuroAdaConfig(k=2))
    base = base_bits(model)
    trainer = train(model, tmp_path, logging_steps=1, bf16=True)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert_equal_bits(base_bits(model), base)


def test_gradient_checkpointing_gives_the_same_model(tiny, tmp_path):
    results = []
    for checkpointing in (False, True):
        model = get_peft_model(tiny("llama"), NeuroAdaConfig(k=2))
        train(model, tmp_path, gradient_checkpointing=checkpointing, max_steps=3)
        results.append(adapter_bits(model))
    assert_equal_bits(results[1], results[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_both_kinds_of_gradient_checkpointing_train(llama, tmp_path, reentrant):
    model = get_peft_model(llama, NeuroAdaConfig(k=2))
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer = train(model, tmp_path, logging_steps=1, **kwargs)
    assert losses(trainer)[-1] < losses(trainer)[0]


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step
        return control


@pytest.mark.parametrize("options", [{"k": 2}, {"k": 1, "selection": "random_network"}], ids=str)
def test_resumed_training_equals_uninterrupted_training(tiny, tmp_path, options):
    whole = get_peft_model(tiny("llama"), NeuroAdaConfig(**options))
    train(whole, tmp_path / "whole")
    first = get_peft_model(tiny("llama"), NeuroAdaConfig(**options))
    train(first, tmp_path / "parts", save_strategy="steps", save_steps=4, callbacks=[Stop(4)])
    assert (tmp_path / "parts" / "checkpoint-4" / "adapter_model.safetensors").is_file()
    second = get_peft_model(tiny("llama"), NeuroAdaConfig(**options))
    train(second, tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-4"))
    assert_equal_bits(adapter_bits(second), adapter_bits(whole))


def test_best_model_is_loaded_at_the_end(llama, tmp_path):
    """Here the highest loss counts as best, so the model to load is not the last one."""
    model = get_peft_model(llama, NeuroAdaConfig(k=2))
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = train(model, tmp_path, max_steps=6, **steps, **best)
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert max(evaluations) > evaluations[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(evaluations), rel=1e-6)
    assert model.active_adapters == ["default"] and [p for p in model.parameters() if p.requires_grad]


def test_adapter_added_by_transformers_trains(llama, tiny, tmp_path, ids):
    llama.add_adapter(NeuroAdaConfig(k=2))
    base = base_bits(llama)
    trainer = train(llama, tmp_path, save_strategy="steps", save_steps=8, logging_steps=1)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert_equal_bits(base_bits(llama), base)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "checkpoint-8")
    assert torch.equal(logits(loaded, ids), logits(llama.eval(), ids))


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
def test_other_models_train(tiny, inputs_of, name):
    model, inputs = get_peft_model(tiny(name), NeuroAdaConfig(k=2)).train(), inputs_of(name)
    base = base_bits(model)
    labels = inputs["input_ids"] if name == "gpt2" else torch.tensor([0, 1, 2])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.5)
    history = []
    torch.manual_seed(0)
    for _ in range(8):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    assert min(history[-3:]) < history[0]
    assert_equal_bits(base_bits(model), base)


def test_weight_decay_pulls_the_values_to_the_base_model(llama, ids):
    """A decayed value goes to zero, which is the pretrained weight, and never touches the weight itself."""
    model = fill(get_peft_model(llama, NeuroAdaConfig(k=2)))
    base, before = base_bits(model), adapter_bits(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-1, weight_decay=1.0)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert_equal_bits(base_bits(model), base)
    for name, layer in wrapped(model).items():
        torch.testing.assert_close(layer.deltas["default"].weight, before[f"{name}.weight"] * 0.9)
