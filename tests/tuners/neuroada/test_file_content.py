"""A file may bring an adapter, what is trained with it, and nothing else, by every way of loading."""

from contextlib import contextmanager

import pytest
import torch
from peft import PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from peft_ext import NeuroAdaConfig, hotswap_adapter
from tests.contract._common import base_bits
from tests.contract._damage import WEIGHTS, add, drop, options, replace
from tests.contract._untouched import Untouched
from tests.contract._ways import by_peft, by_transformers, in_little_memory, swapped
from tests.tuners.neuroada._common import adapted, logits


@pytest.fixture
def base(tiny):
    return tiny("llama").requires_grad_(False)


@contextmanager
def _as_before(base):
    """The base's numbers, also where what is injected by hand stays there."""
    before = base_bits(base)
    yield
    after = {name.replace(".original_module", ""): tensor for name, tensor in base_bits(base).items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def _by_state_dict(base, folder):
    config = NeuroAdaConfig.from_pretrained(folder)
    model = inject_adapter_in_model(config, base).eval()
    state = {key.removeprefix("base_model.model."): tensor for key, tensor in load_file(folder / WEIGHTS).items()}
    set_peft_model_state_dict(model, state)
    return model


def _swapped(base, folder):
    config = NeuroAdaConfig.from_pretrained(folder)
    model = inject_adapter_in_model(config, base).eval()
    return swapped(model, folder)


WAYS = {
    "peft": by_peft,
    "peft with little memory": in_little_memory,
    "transformers": by_transformers,
    "state dict": _by_state_dict,
    "swapped": _swapped,
}
EVERY_WAY = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
NOT_SWAPPED = pytest.mark.parametrize(
    "way", [way for name, way in WAYS.items() if name != "swapped"], ids=[name for name in WAYS if name != "swapped"]
)


@EVERY_WAY
def test_an_adapter_alone_loads_without_a_word(tiny, ids, tmp_path, way, recwarn):
    expected = adapted(tiny("llama"), target_modules=["q_proj", "lm_head"] if way is not _swapped else ["q_proj"])
    expected.save_pretrained(tmp_path)  # with lm_head's frozen weight, as PEFT does for a targeted output layer
    model = way(tiny("llama"), tmp_path)
    assert torch.equal(logits(model, ids), logits(expected, ids))
    assert not [warning for warning in recwarn if str(warning.message).startswith("The checkpoint")]


@NOT_SWAPPED
def test_embeddings_of_a_resized_vocabulary_are_loaded_and_named(tiny, ids, tmp_path, way):
    """PEFT saves them with the adapter."""
    model = tiny("llama")
    model.resize_token_embeddings(70)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    expected = adapted(model, target_modules=["q_proj"])
    expected.save_pretrained(tmp_path, save_embedding_layers=True)
    base = tiny("llama")
    base.resize_token_embeddings(70)
    with pytest.warns(UserWarning, match=r"brings embeddings \(.*embed_tokens.weight.*replace the base model's"):
        loaded = way(base, tmp_path)
    assert torch.equal(logits(loaded, ids), logits(expected, ids))


@NOT_SWAPPED
def test_embeddings_of_another_size_are_refused(tiny, tmp_path, way):
    model = tiny("llama")
    model.resize_token_embeddings(70)
    adapted(model, target_modules=["q_proj"]).save_pretrained(tmp_path, save_embedding_layers=True)
    base = tiny("llama")
    with _as_before(base), pytest.raises(ValueError, match=r"lm_head.weight' has shape \(70, 32\).*\(64, 32\)"):
        way(base, tmp_path)


def test_a_swap_brings_no_embeddings(tiny, tmp_path):
    model = adapted(tiny("llama"), target_modules=["q_proj"])
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    with Untouched(model), pytest.raises(ValueError, match="lm_head.*can't be swapped in place"):
        hotswap_adapter(model, str(tmp_path))


@EVERY_WAY
def test_biases_that_the_config_does_not_train_are_refused(tiny, tmp_path, way):
    adapted(tiny("bert"), target_modules=["query"], bias="all").save_pretrained(tmp_path)
    options(bias="none")(tmp_path)
    base = tiny("bert")
    with _as_before(base), pytest.raises(ValueError, match=r"bias', which is no part of the adapter"):
        way(base, tmp_path)


@pytest.mark.parametrize("change", [lambda t: t.long() + 2**32, lambda t: t + 0.5, lambda t: t.flip(0)])
@NOT_SWAPPED
def test_offsets_of_uneven_rows_are_checked_before_they_are_narrowed(tiny, tmp_path, way, change):
    adapted(tiny("llama"), target_modules=["q_proj"], selection="magnitude_layer").save_pretrained(tmp_path)
    key = "base_model.model.model.layers.1.self_attn.q_proj.neuroada_delta.offsets"
    replace(key, change)(tmp_path)
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj.*(offsets do not divide|whole numbers belong)"):
        way(tiny("llama"), tmp_path)


# ------------------------------------------------------------------ heads


def _with_labels(model_dir, number):
    return AutoModelForSequenceClassification.from_pretrained(
        model_dir("bert"), num_labels=number, ignore_mismatched_sizes=True
    ).eval()


HEAD = {"target_modules": ["query"], "modules_to_save": ["classifier"]}


@NOT_SWAPPED
def test_another_number_of_labels_is_refused_and_leaves_the_model(tiny, model_dir, tmp_path, way):
    adapted(tiny("bert"), **HEAD).save_pretrained(tmp_path)
    base = _with_labels(model_dir, 5)
    with _as_before(base), pytest.raises((ValueError, RuntimeError), match=r"classifier"):
        way(base, tmp_path)


@pytest.mark.parametrize("number", [5, 3])
def test_a_head_of_another_size_or_not_finite_leaves_a_loaded_adapter(tiny, model_dir, tmp_path, number):
    for name, labels in (("good", 3), ("bad", number)):
        model = adapted(_with_labels(model_dir, labels), **HEAD, seed=labels)
        if name == "bad" and number == 3:
            model.base_model.model.classifier.modules_to_save["default"].weight.data[0, 0] = torch.inf
        model.save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(tiny("bert"), tmp_path / "good")
    with Untouched(model), pytest.raises(ValueError, match="classifier.*(has shape|not finite)"):
        model.load_adapter(tmp_path / "bad", "default")


def test_a_head_of_another_size_may_be_ignored_as_in_peft(tiny, model_dir, tmp_path):
    adapted(tiny("bert"), **HEAD).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        PeftModel.from_pretrained(_with_labels(model_dir, 5), tmp_path, ignore_mismatched_sizes=True)


def test_infinite_numbers_in_the_buffer_of_a_module_that_is_trained_whole(tiny, tmp_path):
    base = tiny("llama")
    for model in (base, copy := tiny("llama")):
        model.lm_head.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    adapted(base, target_modules=["q_proj"], modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy, tmp_path)
    assert loaded.base_model.model.lm_head.modules_to_save["default"].mask[1] == -torch.inf


def test_from_pretrained_of_transformers_warns_too(tiny, model_dir, ids, tmp_path):
    expected = adapted(AutoModelForCausalLM.from_pretrained(model_dir("llama")), target_modules=["q_proj"])
    expected.save_pretrained(tmp_path)
    add("foo", torch.ones(3))(tmp_path)
    with pytest.warns(UserWarning, match="belong to nothing.*'foo'"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(model, ids), logits(expected, ids))


# ------------------------------------------------------------------ weights, config or heads missing


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
    drop(keys[0])(tmp_path)
    return tmp_path, key.removeprefix("base_model.model.").rpartition(".")[0]


@pytest.mark.parametrize("way", [by_peft, by_transformers])
def test_partial_file(without_a_part, tiny, way):
    folder, module = without_a_part
    base = tiny("bert").requires_grad_(False)
    with Untouched(base), pytest.raises(ValueError, match=module.removesuffix(".token_adapter")):
        way(base, folder)


def test_pickle_cut_short(tiny, base, tmp_path):
    adapted(tiny("llama"), k=2).save_pretrained(tmp_path, safe_serialization=False)
    path = tmp_path / "adapter_model.bin"
    path.write_bytes(path.read_bytes()[:2000])
    with Untouched(base), pytest.raises(ValueError, match="adapter_model.bin"):
        PeftModel.from_pretrained(base, tmp_path)
