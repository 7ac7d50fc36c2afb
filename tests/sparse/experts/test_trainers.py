"""Experts in the hands of a trainer: DPO whose reference is the base or a second adapter."""

import pytest
import torch
from peft import PeftModel

from peft_ext import NeuroAdaConfig
from tests._models.experts import run, tiny, token_ids
from tests._words import make_tokenizer


datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
WORDS = [f"w{number}" for number in range(20)]
CONFIG = {"k": 2, "target_modules": ["experts"], "task_type": "CAUSAL_LM"}
COMMON = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "max_steps": 6}


@pytest.fixture
def tokenizer():
    return make_tokenizer(WORDS)


@pytest.fixture
def preferences():
    generator = torch.Generator().manual_seed(0)

    def text(length):
        return " ".join(WORDS[i] for i in torch.randint(20, (length,), generator=generator).tolist())

    return datasets.Dataset.from_list(
        [{"prompt": f"{text(3)} ", "chosen": text(4), "rejected": text(4)} for _ in range(8)]
    )


def dpo(model, folder, preferences, tokenizer, **options):
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(
            output_dir=str(folder), per_device_train_batch_size=8, learning_rate=3e-2, bf16=False,
            gradient_checkpointing=False, save_strategy="no", **COMMON,
        ),
        train_dataset=preferences, processing_class=tokenizer, **options,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.02
    return trainer, losses


def test_dpo_against_the_base_and_then_against_an_adapter(tmp_path, preferences, tokenizer):
    trainer, first = dpo(tiny(), tmp_path, preferences, tokenizer, peft_config=NeuroAdaConfig(**CONFIG))
    trainer.save_model(tmp_path / "first")
    before = run(trainer.model.eval(), input_ids=token_ids(2)).detach()

    model = PeftModel.from_pretrained(tiny(), tmp_path / "first", is_trainable=True)
    trainer, second = dpo(model, tmp_path, preferences, tokenizer)
    assert list(model.peft_config) == ["default", "ref"]  # of which the trainer freezes the second
    assert abs(second[0] - first[0]) < 1e-5  # policy and reference begin alike
    model.eval()
    model.set_adapter("ref")
    assert torch.equal(run(model, input_ids=token_ids(2)), before)
    model.set_adapter("default")
    after = run(model, input_ids=token_ids(2))
    assert (after - before).abs().max() > 1e-3
    mixed = model(input_ids=token_ids(2), adapter_names=["default", "ref"]).logits
    torch.testing.assert_close(mixed, torch.stack([after[0], before[1]]), atol=1e-5, rtol=1e-5)
