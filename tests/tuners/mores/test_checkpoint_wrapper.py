"""Torch's own checkpoint wrapper around decoder layers, as accelerate's FSDP puts it on, changes nothing."""

from functools import partial

import pytest
import torch
from peft import PeftModel
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from tests._models.vision_language import build, inputs
from tests.contract._common import adapter_bits, assert_equal_bits, logits
from tests.tuners.mores._common import adapted


EVERY_KIND = pytest.mark.parametrize("kind", list(CheckpointImpl), ids=lambda kind: kind.name)


def _wrap(model, kind):
    layers = {type(layer) for layer in model.get_decoder().layers}
    make = partial(checkpoint_wrapper, checkpoint_impl=kind)
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=make, check_fn=lambda m: type(m) in layers)
    assert all(isinstance(layer, CheckpointWrapper) for layer in model.get_decoder().layers)
    return model


def _trained(model, *batches):
    """Outputs, and the gradients of all batches together, whose forward passes come before the first backward."""
    model.enable_input_require_grads()
    outputs = [model(**batch, labels=batch["input_ids"], use_cache=False) for batch in batches]
    sum(output.loss for output in outputs).backward()
    gradients = [p.grad for name, p in sorted(model.named_parameters()) if "mores_" in name]
    assert gradients and all(gradient.any() for gradient in gradients)
    return [output.logits for output in outputs], gradients


@EVERY_KIND
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "idefics3"])
def test_outputs_and_gradients_are_those_without_the_wrapper(family, kind):
    batches = [inputs(family), inputs(family, texts=((7, 2),))]
    expected = _trained(adapted(family).train(), *batches)
    model = adapted(family).train()
    _wrap(model.get_base_model(), kind)
    for _ in range(2):  # also once the wrappers are known
        model.zero_grad()
        torch.testing.assert_close(_trained(model, *batches), expected)


@EVERY_KIND
def test_the_wrapper_may_be_there_first(kind, monkeypatch):
    batch = inputs()
    expected = _trained(adapted().train(), batch)
    monkeypatch.setattr(
        "tests.tuners.mores._common.build", lambda *args, **options: _wrap(build(*args, **options), kind)
    )
    model = adapted().train()
    torch.testing.assert_close(_trained(model, batch), expected)


@EVERY_KIND
def test_the_adapter_is_saved_from_behind_the_wrapper(kind, tmp_path):
    model = adapted()
    _wrap(model.get_base_model(), kind)
    model.save_pretrained(tmp_path)
    assert_equal_bits(adapter_bits(PeftModel.from_pretrained(build(), tmp_path)), adapter_bits(adapted()))


def test_adapters_behind_a_wrapper_are_disabled_and_unloaded():
    batch = inputs()
    base, model = _wrap(build(), CheckpointImpl.NO_REENTRANT), adapted()
    _wrap(model.get_base_model(), CheckpointImpl.NO_REENTRANT)
    steered = logits(adapted(), batch)
    assert torch.equal(logits(model, batch), steered)
    assert adapter_bits(model).keys() and not torch.equal(steered, logits(base, batch))
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), logits(base, batch))
    bare = model.unload()
    assert torch.equal(logits(bare, batch), logits(base, batch))
    hooks = [[len(m._forward_hooks) + len(m._forward_pre_hooks) for m in one.modules()] for one in (bare, base)]
    assert hooks[0] == hooks[1]


@EVERY_KIND
def test_the_outermost_of_several_wrappers_is_steered(kind):
    batch = inputs()
    expected = _trained(adapted().train(), batch)
    model = adapted().train()
    _wrap(model.get_base_model(), kind)
    layers = model.get_decoder().layers
    for _ in range(2):  # all at once, and one more around a wrapper that is steered already
        for index in range(len(layers)):
            layers[index] = checkpoint_wrapper(layers[index], checkpoint_impl=kind)
        model.zero_grad()
        torch.testing.assert_close(_trained(model, batch), expected)


def test_an_adapter_is_loaded_before_wrapping(tmp_path):
    """PEFT finds no tensors behind the wrappers, also not LoRA's."""
    adapted().save_pretrained(tmp_path)
    base = _wrap(build("llava"), CheckpointImpl.NO_REENTRANT)
    with pytest.raises(ValueError, match="checkpoint wrapper.*Load the adapter first, and wrap the layers afterwards"):
        PeftModel.from_pretrained(base, tmp_path)
    model = PeftModel.from_pretrained(build("llava"), tmp_path)
    expected = logits(model, inputs())
    _wrap(model.get_base_model(), CheckpointImpl.NO_REENTRANT)
    torch.testing.assert_close(logits(model, inputs()), expected)
