"""What users do with an adapter, each as a function that takes a method and checks the outcome."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from peft_ext import cli, hotswap_adapter, rescale_adapter_scale

from ._methods import METHODS
from ._trainers import model


IDS = torch.arange(6, 14)[None]


def logits(adapted: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = adapted(IDS, **options).logits
    return found


def fill(adapted: Any, seed: int = 1) -> Any:
    """Give the active adapter values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    return adapted.eval()


def adapted(method: str, base: Any = None, seed: int = 1) -> Any:
    base = model() if base is None else base
    return fill(get_peft_model(base, METHODS[method](base, task_type="CAUSAL_LM")), seed)


def saved(method: str, folder: Path, seed: int = 1) -> Any:
    """An adapter in `folder / "adapter"` and its base in `folder / "base"`; returns the adapted model."""
    model().save_pretrained(folder / "base")
    found = adapted(method, AutoModelForCausalLM.from_pretrained(folder / "base"), seed)
    found.save_pretrained(folder / "adapter")
    return found


def two(method: str) -> Any:
    """Two adapters with different values, the first active."""
    found = adapted(method)
    config = METHODS[method](model(), task_type="CAUSAL_LM")
    found.add_adapter("second", config)
    found.set_adapter("second")
    fill(found, seed=2)
    found.set_adapter("default")
    return found


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def save_and_load(method: str, folder: Path) -> None:
    expected = logits(saved(method, folder))
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(model(), folder / "adapter", **options)
        assert torch.equal(logits(loaded), expected)


def auto_model(method: str, folder: Path) -> None:
    expected = logits(saved(method, folder))
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")), expected)


def of_transformers(method: str, folder: Path) -> None:
    expected = logits(saved(method, folder))
    plain = model().eval()
    plain.load_adapter(str(folder / "adapter"))
    assert torch.equal(logits(plain), expected)
    plain.disable_adapters()
    assert torch.equal(logits(plain), logits(model().eval()))


def switch_and_delete(method: str, folder: Path) -> None:
    found = two(method)
    first = logits(found)
    found.set_adapter("second")
    second = logits(found)
    assert not torch.equal(first, second)
    found.set_adapter("default")
    assert torch.equal(logits(found), first)
    found.delete_adapter("second")
    assert torch.equal(logits(found), first)


def disable(method: str, folder: Path) -> None:
    found = adapted(method)
    with found.disable_adapter():
        assert torch.equal(logits(found), logits(model().eval()))


def mixed_batch(method: str, folder: Path) -> None:
    found = two(method)
    expected = [logits(found)]
    found.set_adapter("second")
    expected += [logits(found), logits(model().eval())]
    with torch.no_grad():
        mixed = found(IDS.repeat(3, 1), adapter_names=["default", "second", "__base__"]).logits
    close(mixed, torch.cat(expected))


def merge_and_unmerge(method: str, folder: Path) -> None:
    found = adapted(method)
    before = {name: p.clone() for name, p in found.named_parameters()}
    expected = logits(found)
    found.merge_adapter()
    close(logits(found), expected)
    found.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in found.named_parameters())


def merge_and_unload(method: str, folder: Path) -> None:
    found = adapted(method)
    expected = logits(found)
    close(logits(found.merge_and_unload()), expected)


def weighted(method: str, folder: Path) -> None:
    found = two(method)
    found.add_weighted_adapter(["default", "second"], [1.0, 0.0], "sum", combination_type="linear")
    expected = logits(found)
    found.set_adapter("sum")
    close(logits(found), expected)


def hot_swap(method: str, folder: Path) -> None:
    expected = logits(saved(method, folder, seed=3))
    found = adapted(method)
    hotswap_adapter(found, folder / "adapter", "default")
    assert torch.equal(logits(found), expected)


def scale(method: str, folder: Path) -> None:
    found = adapted(method)
    with rescale_adapter_scale(found, 0.0):
        close(logits(found), logits(model().eval()))


def compiled(method: str, folder: Path) -> None:
    found = adapted(method)
    expected = logits(found)
    close(logits(torch.compile(found, backend="aot_eager")), expected)


def checkpointing(method: str, folder: Path) -> None:
    gradients = []
    for enabled in (False, True):
        found = adapted(method).train()
        if enabled:
            found.gradient_checkpointing_enable({"use_reentrant": False})
        found(IDS, labels=IDS.masked_fill(IDS < 10, -100)).loss.backward()
        gradients.append([p.grad for p in found.parameters() if p.requires_grad])
    for plain, again in zip(*gradients, strict=True):
        close(again, plain)


def generation(method: str, folder: Path) -> None:
    found = adapted(method)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(
        found.generate(input_ids=IDS, **options), found.generate(input_ids=IDS, use_cache=False, **options)
    )


def copies(method: str, folder: Path) -> None:
    found = adapted(method)
    expected = logits(found)
    assert torch.equal(logits(copy.deepcopy(found)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(found))), expected)


def exported(method: str, folder: Path) -> None:
    found = adapted(method)
    program = torch.export.export(found, (), {"input_ids": IDS, "use_cache": False})
    close(program.module()(input_ids=IDS, use_cache=False).logits, logits(found))


def _run(folder: Path, *arguments: Any) -> None:
    """A command of `peft-ext`; what it prints as an error is raised."""
    import contextlib
    import io

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        status = cli.main([str(argument) for argument in arguments])
    if status:
        raise ValueError(errors.getvalue().strip())


def inspected(method: str, folder: Path) -> None:
    saved(method, folder)
    _run(folder, "inspect", folder / "adapter")


def merged_files(method: str, folder: Path) -> None:
    expected = logits(saved(method, folder))
    _run(folder, "merge", folder / "base", folder / "adapter", folder / "merged")
    close(logits(AutoModelForCausalLM.from_pretrained(folder / "merged").eval()), expected)


def as_lora(method: str, folder: Path) -> None:
    saved(method, folder)
    _run(folder, "export", "--to", "lora", "--rank", 32, folder / "adapter", folder / "lora")
    PeftModel.from_pretrained(model(), folder / "lora")


def as_patch(method: str, folder: Path) -> None:
    expected = logits(saved(method, folder))
    _run(folder, "export", "--to", "patch", folder / "adapter", folder / "patch")
    patch = next((folder / "patch").glob("*.safetensors"))
    _run(folder, "merge", folder / "base", patch, folder / "patched")
    close(logits(AutoModelForCausalLM.from_pretrained(folder / "patched").eval()), expected)


VERBS = {
    "`save_pretrained`, `PeftModel.from_pretrained`": save_and_load,
    "`AutoPeftModelForCausalLM.from_pretrained`": auto_model,
    "`load_adapter` of transformers": of_transformers,
    "`add_adapter`, `set_adapter`, `delete_adapter`": switch_and_delete,
    "`disable_adapter`": disable,
    "several adapters in one batch (`adapter_names`)": mixed_batch,
    "`merge_adapter`, `unmerge_adapter`": merge_and_unmerge,
    "`merge_and_unload`": merge_and_unload,
    "`add_weighted_adapter`": weighted,
    "`hotswap_adapter`": hot_swap,
    "`rescale_adapter_scale`": scale,
    "`torch.compile`": compiled,
    "`torch.export`": exported,
    "gradient checkpointing": checkpointing,
    "`generate`": generation,
    "`copy.deepcopy`, `pickle`": copies,
    "`peft-ext inspect`": inspected,
    "`peft-ext merge`": merged_files,
    "`peft-ext export --to lora`": as_lora,
    "`peft-ext export --to patch`": as_patch,
}
