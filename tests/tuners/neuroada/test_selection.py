"""Every way of choosing entries, through saving and loading; what each chooses is tested in tests/sparse."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model

from peft_ext import NeuroAdaConfig
from peft_ext.sparse.selection.plan import SCORED, SELECTIONS
from tests.contract._common import adapter_bits, assert_equal_bits, fill, layers_of
from tests.tuners.neuroada._common import logits


WITHOUT_SCORES = [name for name in SELECTIONS if not name.startswith(SCORED)]
WITH_SCORES = [name for name in SELECTIONS if name.startswith("gradient")] + ["activation"]
LOW = pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
EXTRA = [{}, {"neuron_ratio": 0.3}]


def gradients(base, ids):
    """Scores as a user has them: the loss's gradient for each weight."""
    base.requires_grad_(True)
    base(ids, labels=ids).loss.backward()
    scores = {
        name: module.weight.grad.clone()
        for name, module in base.named_modules()
        if getattr(module, "weight", None) is not None and name.split(".")[-1] not in ("lm_head",)
    }
    base.zero_grad()
    base.requires_grad_(False)
    return scores


def _round_trip(tiny, name, model, ids, folder, low_cpu_mem_usage, **kwargs):
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(tiny(name), folder, low_cpu_mem_usage=low_cpu_mem_usage, **kwargs).eval()
    assert_equal_bits(adapter_bits(loaded), adapter_bits(model))
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    return loaded


def _entries(model):
    return sum(layer.deltas["default"].support.entries for layer in layers_of(model).values())


@pytest.mark.parametrize(("name", "low_cpu_mem_usage"), [("llama", False), ("gpt2", True)])
@pytest.mark.parametrize("selection", WITHOUT_SCORES)
def test_saved_and_loaded(tiny, ids, tmp_path, selection, name, low_cpu_mem_usage):
    model = fill(get_peft_model(tiny(name), NeuroAdaConfig(k=2, selection=selection))).eval()
    assert _entries(model) == sum(2 * layer.out_features for layer in layers_of(model).values())
    _round_trip(tiny, name, model, ids, tmp_path, low_cpu_mem_usage)


@LOW
@pytest.mark.parametrize("selection", [name for name in WITHOUT_SCORES if "_" not in name])
def test_share_of_the_neurons_saved_and_loaded(tiny, ids, tmp_path, selection, low_cpu_mem_usage):
    model = fill(get_peft_model(tiny("llama"), NeuroAdaConfig(k=2, selection=selection, neuron_ratio=0.3))).eval()
    assert _entries(model) == sum(2 * round(0.3 * layer.out_features) for layer in layers_of(model).values())
    _round_trip(tiny, "llama", model, ids, tmp_path, low_cpu_mem_usage)


@pytest.mark.parametrize(
    ("name", "low_cpu_mem_usage", "trainable"), [("llama", False, True), ("gpt2", True, False), ("llama", True, True)]
)
@pytest.mark.parametrize("selection", WITH_SCORES)
def test_gradient_saved_and_loaded_without_scores(tiny, ids, tmp_path, selection, name, trainable, low_cpu_mem_usage):
    base = tiny(name)
    scores = gradients(base, ids)
    config = NeuroAdaConfig(k=2, selection=selection).with_scores(scores)
    model = fill(get_peft_model(base, config)).eval()
    loaded = _round_trip(tiny, name, model, ids, tmp_path, low_cpu_mem_usage, is_trainable=trainable)
    assert bool([p for p in loaded.parameters() if p.requires_grad]) == trainable


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_chooses_the_largest_scores_of_each_neuron(tiny, ids, name):
    base = tiny(name)
    scores = gradients(base, ids)
    model = get_peft_model(base, NeuroAdaConfig(k=3, selection="gradient").with_scores(scores))
    for path, layer in layers_of(model).items():
        score = scores[path.removeprefix("base_model.model.")].abs()
        rows = score if name == "llama" else score.t()  # a neuron of a Conv1D is a column
        chosen = rows.gather(1, layer.deltas["default"].indices.long())
        expected = rows.topk(3, dim=1).values
        assert torch.equal(chosen.sort(1).values, expected.sort(1).values), path


def test_gradient_adapter_loaded_by_every_route(tiny, ids, tmp_path):
    base = tiny("llama")
    config = NeuroAdaConfig(k=2, selection="gradient_network", task_type="CAUSAL_LM")
    model = fill(get_peft_model(base, config.with_scores(gradients(base, ids)))).eval()
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    plain = tiny("llama")
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain, ids), expected)
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(auto, ids), expected)
    second = fill(get_peft_model(tiny("llama"), NeuroAdaConfig(k=1))).eval()
    second.load_adapter(tmp_path, "loaded", is_trainable=True)
    second.set_adapter("loaded")
    assert torch.equal(logits(second, ids), expected)


def test_scores_are_let_go_once_used(llama, ids):
    config = NeuroAdaConfig(k=1, selection="gradient").with_scores(gradients(llama, ids))
    model = get_peft_model(llama, config)
    assert config.scores is None and model.peft_config["default"].scores is None


@pytest.mark.parametrize("selection", ["magnitude_network", "random_network", "reverse_network"])
def test_network_wide_sizes_are_in_the_config(tiny, tmp_path, selection):
    model = get_peft_model(tiny("llama"), NeuroAdaConfig(k=2, selection=selection))
    sizes = {
        name.removeprefix("base_model.model."): layer.deltas["default"].support.entries
        for name, layer in layers_of(model).items()
    }
    assert len(set(sizes.values())) > 1  # not what sharing out evenly would give
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).support_sizes == sizes


def test_module_without_entries_is_saved_and_loaded(tiny, ids, tmp_path):
    """Network-wide, a weight far smaller than the others gets nothing."""

    def base():
        model = tiny("llama")
        model.model.layers[0].mlp.up_proj.weight.data *= 1e-6
        return model

    model = fill(get_peft_model(base(), NeuroAdaConfig(selection="magnitude_network"))).eval()
    empty = [name for name, layer in layers_of(model).items() if layer.deltas["default"].support.entries == 0]
    assert empty == ["base_model.model.model.layers.0.mlp.up_proj"]
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded, ids), expected)
    plain = base()
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain, ids), expected)
    model(ids, labels=ids).loss.backward()
    model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=1e-5)


def test_config_used_for_two_models_chooses_twice(tiny):
    """`support_sizes` of the first model must not bind the second."""
    config = NeuroAdaConfig(selection="magnitude_network")
    first = get_peft_model(tiny("llama"), config)
    base = tiny("llama")
    base.model.layers[0].mlp.up_proj.weight.data *= 10
    second = get_peft_model(base, config)
    name = "base_model.model.model.layers.0.mlp.up_proj"
    sizes = [layers_of(model)[name].deltas["default"].support.entries for model in (first, second)]
    assert sizes[1] > sizes[0]


@pytest.mark.parametrize("options", EXTRA, ids=str)
def test_seed_decides_random_entries(tiny, options):
    def indices(seed):
        model = get_peft_model(tiny("llama"), NeuroAdaConfig(k=2, selection="random", seed=seed, **options))
        return torch.cat([layer.deltas["default"].indices.reshape(-1) for layer in layers_of(model).values()])

    assert torch.equal(indices(1), indices(1)) and not torch.equal(indices(1), indices(2))


def test_adapter_that_was_made_empty_says_so(llama, ids):
    from peft import inject_adapter_in_model

    model = inject_adapter_in_model(NeuroAdaConfig(k=2), llama, low_cpu_mem_usage=True)
    with pytest.raises(RuntimeError, match="low_cpu_mem_usage=True.*Load the checkpoint"):
        logits(model, ids)
