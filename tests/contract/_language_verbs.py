"""What users do with adapters of language models, each a function of a case that checks the outcome."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

from peft_ext import cli
from tests.contract._case import Case, close, trained
from tests.contract._common import assert_equal_bits, base_bits, fill


def auto_classes(case: Case) -> None:
    expected = case.logits(case.saved())
    for kind in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        assert torch.equal(case.logits(kind.from_pretrained(case.folder / "adapter")), expected)


def of_transformers(case: Case) -> None:
    """`add_adapter` and its like, without a `PeftModel`."""
    model, ids = case.base(), case.inputs["input_ids"]
    plain, bits = case.logits(model), base_bits(model)
    model.add_adapter(case.config(), "first")
    assert torch.equal(case.logits(model), plain)
    assert trained(model) and all(".first." in name for name in trained(model))
    first = case.logits(fill(model, "first"))
    model.save_pretrained(case.folder / "first")
    for loaded in (
        PeftModel.from_pretrained(case.base(), case.folder / "first"),
        AutoModelForCausalLM.from_pretrained(case.folder / "first"),
    ):
        assert torch.equal(case.logits(loaded), first)

    other = case.adapted(seed=2)
    second = case.logits(other)
    other.save_pretrained(case.folder / "second")
    with pytest.raises(ValueError, match="already exists"):
        model.load_adapter(str(case.folder / "second"), "first")
    model.load_adapter(str(case.folder / "second"), "second", is_trainable=True)
    for active, expected in (("second", second), ("first", first)):
        model.set_adapter(active)
        assert model.active_adapters() == [active] and torch.equal(case.logits(model), expected)
    model.disable_adapters()
    assert torch.equal(case.logits(model), plain)
    model.enable_adapters()
    assert torch.equal(case.logits(model), first)
    model.delete_adapter("first")
    assert not [key for key in model.state_dict() if ".first." in key]
    model.set_adapter("second")
    assert torch.equal(case.logits(model), second)
    model.train()(**case.inputs, labels=ids.where(torch.arange(ids.shape[1]) > 4, -100)).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    model.delete_adapter("second")
    assert_equal_bits(base_bits(model.eval()), bits)
    assert torch.equal(case.logits(model), plain)


def compiled(case: Case) -> None:
    model = case.adapted()
    close(case.logits(torch.compile(model, backend="aot_eager")), case.logits(model))


def exported(case: Case) -> None:
    model, inputs = case.adapted(), {**case.inputs, "use_cache": False}
    program = torch.export.export(model, (), inputs)
    close(program.module()(**inputs).logits, case.logits(model))


def checkpointing(case: Case) -> None:
    gradients, ids = [], case.inputs["input_ids"]
    for enabled in (False, True):
        model = case.adapted().train()
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**case.inputs, labels=ids.where(torch.arange(ids.shape[1]) > 4, -100)).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*gradients, strict=True):
        close(again, plain)


def generation(case: Case) -> None:
    model, options = case.adapted(), {**case.inputs, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**options), model.generate(**options, use_cache=False))


# ---------------------------------------------------------------------- commands


def _run(*arguments: Any) -> None:
    """A command of `peft-ext`; what it prints as an error is raised."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        status = cli.main([str(argument) for argument in arguments])
    if status:
        raise ValueError(errors.getvalue().strip())


def inspected(case: Case) -> None:
    case.saved()
    _run("inspect", case.folder / "adapter")


def merged_files(case: Case) -> None:
    expected, folder = case.logits(case.saved()), case.folder
    _run("merge", folder / "base", folder / "adapter", folder / "merged")
    close(case.logits(AutoModelForCausalLM.from_pretrained(folder / "merged").eval()), expected)


def as_lora(case: Case) -> None:
    case.saved()
    _run("export", "--to", "lora", "--rank", 32, case.folder / "adapter", case.folder / "lora")
    PeftModel.from_pretrained(case.base(), case.folder / "lora")


def as_patch(case: Case) -> None:
    expected, folder = case.logits(case.saved()), case.folder
    _run("export", "--to", "patch", folder / "adapter", folder / "patch")
    patch = next((folder / "patch").glob("*.safetensors"))
    _run("merge", folder / "base", patch, folder / "patched")
    close(case.logits(AutoModelForCausalLM.from_pretrained(folder / "patched").eval()), expected)
