"""Training through `transformers.Trainer`: only the adapter moves, and stopping and resuming changes nothing."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_ext import MoReSConfig, NeuroAdaConfig
from tests._models.vision_language import build
from tests._models.vision_language import inputs as images
from tests.contract._common import assert_equal_bits, base_bits, layers_of, logits
from tests.tuners.mores._common import assert_orthonormal


class Counting(Dataset):
    """Sequences of consecutive numbers: a few steps are enough to learn some of it."""

    def __len__(self):
        return 32

    def __getitem__(self, i):
        ids = torch.arange(5 + i % 4, 17 + i % 4)
        return {"input_ids": ids, "labels": ids}


class Images(Dataset):
    """The same text for every image, with an answer that the image decides."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        sample = {key: value[0] for key, value in images(texts=((3, 4),)).items()}
        sample["pixel_values"] = torch.full((3, 16, 16), 1.0 - 2 * (i % 2))
        sample["input_ids"] = ids = sample["input_ids"].clone()
        ids[-1] = 5 + i % 2
        sample["labels"] = torch.where(torch.arange(len(ids)) == len(ids) - 1, ids, -100)
        return sample


CONFIGS = {
    "neuroada": lambda: NeuroAdaConfig(k=2),
    "neuroada at random": lambda: NeuroAdaConfig(k=1, selection="random_network"),
    "mores": lambda: MoReSConfig(rank=2, token_ratio=0.5),
    "mores, untied": lambda: MoReSConfig(rank=2, token_ratio=0.5, tie_projections=False, init="random"),
    "mores, dropout": lambda: MoReSConfig(rank=2, token_ratio=0.5, dropout=0.2),
}
BOTH = pytest.mark.parametrize("method", ["neuroada", "mores"])


@pytest.fixture
def make(tiny):
    """Function: name of a config, and a dtype, to a new adapted model."""

    def made(method, dtype=torch.float32):
        base = build(dtype=dtype) if "mores" in method else tiny("llama", dtype)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return get_peft_model(base, CONFIGS[method]())

    return made


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 4
        return control


def train(model, folder, resume=None, callbacks=None, **options):
    arguments = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 8, "learning_rate": 3e-2,
        "weight_decay": 0.1, "warmup_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "use_cpu": True, "seed": 7, "logging_steps": 1, "remove_unused_columns": False, **options,
    }  # fmt: skip
    data = Images() if "llava" in model.config.model_type else Counting()
    trainer = Trainer(
        model, TrainingArguments(**arguments), train_dataset=data, eval_dataset=data, callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapter_bits(model):
    marks = ("_delta.", ".mores_steering.")
    return {name: t.clone() for name, t in model.state_dict().items() if any(mark in name for mark in marks)}


@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.1, "optim": "adamw_torch_fused"}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@BOTH
def test_only_the_adapter_moves(make, tmp_path, method, dtype, options):
    model = make(method, dtype)
    base, before = base_bits(model), adapter_bits(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    trainer = train(model, tmp_path, **options)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert_equal_bits(base_bits(model), base)
    for name, tensor in adapter_bits(model).items():
        assert torch.equal(tensor, before[name]) == (name not in trained), name
    if method == "mores":
        assert_orthonormal(model)


@pytest.mark.parametrize("reentrant", [True, False])
@BOTH
def test_gradient_checkpointing_gives_the_same_model(make, tmp_path, method, reentrant):
    plain, saving = make(method), make(method)
    train(plain, tmp_path, max_steps=3)
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    train(saving, tmp_path, max_steps=3, **kwargs)
    found = adapter_bits(saving)
    for name, tensor in adapter_bits(plain).items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("method", CONFIGS)
def test_resumed_training_equals_uninterrupted_training(make, tmp_path, method):
    whole, parts, resumed = (make(method) for _ in range(3))
    expected = losses(train(whole, tmp_path / "whole"))
    train(parts, tmp_path / "parts", save_strategy="steps", save_steps=4, callbacks=[Stop()])
    assert (tmp_path / "parts" / "checkpoint-4" / "adapter_model.safetensors").is_file()
    trainer = train(resumed, tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-4"))
    assert losses(trainer) == expected
    assert_equal_bits(adapter_bits(resumed), adapter_bits(whole))


def test_best_model_is_loaded_at_the_end(make, tmp_path):
    """Here the highest loss counts as best, so the model to load is not the last one."""
    model = make("neuroada")
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
    trainer = train(llama, tmp_path, save_strategy="steps", save_steps=8)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert_equal_bits(base_bits(llama), base)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "checkpoint-8")
    assert layers_of(loaded) and torch.equal(
        logits(loaded, {"input_ids": ids}), logits(llama.eval(), {"input_ids": ids})
    )
