"""Training through `transformers.Trainer`: only the adapter moves, R stays orthonormal, resuming changes nothing."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_ext import MoReSConfig
from tests._models.vision_language import build, inputs
from tests.tuners.mores._common import adapted, assert_equal_bits, bits, layers_of, logits


class Images(Dataset):
    """The same text for every image, with an answer that the image decides."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        sample = {key: value[0] for key, value in inputs(texts=((3, 4),)).items()}
        kind = i % 2
        sample["pixel_values"] = torch.full((3, 16, 16), 1.0 - 2 * kind)
        ids = sample["input_ids"].clone()
        ids[-1] = 5 + kind
        sample["input_ids"] = ids
        sample["labels"] = torch.where(torch.arange(len(ids)) == len(ids) - 1, ids, -100)
        return sample


def train(model, folder, resume=None, callbacks=None, **options):
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
        "logging_steps": 1,
        "remove_unused_columns": False,
        **options,
    }
    trainer = Trainer(model=model, args=TrainingArguments(**options), train_dataset=Images(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def seeded(dtype=torch.float32, **options):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return get_peft_model(build(dtype=dtype), MoReSConfig(**{"rank": 2, "token_ratio": 0.5, **options}))


def base_bits(model):
    return {key: value.detach().clone() for key, value in model.state_dict().items() if "mores_" not in key}


def assert_orthonormal(model):
    for layer in layers_of(model).values():
        for steering in layer.mores_steering.values():
            for factor in (steering.up(), steering.down()):
                assert (factor.T @ factor - torch.eye(factor.shape[1])).abs().max() <= 1e-6


@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.1, "optim": "adamw_torch_fused"}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_adapter_moves(dtype, options, tmp_path):
    model = seeded(dtype)
    base, before = base_bits(model), bits(model)
    assert_orthonormal(model)
    trainer = train(model, tmp_path, **options)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert_equal_bits(base_bits(model), base)
    assert all(not torch.equal(value, before[name]) for name, value in bits(model).items())
    assert_orthonormal(model)


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("options", [{}, {"tie_projections": False, "init": "random"}, {"dropout": 0.2}], ids=str)
def test_resumed_training_equals_uninterrupted_training(options, tmp_path):
    whole = seeded(**options)
    expected = losses(train(whole, tmp_path / "whole"))
    parts = seeded(**options)
    train(parts, tmp_path / "parts", save_strategy="steps", save_steps=4, callbacks=[Stop(4)])
    resumed = seeded(**options)
    trainer = train(resumed, tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-4"))
    assert losses(trainer) == expected
    assert_equal_bits(bits(resumed), bits(whole))
    assert_orthonormal(resumed)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_model(reentrant, tmp_path):
    plain, saving = seeded(), seeded()
    train(plain, tmp_path)
    train(saving, tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for name, value in bits(plain).items():
        torch.testing.assert_close(bits(saving)[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    batch = inputs(texts=((3, 4), (3, 4)))
    gradients = []
    for parts in (1, 2):
        model = adapted().train()
        for i in range(parts):
            rows = slice(i, i + 1) if parts == 2 else slice(0, 2)
            part = {key: value[rows] for key, value in batch.items()}
            (model(**part, labels=part["input_ids"]).loss / parts).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-3, msg=name)


def test_two_forwards_before_their_backwards():
    """Each graph keeps its own tokens, also under checkpointing."""
    first, second = inputs(texts=((3, 4),)), inputs(texts=((7, 2),))
    separate, together = adapted().train(), adapted().train()
    for model in (separate, together):
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    for batch in (first, second):
        separate(**batch, labels=batch["input_ids"]).loss.backward()
    losses_ = [together(**batch, labels=batch["input_ids"]).loss for batch in (first, second)]
    sum(losses_).backward()
    pairs = zip(separate.parameters(), together.parameters(), strict=True)
    for one, other in ((a, b) for a, b in pairs if a.requires_grad):
        torch.testing.assert_close(other.grad, one.grad, atol=1e-6, rtol=1e-4)


def test_the_last_layer_gets_no_gradient_which_is_why_it_is_left_out():
    batch = inputs()
    model = adapted(layers_to_transform="all", token_selection="all").train()
    labels = torch.where(batch["input_ids"] >= 58, -100, batch["input_ids"])  # answers are text
    labels[:, :8] = -100
    model(**batch, labels=labels).loss.backward()
    *others, last = layers_of(model).values()
    assert all(p.grad.any() for layer in others for p in layer.mores_steering.parameters())
    assert not any(p.grad.any() for p in last.mores_steering.parameters())


def test_text_only_batches_have_zero_gradients_not_none():
    """DistributedDataParallel waits for a gradient of every parameter."""
    batch = inputs(texts=(None, None))
    model = adapted().train()
    model.enable_input_require_grads()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_training_the_connector_saves_it_with_the_adapter(tmp_path):
    model = seeded(connector="train")
    before = model.get_base_model().model.multi_modal_projector.original_module.linear_2.weight.clone()
    train(model, tmp_path)
    projector = model.get_base_model().model.multi_modal_projector
    trained = projector.modules_to_save["default"].linear_2.weight
    assert not torch.equal(trained, before) and torch.equal(projector.original_module.linear_2.weight, before)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(build(), tmp_path / "adapter")
    assert torch.equal(logits(again, inputs()), logits(model.eval(), inputs()))
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs()), logits(build(), inputs()))
