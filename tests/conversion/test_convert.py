"""Adapters of PEFT's SHiRA and Super-Tuning become ours: the same entries, outputs, gradients and merged weights."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftMixedModel, PeftModel, ShiraConfig, SupertuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from peft_ext import NeuroAdaConfig, cli, convert
from peft_ext.sparse.layers import SparseLayer
from tests.sparse._asserts import assert_same_bits, bits, ulps_apart
from tests.tuners.neuroada._common import logits


pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")


def diagonal(base_layer, r, **kwargs):
    """A mask of r * (rows + fan_in) entries, as many in each row."""
    rows, fan_in = base_layer.weight.shape
    each, rest = divmod(r * (rows + fan_in), rows)
    assert rest == 0
    mask = torch.zeros_like(base_layer.weight)
    for row in range(rows):
        mask[row, (row + torch.arange(each)) % fan_in] = 1
    return mask


def with_mask(config):
    config.mask_fn = diagonal
    return config


CONFIGS = {
    "SHiRA": lambda: ShiraConfig(r=2, random_seed=3, target_modules=["q_proj", "down_proj"], init_weights=False),
    "SHiRA of equal rows": lambda: with_mask(
        ShiraConfig(r=1, mask_type="custom", target_modules=["q_proj", "v_proj"], init_weights=False)
    ),
    "Super-Tuning": lambda: SupertuningConfig(sparsity=0.95, target_modules="all-linear", init_weights=False),
    "Super-Tuning from below": lambda: SupertuningConfig(
        sparsity=0.9, select_top=False, target_modules=["up_proj"], init_weights=False
    ),
}
PEERS = pytest.mark.parametrize("peer", CONFIGS)


def peft_adapted(base, peer="SHiRA", seed=0, **options):
    """A model with an adapter of a peer, with values."""
    torch.manual_seed(seed)
    config = CONFIGS[peer]()
    for name, value in options.items():
        setattr(config, name, value)
    return scaled(get_peft_model(base, config).eval())


def scaled(model):
    for name, parameter in model.named_parameters():
        if "shira_weight" in name or "supertuning_values" in name:
            parameter.data.mul_(0.1)
    return model


def dense_updates(model, adapter_name="default"):
    """The update of each adapted weight, by the name that it has in the base model."""
    return {
        name: module.get_delta_weight(adapter_name).detach().to_dense().clone()
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "get_delta_weight") and adapter_name in module._get_available_adapters()
    }


@PEERS
def test_same_entries_and_outputs(tiny, ids, peer):
    model = peft_adapted(tiny("llama"), peer)
    expected, updates = logits(model, ids), dense_updates(model)
    converted = convert(model)
    assert converted.peft_config["default"].peft_type == "NEUROADA" and not converted.training
    torch.testing.assert_close(logits(converted, ids), expected, atol=1e-5, rtol=1e-5)
    for name, update in dense_updates(converted).items():
        assert torch.equal(update, updates.pop(name)), name
    assert not updates
    tables = {layer.deltas["default"].support.is_table for layer in _layers(converted)}
    assert tables == {peer == "SHiRA of equal rows"}


def _layers(model):
    return [module for module in model.modules() if isinstance(module, SparseLayer)]


@PEERS
def test_same_gradients(tiny, ids, peer):
    model = peft_adapted(tiny("llama"), peer)
    model(ids, labels=ids).loss.backward()
    expected = {}
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "shira_weight"):
            row, column = layer.shira_indices["default"].long()
            values = layer.shira_weight["default"]
        elif hasattr(layer, "supertuning_values"):
            flat = layer.supertuning_indices["default"].long()
            row, column = flat // layer.in_features, flat % layer.in_features
            values = layer.supertuning_values["default"]
        else:
            continue
        expected[name] = torch.zeros(layer.out_features, layer.in_features)
        expected[name][row, column] = values.grad
    converted = convert(model)
    converted(ids, labels=ids).loss.backward()
    trained = {name for name, parameter in converted.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(expected) and all("neuroada_delta" in name for name in trained)
    for name, layer in converted.get_base_model().named_modules():
        if isinstance(layer, SparseLayer):
            delta = layer.deltas["default"]
            gradient = delta.support.gather(expected[name])
            torch.testing.assert_close(delta.weight.grad, gradient, atol=1e-6, rtol=1e-4, msg=name)


@PEERS
def test_merged_weights_are_the_same_bits_and_unmerging_restores_the_base(tiny, peer):
    base = tiny("llama")
    model = peft_adapted(copy.deepcopy(base), peer)
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    converted = convert(model)
    converted.merge_adapter()
    converted.unmerge_adapter()
    for name, tensor in copy.deepcopy(converted).unload().state_dict().items():
        assert_same_bits(tensor, bits(base.state_dict()[name]))
    for name, tensor in converted.merge_and_unload().state_dict().items():
        assert_same_bits(tensor, bits(expected[name]))


@PEERS
def test_16_bit_sums_are_rounded_once(tiny, peer):
    base = tiny("llama", torch.bfloat16)
    updates = dense_updates(convert(peft_adapted(copy.deepcopy(base), peer)))
    merged = convert(peft_adapted(copy.deepcopy(base), peer)).merge_and_unload()
    theirs = peft_adapted(copy.deepcopy(base), peer).merge_and_unload()
    for name, update in updates.items():
        exact = base.get_submodule(name).weight.double() + update.double()
        assert ulps_apart(merged.get_submodule(name).weight, exact).max() <= 0.5 + 1e-3
        difference = merged.get_submodule(name).weight.double() - theirs.get_submodule(name).weight.double()
        assert difference.abs().max() <= 2.0**-7 * exact.abs().max()


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


def test_several_adapters(tiny, ids):
    model = peft_adapted(tiny("llama"))
    model.add_adapter("second", ShiraConfig(r=1, random_seed=9, target_modules=["o_proj"], init_weights=False))
    scaled(model)
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = logits(model, ids)
    converted = convert(model)
    assert converted.active_adapters == ["second"]
    for name in ("second", "default"):
        converted.set_adapter(name)
        torch.testing.assert_close(logits(converted, ids), expected[name], atol=1e-5, rtol=1e-5)
    converted.base_model.set_adapter(["default", "second"])
    assert converted.active_adapters == ["default", "second"]


def test_scaling_becomes_a_part_of_the_values(tiny, ids):
    model = peft_adapted(tiny("llama"))
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.3)
    expected = logits(model, ids)
    torch.testing.assert_close(logits(convert(model), ids), expected, atol=1e-5, rtol=1e-5)


@PEERS
def test_modules_trained_whole_come_along(tiny, ids, peer):
    base = tiny("llama")
    head = base.lm_head.weight.detach().clone()
    model = peft_adapted(base, peer, modules_to_save=["lm_head"], target_modules=["q_proj"])
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.add_(0.01)
    expected = logits(model, ids)
    converted = convert(model)
    torch.testing.assert_close(logits(converted, ids), expected, atol=1e-5, rtol=1e-5)
    wrapper = converted.base_model.model.lm_head
    assert torch.equal(wrapper.original_module.weight, head)
    assert wrapper.modules_to_save["default"].weight.requires_grad


def test_targets_are_the_same_modules_though_names_have_equal_ends():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 8)
            self.inner = nn.ModuleDict({"lin": nn.Linear(8, 8)})

        def forward(self, x):
            return self.inner["lin"](self.lin(x))

    config = ShiraConfig(r=1, target_modules="lin", init_weights=False)
    model = get_peft_model(Nested(), config).eval()
    x = torch.randn(3, 8)
    expected = model(x)
    converted = convert(model)
    torch.testing.assert_close(converted(x), expected)
    assert len(_layers(converted)) == 1


def test_quantised_base(model_dir, ids):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForCausalLM.from_pretrained(
        model_dir("llama"), quantization_config=quantisation, device_map={"": "cpu"}, dtype=torch.float32
    )
    model = peft_adapted(base.eval())
    updates = dense_updates(model)
    converted = convert(model)
    for name, update in dense_updates(converted).items():
        assert torch.equal(update, updates[name]), name
    with_adapter = logits(converted, ids)
    with converted.disable_adapter():
        assert not torch.equal(logits(converted, ids), with_adapter)
    assert torch.isfinite(with_adapter).all()


# ------------------------------------------------------------------ refused


def refused(model, ids, error, match, *args, **kwargs):
    before = logits(model, ids)
    with pytest.raises(error, match=match):
        convert(model, *args, **kwargs)
    assert torch.equal(logits(model, ids), before)


def test_a_lora_part(tiny, ids, tmp_path):
    config = SupertuningConfig(sparsity=0.9, target_modules=["q_proj"], r=2, init_weights=False)
    model = get_peft_model(tiny("llama"), config).eval()
    refused(model, ids, ValueError, "r=2.*LoRA.*merge_and_unload")
    model.save_pretrained(tmp_path)
    base = tiny("llama")
    with pytest.raises(ValueError, match="r=2"):
        convert(tmp_path, base)
    assert not hasattr(base, "peft_config")


def test_another_method(tiny, ids):
    refused(get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"])).eval(), ids, TypeError, "LORA")


def test_merged_adapter(tiny, ids):
    model = peft_adapted(tiny("llama"))
    model.merge_adapter()
    refused(model, ids, ValueError, "merged.*unmerge_adapter")


def test_weights_that_modules_share(tiny, ids):
    base = tiny("llama")
    base.model.layers[1].self_attn.q_proj.weight = base.model.layers[0].self_attn.q_proj.weight
    refused(peft_adapted(base), ids, ValueError, "share one weight.*Untie")


def test_lost_indices(tiny, ids):
    model = peft_adapted(tiny("llama"))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    kept = layer.shira_indices.pop("default")
    with pytest.raises(ValueError, match="no indices.*'default'"):
        convert(model)
    layer.shira_indices["default"] = kept + 1000
    with pytest.raises(ValueError, match="outside"):
        convert(model)


@pytest.mark.parametrize("what", ["base model", "mixed model", "options", "adapted base model", "no base model"])
def test_wrong_arguments(tiny, ids, tmp_path, what):
    if what == "base model":
        refused(tiny("llama"), ids, TypeError, "LlamaForCausalLM, not a PeftModel")
    elif what == "mixed model":
        refused(PeftMixedModel(tiny("llama"), CONFIGS["SHiRA"]()).eval(), ids, TypeError, "PeftMixedModel")
    elif what == "options":
        refused(peft_adapted(tiny("llama")), ids, ValueError, "is_trainable", is_trainable=True)
    elif what == "adapted base model":
        model = peft_adapted(tiny("llama"))
        model.save_pretrained(tmp_path)
        before = logits(model, ids)
        with pytest.raises(ValueError, match="PeftModel, which has adapters already"):
            convert(tmp_path, model)
        assert torch.equal(logits(model, ids), before)
    else:
        with pytest.raises(ValueError, match="base_model=None"):
            convert(str(tmp_path))


# ------------------------------------------------------------------ the command


def test_command(tiny, model_dir, ids, tmp_path, capsys):
    model = peft_adapted(tiny("llama"))
    model.save_pretrained(tmp_path / "peer")
    arguments = ["convert", str(tmp_path / "peer"), str(tmp_path / "ours"), "--base", model_dir("llama")]
    assert cli.main(arguments) == 0
    assert "entries" in capsys.readouterr().out
    assert isinstance(PeftConfig.from_pretrained(tmp_path / "ours"), NeuroAdaConfig)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=1e-5, rtol=1e-5)


def test_command_says_what_is_wrong(tiny, tmp_path, capsys):
    peft_adapted(tiny("llama")).save_pretrained(tmp_path / "peer")
    config = PeftConfig.from_pretrained(tmp_path / "peer")
    config.base_model_name_or_path = None
    config.save_pretrained(tmp_path / "peer")
    assert cli.main(["convert", str(tmp_path / "peer"), str(tmp_path / "ours")]) == 1
    assert "--base" in capsys.readouterr().err
    get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    assert cli.main(["convert", str(tmp_path / "lora"), str(tmp_path / "ours")]) == 1
    assert "LORA" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()
