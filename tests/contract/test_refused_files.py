"""Malformed adapters × ways of loading: each is refused with the reason, and the model keeps every bit."""

import copy
import re
import shutil

import pytest
import torch
from peft import PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.contract._common import ALL_METHODS, adapted, fill, layers_of, logits
from tests.contract._damage import (
    WEIGHTS,
    add,
    as_wide,
    cast,
    cut,
    cut_config,
    cut_in_the_header,
    drop,
    edit,
    empty,
    flip_a_bit,
    options,
    replace,
    with_number,
    without_weights,
)
from tests.contract._untouched import Untouched
from tests.contract._ways import again, as_a_second, by_peft, by_transformers, in_little_memory, swapped


LAYERS = "base_model.model.model.layers"
Q = f"{LAYERS}.0.self_attn.q_proj.neuroada_delta"
DOWN = f"{LAYERS}.1.mlp.down_proj.neuroada_delta"
STEERING = f"{LAYERS}.0.steering.mores_steering"
# Of the parts of Llama that the damages name.
OPTIONS = {"neuroada": {"k": 2, "target_modules": ["q_proj", "up_proj", "down_proj"]}, "mores": {}}


def _swap_modules(tensors):
    for part in ("weight", "indices", "fingerprint"):
        up = f"{Q.replace('self_attn.q_proj', 'mlp.up_proj')}.{part}"
        tensors[up], tensors[f"{DOWN}.{part}"] = tensors[f"{DOWN}.{part}"], tensors[up]


# How to damage a file of any method, one of NeuroAda or one of MoReS, and what the error must name.
FILES = {
    "cut": (cut, WEIGHTS),
    "cut in the header": (cut_in_the_header, WEIGHTS),
    "empty": (empty, WEIGHTS),
    "flipped bit": (flip_a_bit, f"{WEIGHTS}.*checksum"),
}
TENSORS = {
    "no values": (drop(f"{Q}.weight"), "q_proj.neuroada_delta"),
    "no indices": (drop(f"{Q}.indices"), "q_proj.neuroada_delta"),
    "no fingerprint": (drop(f"{Q}.fingerprint"), "q_proj.neuroada_delta"),
    "no module": (edit(lambda t: [t.pop(k) for k in list(t) if k.startswith(DOWN)]), "down_proj.neuroada_delta"),
    "swapped modules": (edit(_swap_modules), "proj.neuroada_delta"),
    "swapped shape": (replace(f"{Q}.weight", torch.t), "q_proj.neuroada_delta"),
    "longer": (replace(f"{Q}.weight", lambda t: t.repeat(2, 1)), "q_proj.neuroada_delta"),
    "index out of range": (replace(f"{Q}.indices", with_number(32, 11)), "q_proj.neuroada_delta"),
    "negative index": (replace(f"{Q}.indices", as_wide(with_number(-1, 10))), "q_proj.neuroada_delta"),
    "unsorted indices": (replace(f"{Q}.indices", lambda t: t.flip(1)), "q_proj.neuroada_delta"),
    "repeated indices": (replace(f"{Q}.indices", torch.zeros_like), "q_proj.neuroada_delta"),
    "other indices": (
        replace(f"{Q}.indices", lambda t: torch.arange(t.shape[1]).to(t.dtype).repeat(len(t), 1)),
        "q_proj.neuroada_delta",
    ),
    "indices that wrap": (
        replace(f"{Q}.indices", lambda t: t.long() + 2**32),
        r"q_proj.neuroada_delta.*indices' is corrupted: indices span",
    ),
    "fractional indices": (replace(f"{Q}.indices", lambda t: t + 0.5), "where whole numbers belong"),
    "NaN": (
        replace(f"{Q}.weight", with_number(torch.nan)),
        "q_proj.neuroada_delta.*weight' has values that are not finite",
    ),
    "infinite value": (
        replace(f"{DOWN}.weight", with_number(-torch.inf)),
        "down_proj.neuroada_delta.*weight' has values that are not finite",
    ),
    "whole values": (replace(f"{Q}.weight", lambda t: t.to(torch.int32)), "where floating-point numbers belong"),
    "complex values": (replace(f"{Q}.weight", lambda t: t.to(torch.complex64)), "where floating-point numbers belong"),
    "cast to fp16": (cast(torch.float16), "all cast to one type"),
    "cast to bf16": (cast(torch.bfloat16), "all cast to one type"),
    "fingerprint of zeros": (replace(f"{Q}.fingerprint", torch.zeros_like), "fingerprint' is corrupted"),
    "fingerprint of int32": (replace(f"{Q}.fingerprint", lambda t: t.to(torch.int32)), "fingerprint' is corrupted"),
    "unknown dtype": (replace(f"{Q}.fingerprint", with_number(99, 2)), "fingerprint' is corrupted: it has 99"),
    "infinite sums": (replace(f"{Q}.fingerprint", with_number(0x7FF0 << 48, 4)), "fingerprint' is corrupted: its sum"),
    "frozen tensor": (add("base_model.model.model.norm.weight", torch.ones(32)), "norm.weight', which is no part"),
    "target's weight": (
        add(Q.replace("neuroada_delta", "base_layer.weight"), torch.ones(32, 32)),
        "self_attn.q_proj.base_layer.weight', which is no part",
    ),
    "unknown part": (add(f"{Q}.more", torch.ones(2)), "neuroada_delta.*more', which has no place"),
}
STEERING_TENSORS = {
    "a tensor missing": (drop(f"{STEERING}.weight"), "lacks"),
    "a tensor too many": (add(f"{STEERING}.raw_down", torch.ones(32, 2)), "no place"),
    "another shape": (add(f"{STEERING}.weight", torch.ones(3, 32)), "shape"),
    "not finite": (replace(f"{STEERING}.bias", with_number(torch.nan)), "not finite"),
    "infinite": (replace(f"{STEERING}.raw_up", with_number(torch.inf)), "not finite"),
    "whole numbers": (replace(f"{STEERING}.weight", torch.Tensor.int), "floating-point"),
    "frozen tensor": TENSORS["frozen tensor"],
    "no full rank": (replace(f"{STEERING}.raw_up", torch.ones_like), "dependent columns"),
}
# Refused only where the folder's config is read.
CONFIGS = {
    "config cut short": (cut_config, ""),
    "no weights": (without_weights, ""),
    "another k": (options(k=3), r"shape \(32, 2\).*\(32, 3\)"),
    "fewer targets": (options(target_modules=["q_proj"]), "proj.neuroada_delta.*no place in this model"),
}
STEERING_CONFIGS = {
    "another rank": (options(rank=3), "shape"),
    "another layer": (options(target_modules=["model.layers.7"]), "no place that MoReS can steer"),
}
DAMAGES = {
    "neuroada": {**FILES, **TENSORS, **CONFIGS},
    "mores": {"cut": FILES["cut"], "flipped bit": FILES["flipped bit"], **STEERING_TENSORS, **STEERING_CONFIGS},
}


@pytest.fixture(scope="module")
def wholes(tiny, tmp_path_factory):
    """Function: method to a folder with an adapter as it was saved."""
    folder = tmp_path_factory.mktemp("whole")
    for method in OPTIONS:
        adapted(tiny("llama"), method, seed=3, **OPTIONS[method]).save_pretrained(folder / method)
    return lambda method: folder / method


@pytest.fixture
def base(tiny):
    return tiny("llama").requires_grad_(False)


def _created(base, whole, method):
    return adapted(base, method, **OPTIONS[method])


def _loaded(base, whole, method):
    return PeftModel.from_pretrained(base, whole)


def _added(base, whole, method):
    base.add_adapter(ALL_METHODS[method](**OPTIONS[method]))
    return fill(base)


def _injected(base, whole, method):
    return fill(inject_adapter_in_model(ALL_METHODS[method](**OPTIONS[method]), base))


def _bare(base, whole, method):
    return base


def _state_dict(folder):
    return {key.removeprefix("base_model.model."): tensor for key, tensor in load_file(folder / WEIGHTS).items()}


def _set_state_dict(model, folder):
    set_peft_model_state_dict(model, _state_dict(folder))
    return model


def _load_state_dict(model, folder):
    config = ALL_METHODS["neuroada"](**OPTIONS["neuroada"])
    model.load_adapter(peft_config=config, adapter_state_dict=_state_dict(folder))
    return model


# Ways of loading: what the model is before, and the call.
READING_CONFIGS = {
    "first": (_bare, by_peft),
    "first with little memory": (_bare, in_little_memory),
    "second": (_created, as_a_second),
    "first by transformers": (_bare, by_transformers),
    "second by transformers": (_added, as_a_second),
}
WAYS = {
    **READING_CONFIGS,
    "again": (_loaded, again),
    "over a created one": (_created, again),
    "swapped": (_loaded, swapped),
}
STATE_DICTS = {
    "set": (_injected, _set_state_dict),
    "by transformers, a state dict": (_bare, _load_state_dict),
}


def cells():
    for damage in DAMAGES["neuroada"]:
        ways = READING_CONFIGS if damage in CONFIGS else WAYS if damage in FILES else {**WAYS, **STATE_DICTS}
        yield from (("neuroada", damage, way) for way in ways)
    yield from (("mores", damage, way) for damage in DAMAGES["mores"] for way in READING_CONFIGS)


@pytest.mark.parametrize(("method", "damage", "way"), list(cells()))
def test_refused(method, damage, way, wholes, base, ids, tmp_path):
    shutil.copytree(wholes(method), tmp_path, dirs_exist_ok=True)
    spoil, words = DAMAGES[method][damage]
    spoil(tmp_path)
    prepare, load = {**WAYS, **STATE_DICTS}[way]
    model, inputs = prepare(base, wholes(method), method), {"input_ids": ids}
    expected, active = logits(model, inputs), _active(model)
    with Untouched(model), pytest.raises((ValueError, OSError)) as error:
        load(model, tmp_path)
    assert re.search(words, str(error.value)), str(error.value)
    assert _active(model) == active
    assert torch.equal(logits(model, inputs), expected)


def _active(model):
    return {name: layer.active_adapters for name, layer in layers_of(model).items()}


@pytest.mark.parametrize("damage", [*FILES, *TENSORS])
def test_refused_by_from_pretrained_of_transformers(damage, wholes, tmp_path):
    shutil.copytree(wholes("neuroada"), tmp_path, dirs_exist_ok=True)
    spoil, words = DAMAGES["neuroada"][damage]
    spoil(tmp_path)
    with pytest.raises(ValueError) as error:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert re.search(words, str(error.value)), str(error.value)


@pytest.mark.parametrize("way", WAYS)
def test_a_good_file_loads_after_a_bad_one_whose_error_names_it(way, wholes, base, ids, tmp_path):
    shutil.copytree(wholes("neuroada"), tmp_path, dirs_exist_ok=True)
    DAMAGES["neuroada"]["NaN"][0](tmp_path)
    prepare, load = WAYS[way]
    expected = logits(_loaded(copy.deepcopy(base), wholes("neuroada"), "neuroada"), {"input_ids": ids})
    model = prepare(base, wholes("neuroada"), "neuroada")
    with pytest.raises(ValueError, match=str(tmp_path)):
        load(model, tmp_path)
    assert torch.equal(logits(load(model, wholes("neuroada")), {"input_ids": ids}), expected)


@pytest.mark.parametrize(
    ("method", "way"),
    [*(("neuroada", way) for way in (*WAYS, *STATE_DICTS)), *(("mores", way) for way in READING_CONFIGS)],
)
def test_tensors_that_belong_to_nothing_are_named_and_ignored(method, way, wholes, base, ids, tmp_path):
    shutil.copytree(wholes(method), tmp_path, dirs_exist_ok=True)
    add("foo", torch.ones(3))(tmp_path)
    add("bar", torch.ones(3))(tmp_path)
    expected = logits(_loaded(copy.deepcopy(base), wholes(method), method), {"input_ids": ids})
    prepare, load = {**WAYS, **STATE_DICTS}[way]
    model = prepare(base, wholes(method), method)
    with pytest.warns(UserWarning, match=r"belong to nothing in this model and are ignored: '.*bar', '.*foo'"):
        model = load(model, tmp_path)
    assert torch.equal(logits(model, {"input_ids": ids}), expected)


def test_base_that_trains_does_so_after_a_refused_file(llama, tiny, tmp_path):
    adapted(tiny("llama"), "neuroada").save_pretrained(tmp_path)
    drop(f"{Q}.weight")(tmp_path)
    llama.lm_head.requires_grad_(False)
    with Untouched(llama), pytest.raises(ValueError):
        PeftModel.from_pretrained(llama, tmp_path)
    assert llama.model.norm.weight.requires_grad and not llama.lm_head.weight.requires_grad
