"""Experts of quantised bases: what transformers does with them in each format, and adapters on the outcome."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config, TorchAoConfig
from transformers.integrations import finegrained_fp8
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

from peft_ext import NeuroAdaConfig, activation_scores, busiest_experts, gradient_scores
from peft_ext.sparse.bases.fp8 import dequantised
from tests._models.experts import adapted, fill, layers_of, run, tiny, token_ids

from .test_dense_reference import assert_equals_dense


IDS = token_ids()
DATA = [{"input_ids": IDS, "labels": IDS}]


def logits(model):
    with torch.no_grad():
        return run(model, input_ids=IDS)


@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=["4bit", "8bit"])
def test_bitsandbytes_leaves_experts_as_they_are(options, tmp_path, monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)  # its kernels take no layers as narrow
    tiny().save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**options))
    assert not base.model.layers[0].self_attn.q_proj.weight.is_floating_point()
    model = fill(get_peft_model(base.eval(), NeuroAdaConfig()))
    assert len(layers_of(model)) == 4 + 2
    model(**DATA[0]).loss.backward()
    assert all(bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
    expected = logits(model)
    model.merge_adapter()
    assert not torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)


def torchao_experts(name, kind, tmp_path):
    """By patterns, the only way in which transformers quantises parameters that belong to no layer."""
    quantization = pytest.importorskip("torchao.quantization")
    config = getattr(quantization, kind)()
    patterns = {rf"re:.*experts\.{bank}_proj": config for bank in ("gate_up", "down")}
    tiny(name).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=TorchAoConfig(quantization.FqnToConfig(patterns))
    ).eval()
    base.set_experts_implementation("eager")  # torchao has no operators for the others
    return base


def fp8_model(name="mixtral", implementation="eager", block=(8, 8)):
    """As a checkpoint in fine-grained fp8 is loaded, on a device that has the kernels."""
    plain = tiny(name)
    model = copy.deepcopy(plain)
    config = FineGrainedFP8Config(weight_block_size=block)
    finegrained_fp8.replace_with_fp8_linear(model, ["lm_head"], config)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in list(model.named_parameters()):
        if parameter.is_meta and not key.endswith("_scale_inv"):
            weight = plain.get_parameter(key).detach()
            path, _, last = key.rpartition(".")
            module = model.get_submodule(path)
            shape = getattr(module, f"{last}_scale_inv").shape
            scale = torch.rand(shape, generator=generator) + 0.1  # unequal, so that passing over them shows
            packed = (weight / dequantised(torch.ones_like(weight), scale, block)).to(torch.float8_e4m3fn)
            setattr(module, last, torch.nn.Parameter(packed, requires_grad=False))
            setattr(module, f"{last}_scale_inv", torch.nn.Parameter(scale, requires_grad=False))
    model.config._experts_implementation_internal = implementation
    return model.eval()


@pytest.fixture
def fp8_product(monkeypatch):
    """A dense product in the place of the kernels, which need a GPU and the hub."""

    def product(x, weight, scale, block_size=None, bias=None, activation_scale=None, allow_deepgemm=True):
        y = x @ dequantised(weight, scale, block_size).to(x.dtype).t()
        return y if bias is None else y + bias

    monkeypatch.setattr(finegrained_fp8, "fp8_linear", product)


def twin(base):
    """A plain model with the dequantised weights of a quantised one."""
    dense, parameters = tiny(base.config.model_type), dict(base.named_parameters())
    for key, parameter in dense.named_parameters():
        packed = parameters[key].detach()
        if f"{key}_scale_inv" in parameters:
            packed = dequantised(packed, parameters[f"{key}_scale_inv"].detach(), (8, 8))
        parameter.data.copy_(packed.dequantize() if hasattr(packed, "qdata") else packed)
    return dense


CASES = pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mixtral", "Int8WeightOnlyConfig"),
        ("mixtral", "Float8WeightOnlyConfig"),
        ("gpt_oss", "Float8WeightOnlyConfig"),
        ("mixtral", "fp8"),
        ("qwen3_moe", "fp8"),
        ("deepseek_v3", "fp8"),
    ],
)


@pytest.fixture
def load(name, kind, tmp_path, fp8_product):
    return lambda: fp8_model(name) if kind == "fp8" else torchao_experts(name, kind, tmp_path)


def targets(kind):
    return ["experts", "o_proj"] if kind == "fp8" else ["experts"]  # in fp8 linear layers are quantised, too


@CASES
def test_output_gradients_and_magnitudes_are_those_of_dequantised_weights(name, kind, load):
    dense = twin(load())
    model = adapted(name, base=load(), target_modules=targets(kind))
    assert_equals_dense(name, model, dense)
    chosen = layers_of(adapted(name, base=dense, target_modules=targets(kind)))
    for key, layer in layers_of(model).items():
        assert torch.equal(layer.deltas["default"].indices, chosen[key].deltas["default"].indices), key


@CASES
def test_merging_makes_them_dense_and_unmerging_restores_every_bit(name, kind, load):
    model = adapted(name, base=load(), target_modules=targets(kind))
    parameters = dict(model.named_parameters())
    expected = logits(model)
    for _ in range(2):
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(logits(model), expected)
        assert all(parameter is parameters[key] for key, parameter in model.named_parameters())
    with pytest.raises(TypeError, match="requantize=True.*can't be quantised again"):
        model.merge_adapter(requantize=True)
    assert torch.equal(logits(model), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    assert all(type(p) is torch.nn.Parameter and p.element_size() > 1 for p in merged.parameters() if p.dim() == 3)
    assert not hasattr(merged.config, "quantization_config")


@pytest.mark.parametrize(("name", "kind"), [("mixtral", "Int8WeightOnlyConfig"), ("deepseek_v3", "fp8")])
def test_a_merged_model_is_saved_and_loaded_as_a_dense_one(name, load, tmp_path):
    whole = ["experts"] if name == "mixtral" else None  # all that is quantised
    model = adapted(name, base=load(), target_modules=whole)
    expected = logits(model)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager"
    )
    torch.testing.assert_close(logits(loaded.eval()), expected, atol=1e-5, rtol=1e-5)


@CASES
def test_files_fit_the_quantised_and_the_original_base_and_no_other(name, kind, load, tmp_path):
    model = adapted(name, base=load(), target_modules=["experts"])
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path / "adapter")), logits(model))
    plain = layers_of(PeftModel.from_pretrained(tiny(name), tmp_path / "adapter"))
    for key, layer in layers_of(model).items():
        assert torch.equal(plain[key].get_delta_weight("default"), layer.get_delta_weight("default"))
    other = tiny(name)
    for parameter in other.parameters():
        parameter.data = torch.randn_like(parameter)
    with pytest.raises(ValueError, match="made for another base model"):
        PeftModel.from_pretrained(other, tmp_path / "adapter")


@pytest.mark.parametrize(("name", "kind"), [("mixtral", "Int8WeightOnlyConfig"), ("mixtral", "fp8")])
@pytest.mark.parametrize("scores", [gradient_scores, activation_scores])
def test_they_are_not_scored(scores, name, kind, load):
    with pytest.raises(TypeError, match="is quantised .*Score the unquantised model"):
        scores(load(), DATA, config=NeuroAdaConfig(target_modules=["experts"]), progress=False)


@pytest.mark.parametrize(
    ("scales", "block"),
    [((), None), ((4, 1, 1), None), ((4, 2, 1), None), ((4, 3, 2), (5, 4)), ((4, 2, 3), (8, 3))],
    ids=str,
)
def test_each_block_has_its_scale(scales, block):
    weight, scale = torch.randn(4, 12, 8), torch.rand(scales)
    rows, columns = block or (12 // (scales[1] if scales else 1), 8)
    expected = torch.empty_like(weight)
    for expert, row, column in torch.cartesian_prod(*map(torch.arange, weight.shape)).tolist():
        own = scale[expert, row // rows, column // columns] if scales else scale
        expected[expert, row, column] = weight[expert, row, column] * own
    assert torch.equal(dequantised(weight, scale, block), expected)


def test_grouped_linear_layers_in_8_bits_are_left_alone():
    """They are linear layers by class only."""
    model = fp8_model()
    layer = finegrained_fp8.FP8GroupedLinear(8, 16, n_groups=2, block_size=(8, 8))
    model.model.layers[0].self_attn.o_proj = layer
    with pytest.raises(TypeError, match="FP8GroupedLinear, which is not supported"):
        get_peft_model(model, NeuroAdaConfig(target_modules=["o_proj"]))
    assert "o_proj" not in "".join(layers_of(get_peft_model(model, NeuroAdaConfig())))


@pytest.mark.usefixtures("fp8_product")
def test_kernels_for_all_experts_in_8_bits_are_refused():
    model = fill(get_peft_model(fp8_model(implementation="grouped_mm"), NeuroAdaConfig()))
    assert len(layers_of(model)) == 4 + 2
    for compute in (lambda: logits(model), lambda: busiest_experts(model, DATA, progress=False)):
        with pytest.raises(NotImplementedError, match=r"'grouped_mm'.*set_experts_implementation\('eager'\)"):
            compute()


@pytest.mark.usefixtures("fp8_product")
def test_the_busiest_experts_in_8_bits_are_found():
    base = fp8_model()
    assert busiest_experts(base, DATA, 0.5, progress=False) == busiest_experts(twin(base), DATA, 0.5, progress=False)


@pytest.mark.parametrize("swizzled", [False, True])
def test_mxfp4_is_named_with_the_remedy(swizzled):
    """On a GPU transformers takes the packed weights out of the parameters."""

    def base():
        model = tiny("gpt_oss")
        experts = model.model.layers[0].mlp.experts = Mxfp4GptOssExperts(model.config)
        if swizzled:
            for bank in ("gate_up_proj", "down_proj"):
                delattr(experts, bank)
                setattr(experts, bank, object())
        return model

    message = r"in mxfp4.*quantization_config=Mxfp4Config\(dequantize=True\)"
    with pytest.warns(UserWarning, match=f"Mxfp4GptOssExperts.*is left out.*{message}"):
        model = get_peft_model(base(), NeuroAdaConfig())
    assert not any("experts" in key for key in layers_of(model))
    with pytest.raises(TypeError, match=f"Mxfp4GptOssExperts.*not supported.*{message}"):
        get_peft_model(base(), NeuroAdaConfig(target_modules=["experts"]))
