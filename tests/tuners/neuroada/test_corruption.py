"""A file that is partial, corrupted or made for another base raises before the model is touched, on every route."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

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


@pytest.fixture(params=DAMAGES.values(), ids=DAMAGES)
def damaged(request, tiny, tmp_path):
    """A folder with a damaged adapter, and what an error about it must name."""
    adapted(tiny("llama"), k=2, seed=3).save_pretrained(tmp_path)
    damage, word = request.param
    damage(tmp_path)
    return tmp_path, word


def _assert_names(error, word):
    assert word in str(error.value), str(error.value)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_first_adapter(damaged, llama, ids, low_cpu_mem_usage):
    folder, word = damaged
    expected = logits(llama, ids)
    with Untouched(llama), pytest.raises(ValueError) as error:
        PeftModel.from_pretrained(llama, folder, low_cpu_mem_usage=low_cpu_mem_usage)
    _assert_names(error, word)
    assert torch.equal(logits(llama, ids), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_second_adapter(damaged, llama, ids, low_cpu_mem_usage):
    folder, word = damaged
    model = adapted(llama, k=2)
    expected = logits(model, ids)
    with Untouched(model), pytest.raises(ValueError) as error:
        model.load_adapter(folder, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    _assert_names(error, word)
    assert set(model.peft_config) == {"default"} and model.active_adapters == ["default"]
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("origin", ["created", "loaded"])
def test_adapter_loaded_again(damaged, tiny, ids, origin, tmp_path_factory):
    folder, word = damaged
    model = adapted(tiny("llama"), k=2)
    if origin == "loaded":
        good = tmp_path_factory.mktemp("good")
        model.save_pretrained(good)
        model = PeftModel.from_pretrained(tiny("llama"), good)
    expected = logits(model, ids)
    with Untouched(model), pytest.raises(ValueError) as error:
        model.load_adapter(folder, "default")
    _assert_names(error, word)
    assert torch.equal(logits(model, ids), expected)


def test_transformers_first_adapter(damaged, llama, ids):
    folder, word = damaged
    expected = logits(llama, ids)
    with Untouched(llama), pytest.raises(ValueError) as error:
        llama.load_adapter(str(folder))
    _assert_names(error, word)
    assert torch.equal(logits(llama, ids), expected)


def test_transformers_second_adapter(damaged, llama, ids):
    folder, word = damaged
    llama.add_adapter(NeuroAdaConfig(k=2))
    fill(llama)
    expected = logits(llama, ids)
    with Untouched(llama), pytest.raises(ValueError) as error:
        llama.load_adapter(str(folder), adapter_name="second")
    _assert_names(error, word)
    assert torch.equal(logits(llama, ids), expected)


def test_transformers_from_pretrained(damaged):
    folder, word = damaged
    with pytest.raises(ValueError) as error:
        AutoModelForCausalLM.from_pretrained(folder)
    _assert_names(error, word)


@pytest.mark.parametrize("name", [name for name in DAMAGES if "cut" not in name and name not in ("empty",)])
def test_state_dict_set_on_an_injected_adapter(name, tiny, tmp_path, ids):
    if name == "flipped byte":
        pytest.skip("a state dict carries no checksum")
    adapted(tiny("llama"), k=2, seed=3).save_pretrained(tmp_path)
    damage, word = DAMAGES[name]
    damage(tmp_path)
    model = fill(inject_adapter_in_model(NeuroAdaConfig(k=2), tiny("llama")))
    state = {k.removeprefix("base_model.model."): v for k, v in load_file(tmp_path / WEIGHTS).items()}
    with Untouched(model), pytest.raises(ValueError) as error:
        set_peft_model_state_dict(model, state)
    _assert_names(error, word)


# ------------------------------------------------------------------ weights, config or heads missing


def test_folder_without_weights(tiny, tmp_path):
    adapted(tiny("llama"), k=2).save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    base = tiny("llama")
    with Untouched(base), pytest.raises((ValueError, OSError), match=str(tmp_path)):
        PeftModel.from_pretrained(base, tmp_path)


def test_config_cut_short(tiny, tmp_path):
    adapted(tiny("llama"), k=2).save_pretrained(tmp_path)
    text = (tmp_path / CONFIG).read_text()
    (tmp_path / CONFIG).write_text(text[: len(text) // 2])
    base = tiny("llama")
    with Untouched(base), pytest.raises(ValueError):
        PeftModel.from_pretrained(base, tmp_path)


def test_config_with_another_k(tiny, tmp_path):
    adapted(tiny("llama"), k=2).save_pretrained(tmp_path)
    content = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**content, "k": 3}))
    base = tiny("llama")
    with Untouched(base), pytest.raises(ValueError, match=r"shape \(32, 2\).*\(32, 3\)"):
        PeftModel.from_pretrained(base, tmp_path)


def test_head_that_is_missing(tiny, tmp_path):
    options = {"target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    adapted(tiny("bert"), **options).save_pretrained(tmp_path)
    _drop("base_model.model.classifier.weight")(tmp_path)
    base = tiny("bert")
    with Untouched(base), pytest.raises(ValueError, match="classifier"):
        PeftModel.from_pretrained(base, tmp_path)


def test_pickle_cut_short(tiny, tmp_path):
    adapted(tiny("llama"), k=2).save_pretrained(tmp_path, safe_serialization=False)
    path = tmp_path / "adapter_model.bin"
    path.write_bytes(path.read_bytes()[:2000])
    base = tiny("llama")
    with Untouched(base), pytest.raises(ValueError, match="adapter_model.bin"):
        PeftModel.from_pretrained(base, tmp_path)


# ------------------------------------------------------------------ another base


@pytest.fixture
def other_base(llama):
    torch.manual_seed(1)
    return LlamaForCausalLM(llama.config).eval()


@pytest.fixture
def adapter(tiny, tmp_path):
    adapted(tiny("llama"), k=2).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_base(other_base, adapter, dtype, low_cpu_mem_usage):
    base = other_base.to(dtype)
    with Untouched(base), pytest.raises(ValueError, match="made for another base model.*q_proj.*trained on"):
        PeftModel.from_pretrained(base, adapter, low_cpu_mem_usage=low_cpu_mem_usage)


def test_another_base_with_an_adapter_of_its_own(other_base, adapter, ids):
    model = adapted(other_base, k=2)
    expected = logits(model, ids)
    with Untouched(model), pytest.raises(ValueError, match="made for another base model"):
        model.load_adapter(adapter, "second")
    assert torch.equal(logits(model, ids), expected)


def test_another_base_through_transformers(other_base, adapter, ids):
    with Untouched(other_base), pytest.raises(ValueError, match="made for another base model"):
        other_base.load_adapter(str(adapter))


def test_base_that_was_trained_on(tiny, adapter):
    """Full fine-tuning by a small step is enough to be another base."""
    base = tiny("llama")
    for parameter in base.parameters():
        parameter.data.mul_(1 + 1e-6)
    with Untouched(base), pytest.raises(ValueError, match="other values at the adapter's entries"):
        PeftModel.from_pretrained(base, adapter)


def test_another_width(llama, adapter):
    config = type(llama.config)(**{**llama.config.to_dict(), "intermediate_size": 64})
    base = LlamaForCausalLM(config).eval()
    with Untouched(base), pytest.raises(ValueError, match=r"shape \(272, 2\).*\(64, 2\)"):
        PeftModel.from_pretrained(base, adapter)


def test_another_depth(llama, adapter):
    config = type(llama.config)(**{**llama.config.to_dict(), "num_hidden_layers": 3, "layer_types": None})
    base = LlamaForCausalLM(config).eval()
    base.load_state_dict(llama.state_dict(), strict=False)
    with Untouched(base), pytest.raises(ValueError, match=r"layers\.2\."):
        PeftModel.from_pretrained(base, adapter)


def test_good_file_loads_after_a_bad_one(tiny, adapter, tmp_path_factory, ids):
    bad = tmp_path_factory.mktemp("bad")
    for name in (WEIGHTS, CONFIG):
        (bad / name).write_bytes((adapter / name).read_bytes())
    _drop(f"{Q}.weight")(bad)
    base = tiny("llama")
    with pytest.raises(ValueError):
        PeftModel.from_pretrained(base, bad)
    expected = logits(PeftModel.from_pretrained(tiny("llama"), adapter), ids)
    assert torch.equal(logits(PeftModel.from_pretrained(base, adapter), ids), expected)


def test_adapter_of_another_method_is_peft_s_matter(tiny, tmp_path):
    from peft import LoraConfig

    get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(tiny("llama"), tmp_path).active_peft_config.peft_type.value == "LORA"
