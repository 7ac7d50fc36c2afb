"""Gradients of steering: by parts of a batch, by several forwards, where there are none, and of the connector."""

import torch
from peft import PeftModel

from tests._models.vision_language import build, inputs
from tests.contract._common import logits
from tests.tuners.mores._common import adapted, layers_of


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
    model = adapted(connector="train").train()
    projector = model.get_base_model().model.multi_modal_projector
    trained, before = (m.linear_2.weight for m in (projector.modules_to_save["default"], projector.original_module))
    assert torch.equal(trained, before) and trained.requires_grad and not before.requires_grad
    model(**inputs(), labels=inputs()["input_ids"]).loss.backward()
    assert trained.grad.any()
    trained.data -= trained.grad
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(logits(again, inputs()), logits(model.eval(), inputs()))
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs()), logits(build(), inputs()))
