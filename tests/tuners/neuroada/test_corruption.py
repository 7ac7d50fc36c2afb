"""Malformed adapters × ways of loading: each is refused with the reason, and the model keeps every bit."""

import copy
import re
import shutil

import pytest
import torch
from peft import PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_ext import NeuroAdaConfig, hotswap_adapter
from tests.tuners.neuroada._common import Untouched, adapted, fill, logits, wrapped


WEIGHTS = "adapter_model.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj.neuroada_delta"
DOWN = "base_model.model.model.layers.1.mlp.down_proj.neuroada_delta"


def _cut(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) * 2 // 3])


def _cut_in_the_header(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])


def _empty(folder):
    (folder / WEIGHTS).write_bytes(b"")


def _flip_a_byte(folder):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[len(content) // 2] ^= 0x10
    (folder / WEIGHTS).write_bytes(content)


def _edit(change):
    """Another tool rewrites the file: without our checksum, and not as it was."""

    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / WEIGHTS, {"format": "pt"})

    return damage


def _drop(key):
    return _edit(lambda tensors: tensors.pop(key))


def _replace(key, function):
    return _edit(lambda tensors: tensors.update({key: function(tensors[key])}))


def _swap_modules(tensors):
    for part in ("weight", "indices", "fingerprint"):
        up = f"{Q.replace('self_attn.q_proj', 'mlp.up_proj')}.{part}"
        tensors[up], tensors[f"{DOWN}.{part}"] = tensors[f"{DOWN}.{part}"], tensors[up]


def _out_of_range(indices):
    indices = indices.to(torch.int32)
    indices[5, -1] = 32
    return indices.to(torch.uint8)


def _negative(indices):
    indices = indices.to(torch.int32)
    indices[5, 0] = -1
    return indices


def _other_indices(indices):
    return torch.arange(indices.shape[1]).to(indices.dtype).repeat(len(indices), 1)


def _with(value, place=0):
    """A change of one number of a tensor."""

    def change(tensor):
        tensor.view(-1)[place] = value
        return tensor

    return change


def _cast(dtype):
    return _edit(lambda tensors: tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()}))


def _add(key, tensor):
    return _edit(lambda tensors: tensors.update({key: tensor}))


# How to damage a file, and what the error must name.
DAMAGES = {
    "cut": (_cut, WEIGHTS),
    "cut in the header": (_cut_in_the_header, WEIGHTS),
    "empty": (_empty, WEIGHTS),
    "flipped byte": (_flip_a_byte, WEIGHTS),
    "no values": (_drop(f"{Q}.weight"), "q_proj.neuroada_delta"),
    "no indices": (_drop(f"{Q}.indices"), "q_proj.neuroada_delta"),
    "no fingerprint": (_drop(f"{Q}.fingerprint"), "q_proj.neuroada_delta"),
    "no module": (_edit(lambda t: [t.pop(k) for k in list(t) if k.startswith(DOWN)]), "down_proj.neuroada_delta"),
    "swapped modules": (_edit(_swap_modules), "proj.neuroada_delta"),
    "swapped shape": (_replace(f"{Q}.weight", torch.t), "q_proj.neuroada_delta"),
    "longer": (_replace(f"{Q}.weight", lambda t: t.repeat(2, 1)), "q_proj.neuroada_delta"),
    "index out of range": (_replace(f"{Q}.indices", _out_of_range), "q_proj.neuroada_delta"),
    "negative index": (_replace(f"{Q}.indices", _negative), "q_proj.neuroada_delta"),
    "unsorted indices": (_replace(f"{Q}.indices", lambda t: t.flip(1)), "q_proj.neuroada_delta"),
    "repeated indices": (_replace(f"{Q}.indices", torch.zeros_like), "q_proj.neuroada_delta"),
    "other indices": (_replace(f"{Q}.indices", _other_indices), "q_proj.neuroada_delta"),
    "indices that wrap": (
        _replace(f"{Q}.indices", lambda t: t.long() + 2**32),
        r"q_proj.neuroada_delta.*indices' is corrupted: indices span",
    ),
    "fractional indices": (_replace(f"{Q}.indices", lambda t: t + 0.5), "where whole numbers belong"),
    "NaN": (
        _replace(f"{Q}.weight", _with(torch.nan)),
        "q_proj.neuroada_delta.*weight' has values that are not finite",
    ),
    "infinite value": (
        _replace(f"{DOWN}.weight", _with(-torch.inf)),
        "down_proj.neuroada_delta.*weight' has values that are not finite",
    ),
    "whole values": (_replace(f"{Q}.weight", lambda t: t.to(torch.int32)), "where floating-point numbers belong"),
    "complex values": (
        _replace(f"{Q}.weight", lambda t: t.to(torch.complex64)),
        "where floating-point numbers belong",
    ),
    "cast to fp16": (_cast(torch.float16), "all cast to one type"),
    "cast to bf16": (_cast(torch.bfloat16), "all cast to one type"),
    "fingerprint of zeros": (_replace(f"{Q}.fingerprint", torch.zeros_like), "fingerprint' is corrupted"),
    "fingerprint of int32": (_replace(f"{Q}.fingerprint", lambda t: t.to(torch.int32)), "fingerprint' is corrupted"),
    "unknown dtype": (_replace(f"{Q}.fingerprint", _with(99, 2)), "fingerprint' is corrupted: it has 99"),
    "infinite sums": (_replace(f"{Q}.fingerprint", _with(0x7FF0 << 48, 4)), "fingerprint' is corrupted: its sums"),
    "frozen tensor": (
        _add("base_model.model.model.norm.weight", torch.ones(32)),
        "model.norm.weight', which is no part",
    ),
    "target's weight": (
        _add(Q.replace("neuroada_delta", "base_layer.weight"), torch.ones(32, 32)),
        "self_attn.q_proj.base_layer.weight', which is no part",
    ),
    "unknown part": (_add(f"{Q}.more", torch.ones(2)), "neuroada_delta.*more', which has no place"),
}


# Of the parts of Llama that the damages name.
CONFIG_OF = {"k": 2, "target_modules": ["q_proj", "up_proj", "down_proj"]}


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A folder with an adapter as it was saved."""
    folder = tmp_path_factory.mktemp("whole")
    adapted(tiny("llama"), seed=3, **CONFIG_OF).save_pretrained(folder)
    return folder


@pytest.fixture(params=DAMAGES)
def damaged(request, whole, tmp_path):
    """A folder with a damaged adapter, what an error about it must name, and whether its tensors can be read."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    damage, word = DAMAGES[request.param]
    damage(tmp_path)
    return tmp_path, word, request.param not in ("cut", "cut in the header", "empty", "flipped byte")


@pytest.fixture
def base(tiny):
    return tiny("llama").requires_grad_(False)


def _state_dict(folder):
    return {key.removeprefix("base_model.model."): tensor for key, tensor in load_file(folder / WEIGHTS).items()}


def _with_our_adapter(base, whole):
    base.add_adapter(NeuroAdaConfig(**CONFIG_OF))
    return fill(base)


def _load_state_dict(model, folder):
    model.load_adapter(peft_config=NeuroAdaConfig(**CONFIG_OF), adapter_state_dict=_state_dict(folder))


# Ways of loading: what the model is before, of a base and a whole adapter, and the call.
WAYS = {
    "first": (lambda base, whole: base, PeftModel.from_pretrained),
    "first with little memory": (
        lambda base, whole: base,
        lambda base, folder: PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True),
    ),
    "second": (
        lambda base, whole: adapted(base, **CONFIG_OF),
        lambda model, folder: model.load_adapter(folder, "second"),
    ),
    "again": (PeftModel.from_pretrained, lambda model, folder: model.load_adapter(folder, "default")),
    "over a created one": (
        lambda base, whole: adapted(base, **CONFIG_OF),
        lambda model, folder: model.load_adapter(folder, "default"),
    ),
    "swapped": (PeftModel.from_pretrained, lambda model, folder: hotswap_adapter(model, str(folder))),
    "first by transformers": (lambda base, whole: base, lambda base, folder: base.load_adapter(str(folder))),
    "second by transformers": (
        _with_our_adapter,
        lambda model, folder: model.load_adapter(str(folder), adapter_name="second"),
    ),
}
STATE_DICT_WAYS = {
    "set": (
        lambda base, whole: fill(inject_adapter_in_model(NeuroAdaConfig(**CONFIG_OF), base)),
        lambda model, folder: set_peft_model_state_dict(model, _state_dict(folder)),
    ),
    "by transformers": (lambda base, whole: base, _load_state_dict),
}


def _assert_refused(model, load, folder, word, ids):
    expected = logits(model, ids)
    adapters, active = set(getattr(model, "peft_config", {})), _active(model)
    with Untouched(model), pytest.raises(ValueError) as error:
        load(model, folder)
    assert re.search(word, str(error.value)), str(error.value)
    assert set(getattr(model, "peft_config", {})) == adapters and _active(model) == active
    assert torch.equal(logits(model, ids), expected)


def _active(model):
    return {name: layer.active_adapters for name, layer in wrapped(model).items()}


@pytest.mark.parametrize("way", WAYS)
def test_malformed_file(damaged, whole, base, ids, way):
    folder, word, _ = damaged
    prepare, load = WAYS[way]
    _assert_refused(prepare(base, whole), load, folder, word, ids)


@pytest.mark.parametrize("way", STATE_DICT_WAYS)
def test_malformed_state_dict(damaged, whole, base, ids, way):
    folder, word, is_readable = damaged
    if is_readable:  # a state dict is not a file
        prepare, load = STATE_DICT_WAYS[way]
        _assert_refused(prepare(base, whole), load, folder, word, ids)


def test_malformed_file_through_from_pretrained_of_transformers(damaged):
    folder, word, _ = damaged
    with pytest.raises(ValueError) as error:
        AutoModelForCausalLM.from_pretrained(folder)
    assert re.search(word, str(error.value)), str(error.value)


def test_errors_name_the_file(whole, base, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    DAMAGES["NaN"][0](tmp_path)
    for way in ("first", "swapped", "first by transformers"):
        prepare, load = WAYS[way]
        with pytest.raises(ValueError, match=str(tmp_path)):
            load(prepare(copy.deepcopy(base), whole), tmp_path)


def test_base_that_trains_does_so_after_a_refused_file(llama, tiny, tmp_path):
    adapted(tiny("llama"), k=2).save_pretrained(tmp_path)
    _drop(f"{Q}.weight")(tmp_path)
    llama.lm_head.requires_grad_(False)
    with Untouched(llama), pytest.raises(ValueError):
        PeftModel.from_pretrained(llama, tmp_path)
    assert llama.model.norm.weight.requires_grad and not llama.lm_head.weight.requires_grad
