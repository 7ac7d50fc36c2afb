"""Converting an adapter's folder: what may be passed, and a base model that any error leaves as it was."""

import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, SupertuningConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from peft_ext import convert
from tests.contract._damage import CONFIG, add, cut, cut_config, edit, without_weights
from tests.contract._damage import options as change_options
from tests.contract._untouched import Untouched
from tests.conversion._common import CONFIGS, PEERS, peft_adapted
from tests.tuners.neuroada._common import logits


pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks", "ignore:Found missing adapter keys")


@PEERS
def test_folder_in_and_folder_out(tiny, ids, tmp_path, peer):
    model = peft_adapted(tiny("llama"), peer)
    model.save_pretrained(tmp_path / "peer")
    expected = logits(convert(model), ids)
    converted = convert(str(tmp_path / "peer"), tiny("llama")).eval()
    assert torch.equal(logits(converted, ids), expected)
    assert not any(parameter.requires_grad for parameter in converted.parameters())
    converted.save_pretrained(tmp_path / "ours")
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "ours", **options).eval()
        assert torch.equal(logits(loaded, ids), expected)
    loaded = tiny("llama")
    loaded.load_adapter(str(tmp_path / "ours"))
    assert torch.equal(logits(loaded, ids), expected)


def test_trained_on_after_loading(tiny, ids, tmp_path):
    peft_adapted(tiny("llama")).save_pretrained(tmp_path)
    model = convert(tmp_path, tiny("llama"), is_trainable=True, adapter_name="other")
    before = logits(model, ids)
    steps = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    first = model(ids, labels=ids).loss
    first.backward()
    steps.step()
    assert model(ids, labels=ids).loss < first
    assert not torch.equal(logits(model, ids), before) and list(model.peft_config) == ["other"]


def test_recomputed_indices(tiny, ids, tmp_path):
    """Super-Tuning can leave them out of the file and choose them again."""
    with pytest.warns(UserWarning, match="recomputed"):
        CONFIGS["without"] = lambda: SupertuningConfig(
            sparsity=0.9, target_modules=["q_proj"], init_weights=False, save_precomputed_indices=False
        )
        model = peft_adapted(tiny("llama"), "without")
        model.save_pretrained(tmp_path)
        expected = logits(model, ids)
        del CONFIGS["without"]
        converted = convert(tmp_path, tiny("llama")).eval()
    torch.testing.assert_close(logits(converted, ids), expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------ refused


def changed(model, **options):
    """A new model of other sizes, with some parameters frozen and a part of it in training mode."""
    config = model.config.to_dict() | options
    torch.manual_seed(0)
    other = LlamaForCausalLM(type(model.config).from_dict(config)).eval()
    other.model.embed_tokens.requires_grad_(False)
    other.model.layers[0].mlp.train()
    return other


def refused(folder, base, error, match, **options):
    """Converting raises an error, and leaves everything of the base model as it was."""
    modules, attributes = list(base.named_modules()), set(vars(base))
    with Untouched(base), pytest.raises(error, match=match):
        convert(folder, base, **options)
    assert list(base.named_modules()) == modules and set(vars(base)) == attributes


@pytest.mark.parametrize("peer", ["SHiRA", "Super-Tuning from below"])  # targets that are ends of names
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"hidden_size": 64}, r"has the shape \(\d+,\) in the adapter and \(\d+,\) here"),
        ({"num_hidden_layers": 3}, "the adapter has nothing for 'model.layers.2"),
        ({"num_hidden_layers": 1}, "no place for 'model.layers.1"),
    ],
)
def test_another_base_model(tiny, tmp_path, peer, options, match):
    peft_adapted(tiny("llama"), peer).save_pretrained(tmp_path)
    match = f"base_model, a LlamaForCausalLM, does not fit .*{match}.*trained on, "
    refused(tmp_path, changed(tiny("llama"), **options), ValueError, match)


def test_another_architecture(tiny, tmp_path):
    peft_adapted(tiny("llama")).save_pretrained(tmp_path)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))
    refused(tmp_path, base, ValueError, "base_model, a GPT2LMHeadModel, does not fit.*no place for")


def test_another_vocabulary(tiny, tmp_path):
    peft_adapted(tiny("llama"), modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    base = changed(tiny("llama"), vocab_size=70)
    refused(tmp_path, base, ValueError, r"'lm_head.weight' has the shape \(64, 32\) in the adapter and \(70, 32\)")


def test_embeddings_that_the_adapter_brings_along(tiny, tmp_path):
    """PEFT has copied them into the base model when the misfit shows."""
    model = peft_adapted(tiny("llama"))
    model.get_input_embeddings().weight.data.add_(1.0)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    refused(tmp_path, changed(tiny("llama"), num_hidden_layers=3), ValueError, "does not fit")


Q = "base_model.model.model.layers.0.self_attn.q_proj"
MALFORMED = {
    "NaN": (f"{Q}.shira_weight", lambda t: t * torch.nan, "q_proj.shira_weight' has values that are not finite"),
    "infinite": (f"{Q}.shira_weight", lambda t: t / 0.0, "q_proj.shira_weight' has values that are not finite"),
    "wrapping": (f"{Q}.shira_indices", lambda t: t.long() + 2**32, "q_proj.shira_indices' has numbers that are no"),
    "fractional": (f"{Q}.shira_indices", lambda t: t + 0.5, "q_proj.shira_indices' has numbers that are no indices"),
    "negative": (f"{Q}.shira_indices", lambda t: t - 99, "q_proj.shira_indices' has numbers that are no indices"),
    "frozen": ("base_model.model.model.norm.weight", lambda _: torch.full((32,), 7.0), "norm.weight', which is"),
}


def _change(tensors, key, change):
    tensors[key] = change(tensors.get(key))


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files(tiny, tmp_path, name):
    peft_adapted(tiny("llama")).save_pretrained(tmp_path)
    key, change, match = MALFORMED[name]
    edit(lambda tensors: _change(tensors, key, change))(tmp_path)
    refused(tmp_path, tiny("llama"), ValueError, match)


def test_indices_saved_on_windows_are_floats(tiny, ids, tmp_path):
    model = peft_adapted(tiny("llama"))
    model.save_pretrained(tmp_path)
    edit(lambda tensors: tensors.update({k: t.float() for k, t in tensors.items() if k.endswith("indices")}))(tmp_path)
    add("foo", torch.ones(2))(tmp_path)
    with pytest.warns(UserWarning, match="belong to nothing in this model and are ignored: 'foo'"):
        converted = convert(tmp_path, tiny("llama"))
    torch.testing.assert_close(logits(converted, ids), logits(model, ids), atol=1e-5, rtol=1e-5)


def test_values_that_became_infinite_in_memory(tiny):
    model = peft_adapted(tiny("llama"))
    next(p for name, p in model.named_parameters() if "shira_weight" in name).data[0] = torch.inf
    with pytest.raises(ValueError, match="values at '.*q_proj' that are not finite"):
        convert(model)


def test_a_refusal_after_loading(tiny, tmp_path):
    """The file fits and is loaded, and then the weights turn out to be tied."""
    peft_adapted(tiny("llama")).save_pretrained(tmp_path)
    base = tiny("llama")
    base.model.layers[1].self_attn.q_proj.weight = base.model.layers[0].self_attn.q_proj.weight
    refused(tmp_path, base, ValueError, "share one weight")


def test_indices_outside_a_transposed_weight(tiny, tmp_path):
    """As many entries, but not the same weight."""
    peft_adapted(tiny("llama")).save_pretrained(tmp_path)
    base = tiny("llama")
    for layer in base.model.layers:
        layer.mlp.down_proj = torch.nn.Linear(32, 272, bias=False)
    refused(tmp_path, base, ValueError, "outside the 272 x 32 weight.*trained on")


def test_lora_parts_and_other_methods(tiny, tmp_path):
    config = SupertuningConfig(sparsity=0.9, target_modules=["q_proj"], r=2, init_weights=False)
    get_peft_model(tiny("llama"), config).save_pretrained(tmp_path / "hybrid")
    get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    refused(tmp_path / "hybrid", tiny("llama"), ValueError, "r=2")
    refused(tmp_path / "lora", tiny("llama"), TypeError, "LORA, but only")


NOT_WHOLE = {
    "no weights": (without_weights, ValueError, "has no weights"),
    "cut weights": (cut, ValueError, "not a whole safetensors file"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), ValueError, "no adapter that can be read"),
    "broken config": (cut_config, ValueError, "this folder has no adapter that can be read"),
    "unknown method": (change_options(peft_type="TOMORROW"), TypeError, "'TOMORROW', which this PEFT does not know"),
}


@pytest.mark.parametrize("what", NOT_WHOLE)
def test_folders_that_are_not_whole(tiny, tmp_path, what):
    peft_adapted(tiny("llama")).save_pretrained(tmp_path)
    damage, error, match = NOT_WHOLE[what]
    damage(tmp_path)
    refused(tmp_path, tiny("llama"), error, match)


@pytest.mark.parametrize("path", ["user/nothing", "/nowhere/at/all", ""])
def test_paths_without_an_adapter(tiny, path):
    refused(path, tiny("llama"), ValueError, "no such folder, and no adapter on the Hub")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"is_trainabel": True}, TypeError, "is_trainabel.*Known are adapter_name, is_trainable"),
        ({"ignore_mismatched_sizes": True}, TypeError, "ignore_mismatched_sizes"),
        ({"adapter_name": ""}, ValueError, "adapter_name=''"),
        ({"adapter_name": "a.b"}, ValueError, "adapter_name='a.b'"),
    ],
)
def test_options_that_are_not_known(tiny, tmp_path, options, error, match):
    peft_adapted(tiny("llama")).save_pretrained(tmp_path)
    refused(tmp_path, tiny("llama"), error, match, **options)


@PEERS
@pytest.mark.parametrize(
    "options",
    [
        {"low_cpu_mem_usage": True, "torch_device": "cpu", "autocast_adapter_dtype": False},
        {"key_mapping": {"^model": "model"}, "local_files_only": True, "revision": "main"},
        {"subfolder": "inside"},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_that_are_known(tiny, ids, tmp_path, peer, options):
    model = peft_adapted(tiny("llama"), peer)
    model.save_pretrained(tmp_path)
    if "subfolder" in options:
        (tmp_path / "inside").mkdir()
        for file in tmp_path.glob("adapter_*"):
            shutil.move(file, tmp_path / "inside")
    converted = convert(tmp_path, tiny("llama"), **options)
    torch.testing.assert_close(logits(converted, ids), logits(model, ids), atol=1e-5, rtol=1e-5)


def test_a_base_model_that_transformers_has_adapted(tiny, ids, tmp_path):
    peft_adapted(tiny("llama")).save_pretrained(tmp_path)
    base = tiny("llama")
    base.add_adapter(CONFIGS["SHiRA"]())
    before = logits(base, ids)
    with pytest.raises(ValueError, match="has adapters already"):
        convert(tmp_path, base)
    assert torch.equal(logits(base, ids), before) and list(base.peft_config) == ["default"]
