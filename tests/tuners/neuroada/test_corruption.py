"""A file that is partial, corrupted or made for another base raises before the model is touched, on every route."""

import json
import shutil

import pytest
import torch
from peft import PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_ext import NeuroAdaConfig
from tests.tuners.neuroada._common import Untouched, adapted, fill, logits


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
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
}


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A folder with an adapter as it was saved."""
    folder = tmp_path_factory.mktemp("whole")
    adapted(tiny("llama"), k=2, seed=3).save_pretrained(folder)
    return folder


@pytest.fixture(params=DAMAGES.values(), ids=DAMAGES)
def damaged(request, whole, tmp_path):
    """A folder with a damaged adapter, and what an error about it must name."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    damage, word = request.param
    damage(tmp_path)
    return tmp_path, word


def _assert_names(error, word):
    assert word in str(error.value), str(error.value)


@pytest.fixture
def base(tiny):
    return tiny("llama").requires_grad_(False)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_first_adapter(damaged, base, ids, low_cpu_mem_usage):
    folder, word = damaged
    expected = logits(base, ids)
    with Untouched(base), pytest.raises(ValueError) as error:
        PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low_cpu_mem_usage)
    _assert_names(error, word)
    assert torch.equal(logits(base, ids), expected)


def test_base_that_trains_does_so_after_a_refused_file(llama, tiny, tmp_path):
    adapted(tiny("llama"), k=2).save_pretrained(tmp_path)
    _drop(f"{Q}.weight")(tmp_path)
    llama.lm_head.requires_grad_(False)
    with Untouched(llama), pytest.raises(ValueError):
        PeftModel.from_pretrained(llama, tmp_path)
    assert llama.model.norm.weight.requires_grad and not llama.lm_head.weight.requires_grad


def test_second_adapter(damaged, llama, ids):
    folder, word = damaged
    model = adapted(llama, k=2)
    expected = logits(model, ids)
    with Untouched(model), pytest.raises(ValueError) as error:
        model.load_adapter(folder, "second")
    _assert_names(error, word)
    assert set(model.peft_config) == {"default"} and model.active_adapters == ["default"]
    assert torch.equal(logits(model, ids), expected)


def test_adapter_loaded_again(damaged, whole, tiny, ids):
    folder, word = damaged
    model = PeftModel.from_pretrained(tiny("llama"), whole)
    expected = logits(model, ids)
    with Untouched(model), pytest.raises(ValueError) as error:
        model.load_adapter(folder, "default")
    _assert_names(error, word)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("damage", [_flip_a_byte, _drop(f"{Q}.weight")], ids=["flipped byte", "no values"])
def test_created_adapter_loaded_over(whole, llama, ids, tmp_path, damage):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    model = adapted(llama, k=2)
    expected = logits(model, ids)
    with Untouched(model), pytest.raises(ValueError):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model, ids), expected)


# transformers reads the file itself, so some of its errors are its own.
ANY_ERROR = (ValueError, RuntimeError, OSError, SafetensorError)


def test_transformers_first_adapter(damaged, base, ids):
    folder, _ = damaged
    expected = logits(base, ids)
    with Untouched(base), pytest.raises(ANY_ERROR):
        base.load_adapter(str(folder))
    assert torch.equal(logits(base, ids), expected)


def test_transformers_second_adapter(damaged, base, ids):
    folder, _ = damaged
    base.add_adapter(NeuroAdaConfig(k=2))
    expected = logits(fill(base), ids)
    with Untouched(base), pytest.raises(ANY_ERROR):
        base.load_adapter(str(folder), adapter_name="second")
    assert torch.equal(logits(base, ids), expected)


def test_transformers_from_pretrained(damaged):
    folder, _ = damaged
    with pytest.raises(ANY_ERROR):
        AutoModelForCausalLM.from_pretrained(folder)


# A state dict is not a file: what damages only the file, or only its checksum shows, does not apply.
IN_A_STATE_DICT = [name for name in DAMAGES if name not in ("cut", "cut in the header", "empty", "flipped byte")]


@pytest.mark.parametrize("name", IN_A_STATE_DICT)
def test_state_dict_set_on_an_injected_adapter(name, tiny, tmp_path, ids):
    adapted(tiny("llama"), k=2, seed=3).save_pretrained(tmp_path)
    damage, word = DAMAGES[name]
    damage(tmp_path)
    model = fill(inject_adapter_in_model(NeuroAdaConfig(k=2), tiny("llama")))
    state = {k.removeprefix("base_model.model."): v for k, v in load_file(tmp_path / WEIGHTS).items()}
    with Untouched(model), pytest.raises(ValueError) as error:
        set_peft_model_state_dict(model, state)
    _assert_names(error, word)


# ------------------------------------------------------------------ weights, config or heads missing


def test_folder_without_weights(tiny, base, tmp_path):
    adapted(tiny("llama"), k=2).save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with Untouched(base), pytest.raises((ValueError, OSError), match=str(tmp_path)):
        PeftModel.from_pretrained(base, tmp_path)


def test_config_cut_short(tiny, base, tmp_path):
    adapted(tiny("llama"), k=2).save_pretrained(tmp_path)
    text = (tmp_path / CONFIG).read_text()
    (tmp_path / CONFIG).write_text(text[: len(text) // 2])
    with Untouched(base), pytest.raises(ValueError):
        PeftModel.from_pretrained(base, tmp_path)


def test_config_with_another_k(tiny, base, tmp_path):
    adapted(tiny("llama"), k=2).save_pretrained(tmp_path)
    content = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**content, "k": 3}))
    with Untouched(base), pytest.raises(ValueError, match=r"shape \(32, 2\).*\(32, 3\)"):
        PeftModel.from_pretrained(base, tmp_path)


# Parts of a checkpoint besides the entries: options that lead to them, and the key of one.
OTHER_PARTS = {
    "head": ({"modules_to_save": ["classifier"]}, "base_model.model.classifier.weight"),
    "head of the task": ({"task_type": "SEQ_CLS"}, "base_model.model.classifier.bias"),
    "bias": ({"bias": "all"}, "base_model.model.bert.encoder.layer.1.output.LayerNorm.bias"),
    "bias of a target": ({"bias": "neuroada_only"}, "base_model.model.bert.encoder.layer.0.attention.self.query.bias"),
    "tokens": (
        {"trainable_token_indices": {"word_embeddings": [5, 6]}},
        "base_model.model.bert.embeddings.word_embeddings.token_adapter.trainable_tokens_delta",
    ),
}


@pytest.fixture(params=OTHER_PARTS.values(), ids=OTHER_PARTS)
def without_a_part(request, tiny, tmp_path):
    """A folder with an adapter that lacks a tensor, and the tensor's module."""
    options, key = request.param
    adapted(tiny("bert"), target_modules=["query"], **options).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    keys = [k for k in tensors if k.replace(".base_layer", "") == key]
    assert len(keys) == 1, sorted(tensors)
    _drop(keys[0])(tmp_path)
    return tmp_path, key.removeprefix("base_model.model.").rpartition(".")[0]


def test_partial_file_through_peft(without_a_part, tiny):
    folder, module = without_a_part
    base = tiny("bert").requires_grad_(False)
    with Untouched(base), pytest.raises(ValueError, match=module.removesuffix(".token_adapter")):
        PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize(
    "without_a_part", [OTHER_PARTS[name] for name in ("head", "head of the task", "tokens")], indirect=True
)
def test_partial_file_through_transformers(without_a_part, tiny):
    """But for biases: transformers does not say that they are missing, and only another tool drops them."""
    folder, _ = without_a_part
    base = tiny("bert").requires_grad_(False)
    with Untouched(base), pytest.raises(ANY_ERROR):
        base.load_adapter(str(folder))


def test_pickle_cut_short(tiny, base, tmp_path):
    adapted(tiny("llama"), k=2).save_pretrained(tmp_path, safe_serialization=False)
    path = tmp_path / "adapter_model.bin"
    path.write_bytes(path.read_bytes()[:2000])
    with Untouched(base), pytest.raises(ValueError, match="adapter_model.bin"):
        PeftModel.from_pretrained(base, tmp_path)


def test_good_file_loads_after_a_bad_one(tiny, base, tmp_path, ids):
    for folder in (tmp_path / "good", tmp_path / "bad"):
        model = adapted(tiny("llama"), k=2)
        model.save_pretrained(folder)
    _drop(f"{Q}.weight")(tmp_path / "bad")
    with pytest.raises(ValueError):
        PeftModel.from_pretrained(base, tmp_path / "bad")
    loaded = PeftModel.from_pretrained(base, tmp_path / "good")
    assert torch.equal(logits(loaded, ids), logits(model, ids))
