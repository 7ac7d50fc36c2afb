"""Replacing a loaded adapter in place: exact, without recompilation, or an error that leaves the loaded one."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_ext import NeuroAdaConfig, hotswap_adapter
from tests.contract._common import layers_of
from tests.contract._untouched import Untouched
from tests.sparse._probes import tensors_of
from tests.tuners.neuroada._common import adapted, add, logits


WEIGHTS = "adapter_model.safetensors"
BACKENDS = ["auto", "bypass", "folded", "dense", "reference"]


@pytest.fixture
def save(tiny, ids, tmp_path):
    """Function: options to a folder with such an adapter, and the logits that it must give."""

    def saved(name, seed=1, **options):
        model = adapted(tiny("llama"), seed=seed, **options)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name, logits(model, ids)

    return saved


@pytest.mark.parametrize(
    ("backend", "origin"),
    [(backend, "created") for backend in BACKENDS] + [("auto", "loaded"), ("auto", "loaded with little memory")],
)
def test_swapped_adapter_gives_the_output_of_the_other(tiny, save, ids, backend, origin):
    first, expected_first = save("first", k=2, backend=backend)
    second, expected_second = save("second", k=2, seed=2, selection="random", backend=backend)
    if origin == "created":
        model = adapted(tiny("llama"), k=2, backend=backend)
    else:
        model = PeftModel.from_pretrained(tiny("llama"), first, low_cpu_mem_usage=origin != "loaded")
    for folder, expected in [(second, expected_second), (first, expected_first)] * 2:
        hotswap_adapter(model, str(folder))
        assert torch.equal(logits(model, ids), expected)


def test_no_tensor_is_replaced(tiny, save):
    folder, _ = save("other", k=2, seed=2, selection="random")
    model = adapted(tiny("llama"), k=2)
    before = {n: (t.data_ptr(), t._version) for n, t in tensors_of(model).items()}
    hotswap_adapter(model, str(folder))
    after = {n: (t.data_ptr(), t._version) for n, t in tensors_of(model).items()}
    assert {n: pointer for n, (pointer, _) in after.items()} == {n: pointer for n, (pointer, _) in before.items()}
    changed = {n for n in after if after[n] != before[n]}
    assert changed and all("neuroada_delta.default" in name for name in changed)


def test_only_the_named_adapter_changes(tiny, save, ids):
    folder, expected = save("other", k=3, seed=2)
    model = add(adapted(tiny("llama"), k=2), "second", k=3, seed=4)
    first = logits(model, ids)
    hotswap_adapter(model, str(folder), adapter_name="second")
    assert torch.equal(logits(model, ids), first)
    model.set_adapter("second")
    assert torch.equal(logits(model, ids), expected)


def test_training_goes_on_after_a_swap(tiny, save, ids):
    folder, _ = save("other", k=2, seed=2, selection="random")
    model = adapted(tiny("llama"), k=2)
    hotswap_adapter(model, str(folder))
    model(ids, labels=ids).loss.backward()  # the input gradient runs over the transposed table
    reference = PeftModel.from_pretrained(tiny("llama"), folder, is_trainable=True)
    reference(ids, labels=ids).loss.backward()
    for (name, layer), other in zip(layers_of(model).items(), layers_of(reference).values(), strict=True):
        assert torch.equal(layer.deltas["default"].weight.grad, other.deltas["default"].weight.grad), name


def test_model_with_an_injected_adapter(llama, save, ids):
    folder, expected = save("other", k=2, seed=2)
    llama.add_adapter(NeuroAdaConfig(k=2))
    hotswap_adapter(llama, str(folder))
    assert torch.equal(logits(llama, ids), expected)


@pytest.mark.parametrize("options", [{"neuron_ratio": 0.5, "seed": 3}, {"selection": "random_layer"}], ids=str)
def test_ragged_adapters_of_equal_size(tiny, save, ids, options):
    folder, expected = save("other", k=2, **{**options, "seed": 8})
    model = adapted(tiny("llama"), k=2, **options)
    hotswap_adapter(model, str(folder))
    assert torch.equal(logits(model, ids), expected)


# ------------------------------------------------------------------ refused


def _refused(model, ids, match, *args, error=ValueError, **kwargs):
    expected = logits(model, ids)
    with Untouched(model), pytest.raises(error, match=match):
        hotswap_adapter(model, *args, **kwargs)
    assert torch.equal(logits(model, ids), expected)


@pytest.fixture
def model(tiny, save):
    """An adapter that was itself loaded, as it is in a server."""
    folder, _ = save("loaded", k=2, seed=6)
    return PeftModel.from_pretrained(tiny("llama"), folder)


def test_unknown_name(model, save, ids):
    folder, _ = save("good", k=2)
    _refused(model, ids, r"adapter_name='missing' is not loaded.*default", str(folder), adapter_name="missing")


def test_missing_folder(model, ids, tmp_path):
    _refused(model, ids, "", str(tmp_path / "nowhere"), error=(ValueError, OSError))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"k": 3}, r"shape \(32, 3\).*\(32, 2\)"),
        ({"k": 2, "neuron_ratio": 0.5}, "q_proj"),
        ({"k": 2, "target_modules": ["q_proj"]}, "lacks"),
        ({"k": 2, "target_modules": r".*(_proj|lm_head)"}, "lm_head"),
        ({"k": 2, "bias": "all"}, "bias"),
        ({"k": 2, "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"k": 2, "trainable_token_indices": [3]}, "embed_tokens|trainable_token"),
    ],
    ids=str,
)
def test_other_options(model, save, ids, options, match):
    folder, _ = save("other", **options)
    _refused(model, ids, match, str(folder))


def test_another_method(model, tiny, ids, tmp_path):
    get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    _refused(model, ids, "LORA.*NEUROADA", str(tmp_path / "lora"))


def test_loaded_adapter_of_another_method(tiny, save, ids):
    folder, _ = save("good", k=2)
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"])).eval()
    _refused(model, ids, "LORA.*peft.utils.hotswap", str(folder))


def test_model_without_adapters(llama, save, ids):
    folder, _ = save("good", k=2)
    _refused(llama, ids, "not loaded", str(folder))


def test_merged_adapter(model, save, ids):
    folder, _ = save("good", k=2)
    model.merge_adapter()
    _refused(model, ids, "merged.*unmerge", str(folder))


@pytest.mark.parametrize("loaded", [True, False])
def test_trained_tokens_are_refused(tiny, tmp_path, loaded):
    tokens = {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}
    plain = {"target_modules": ["q_proj"]}
    adapted(tiny("llama"), **(plain if loaded else tokens)).save_pretrained(tmp_path)
    model = adapted(tiny("llama"), **(tokens if loaded else plain))
    with Untouched(model), pytest.raises(ValueError, match="trainable_token_indices"):
        hotswap_adapter(model, str(tmp_path))
