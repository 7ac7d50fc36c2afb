"""An adapter that a checkpoint brings is loaded as it was saved, and no entry is chosen for it on the way."""

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils import load_peft_weights
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import peft_ext.sparse.choose.planning
import peft_ext.sparse.selection.plan
from peft_ext import hotswap_adapter
from peft_ext.sparse.support import Support
from tests.contract._common import METHODS, adapted, adapter_bits, assert_equal_bits, fill, layers_of
from tests.contract._ways import by_peft, by_transformers


OPTIONS = {
    **{method: (method, {}) for method in METHODS},
    "of the smallest": ("neuroada", {"selection": "reverse"}),
    "at random": ("neuroada", {"selection": "random", "neuron_ratio": 0.5}),
    "per layer": ("neuroada", {"selection": "magnitude_layer"}),
}
EVERY = pytest.mark.parametrize(("method", "options"), OPTIONS.values(), ids=OPTIONS)


@pytest.fixture
def choosing_fails(monkeypatch):
    """A function from whose call on nothing may be chosen."""

    def refuse(*args, **kwargs):
        raise AssertionError("entries are chosen while an adapter is loaded")

    def start():
        monkeypatch.setattr(peft_ext.sparse.choose.planning, "select_supports", refuse)
        for name in ("top_per_neuron", "top_overall"):
            monkeypatch.setattr(peft_ext.sparse.selection.plan, name, refuse)

    return start


def _injected(base, folder, low_cpu_mem_usage):
    state = {k.removeprefix("base_model.model."): t for k, t in load_peft_weights(str(folder), device="cpu").items()}
    config = PeftConfig.from_pretrained(folder)
    model = inject_adapter_in_model(config, base, state_dict=state, low_cpu_mem_usage=low_cpu_mem_usage)
    set_peft_model_state_dict(model, state, low_cpu_mem_usage=low_cpu_mem_usage)
    return model


def _with_a_config(base, folder, **options):
    return by_peft(base, folder, config=PeftConfig.from_pretrained(folder), **options)


def _by_auto_class(base, folder, **options):
    return AutoPeftModelForCausalLM.from_pretrained(folder, **options)


WAYS = [by_peft, _with_a_config, _by_auto_class, by_transformers, _injected]


@EVERY
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_in(tiny, tmp_path, choosing_fails, way, low_cpu_mem_usage, method, options):
    model = adapted(tiny("llama"), method, task_type="CAUSAL_LM", **options)
    model.save_pretrained(tmp_path)
    choosing_fails()
    loaded = way(tiny("llama"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_equal_bits(adapter_bits(loaded), adapter_bits(model))


@EVERY
def test_second_adapter_swap_and_resume(tiny, tmp_path, choosing_fails, method, options):
    model = adapted(tiny("llama"), method, task_type="CAUSAL_LM", **options)
    model.save_pretrained(tmp_path / "first")
    expected = adapter_bits(model)
    fill(model, seed=9).save_pretrained(tmp_path / "other")
    choosing_fails()
    model.load_adapter(tmp_path / "first", "second")
    assert_equal_bits(adapter_bits(model, "second"), expected)
    hotswap_adapter(model, str(tmp_path / "other"), "second")
    assert_equal_bits(adapter_bits(model, "second"), adapter_bits(model))
    arguments = TrainingArguments(str(tmp_path / "run"), report_to=[], use_cpu=True)
    Trainer(model, arguments)._load_from_checkpoint(str(tmp_path / "first"))
    assert_equal_bits(adapter_bits(model), expected)


@pytest.mark.parametrize("method", ["neuroada", "gps over the network"])
def test_call_of_transformers_that_began_before_we_were_imported(tiny, tmp_path, choosing_fails, method):
    """With autoload it imports PEFT, which imports us, while it runs: there is no wrapper around it yet."""
    model = adapted(tiny("llama"), method)
    model.save_pretrained(tmp_path)
    choosing_fails()
    base = tiny("llama")
    type(base).load_adapter.__wrapped__(base, str(tmp_path))
    assert_equal_bits(adapter_bits(base), adapter_bits(model))


def test_folder_of_an_adapter_in_transformers(tiny, tmp_path, choosing_fails):
    model = adapted(tiny("llama"), "neuroada", task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path)
    choosing_fails()
    assert_equal_bits(adapter_bits(AutoModelForCausalLM.from_pretrained(tmp_path)), adapter_bits(model))


@pytest.mark.parametrize("method", ["neuroada", "gps over the network"])
def test_saved_config_is_a_recipe_for_a_new_adapter(tiny, tmp_path, method):
    """Through `get_peft_model` nothing is loaded, so it chooses: for another model, other entries."""
    get_peft_model(tiny("llama"), METHODS[method]()).save_pretrained(tmp_path)
    again, fresh = (
        get_peft_model(_mirrored(tiny("llama")), config)
        for config in (PeftConfig.from_pretrained(tmp_path), METHODS[method]())
    )
    assert_equal_bits(adapter_bits(again), adapter_bits(fresh))


def _mirrored(base):
    for parameter in base.parameters():
        parameter.data = parameter.data.flip(-1)
    return base


def test_state_dict_brings_the_entries_of_a_new_adapter(tiny, choosing_fails):
    """Not its values, which PEFT's users load afterwards: until then it is a new adapter, which can be trained."""
    model = adapted(tiny("llama"), "neuroada", selection="random_network")
    choosing_fails()
    config = METHODS["neuroada"](selection="random_network")
    injected = inject_adapter_in_model(config, tiny("llama"), state_dict=_state(model))
    expected = adapter_bits(model)
    for name, tensor in adapter_bits(injected).items():
        wanted = torch.zeros_like(tensor) if name.endswith(".weight") else expected[name]
        assert torch.equal(tensor, wanted), name
    sizes = injected.peft_config["default"].support_sizes
    assert sizes == model.peft_config["default"].support_sizes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:, :1], r"shape \(\d+, 1\) for module '.*', where the config leads to \(\d+, 2\)"),
        (lambda t: t.long().flip(1), "corrupted entries for module .*not strictly increasing"),
        (lambda t: t.long() + 1000, "corrupted entries for module .*indices span"),
    ],
    ids=["another k", "not sorted", "out of range"],
)
def test_entries_that_do_not_fit_are_refused(tiny, change, message):
    state = _state(adapted(tiny("llama"), "neuroada"))
    key = [key for key in state if key.endswith("indices")][-1]
    base = tiny("llama")
    with pytest.raises(ValueError, match=message):
        inject_adapter_in_model(METHODS["neuroada"](), base, state_dict={**state, key: change(state[key])})
    assert not layers_of(base) and not hasattr(base, "peft_config")


def _state(model):
    return {key.removeprefix("base_model.model."): t for key, t in get_peft_model_state_dict(model).items()}


def test_a_checkpoint_is_compared_with_the_base_once(tiny, ids, tmp_path, monkeypatch):
    """And the table that only products need is not made; a forward makes it, and compares nothing again."""
    model = adapted(tiny("llama"), "neuroada")
    model.save_pretrained(tmp_path)
    compared, mismatch = [], Support.mismatch
    monkeypatch.setattr(Support, "mismatch", lambda *args, **kw: compared.append(args) or mismatch(*args, **kw))
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)
    deltas = [layer.deltas["default"] for layer in layers_of(loaded).values()]
    assert all(delta.checked and delta._transposed_entries is None for delta in deltas)
    loaded(ids, labels=ids).loss.backward()
    assert len(compared) == len(deltas) and all(delta.weight.grad.any() for delta in deltas)


def test_what_waits_for_a_file_has_no_number_of_its_own(tiny):
    model = adapted(tiny("llama"), "neuroada")
    waiting = inject_adapter_in_model(
        METHODS["neuroada"](), tiny("llama"), state_dict=_state(model), low_cpu_mem_usage=True
    )
    tensors = get_peft_model_state_dict(waiting).values()
    assert tensors and all(tensor.is_meta for tensor in tensors)


def test_a_compiled_model_takes_the_entries_of_one_that_was_not(tiny):
    targets = ["q_proj", "down_proj"]
    state = _state(adapted(tiny("llama"), "neuroada", target_modules=targets))
    config = METHODS["neuroada"](target_modules=targets)
    compiled = inject_adapter_in_model(config, torch.compile(tiny("llama")), state_dict=state)
    found = {key.removeprefix("_orig_mod."): t for key, t in get_peft_model_state_dict(compiled).items()}
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state if key.endswith("indices"))


def test_a_compiled_part_of_a_model_takes_its_entries(tiny):
    def build():
        model = tiny("llama")
        model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp)
        return model

    targets = ["q_proj", "down_proj"]
    state = _state(adapted(build(), "neuroada", target_modules=targets))
    injected = inject_adapter_in_model(METHODS["neuroada"](target_modules=targets), build(), state_dict=state)
    found = get_peft_model_state_dict(injected)
    assert found.keys() == state.keys() and any("_orig_mod" in key for key in state)
    assert all(torch.equal(found[key], state[key]) for key in state if key.endswith("indices"))
