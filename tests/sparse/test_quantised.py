"""Quantised bases: bitsandbytes on the CPU, through transformers; and backends that only compute."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_model_status, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from peft_ext import NeuroAdaConfig, gradient_scores
from peft_ext.hf.internals import ForwardOnlyQuantizationBackend
from peft_ext.sparse.bases.quantised import float_weight
from peft_ext.sparse.choose import targets
from tests.contract._common import layers_of
from tests.tuners.neuroada._common import logits

from ._asserts import assert_same_state, state_bits


bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:.*`is_gradient_checkpointing` is deprecated")


@pytest.fixture(autouse=True)
def same_on_all_cpus(monkeypatch):
    """On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights at the first forward of inference: it rounds their
    scales, and crashes on layers as narrow as these."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)


QUANTISED = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"},
    "8bit": {"load_in_8bit": True},
}
KINDS = pytest.mark.parametrize("kind", QUANTISED)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def _load(model_dir, kind, dtype=torch.float32):
    config = BitsAndBytesConfig(**QUANTISED[kind])
    return AutoModelForCausalLM.from_pretrained(
        model_dir("llama"), quantization_config=config, device_map={"": "cpu"}, dtype=dtype
    ).eval()


def _adapted(model_dir, kind, dtype=torch.float32, **options):
    config = NeuroAdaConfig(k=2, **{"init_weights": False, **options})
    model = get_peft_model(_load(model_dir, kind, dtype), config).eval()
    for layer in _layers(model):
        layer.deltas["default"].weight.data.mul_(0.1)
    return model


def _layers(model):
    return [*layers_of(model).values()]


@KINDS
def test_the_magnitudes_are_those_of_the_dequantised_weights(kind, model_dir):
    model = _adapted(model_dir, kind)
    assert get_model_status(model).quantization_backend == f"bnb {kind}"
    for layer in _layers(model):
        matrix = layer.base_matrix()
        delta = layer.deltas["default"]
        smallest_chosen = delta.support.gather(matrix).abs().min(1).values
        assert (matrix.abs() > smallest_chosen[:, None]).sum(1).max() < 2


@KINDS
def test_output_and_gradients_are_those_of_the_base_plus_the_update(kind, model_dir):
    layer = _layers(_adapted(model_dir, kind))[0]
    x = torch.randn(5, layer.in_features, requires_grad=True)
    update = layer.get_delta_weight("default")
    y = layer(x)
    torch.testing.assert_close(y, layer.base_layer(x) + x @ update.t())
    grad = torch.randn_like(y)
    values = layer.deltas["default"]
    gradients = torch.autograd.grad(y, [x, values.weight], grad)
    torch.testing.assert_close(gradients[1], values.support.gather(grad.t() @ x))
    (through_base,) = torch.autograd.grad(layer.base_layer(x), x, grad)
    torch.testing.assert_close(gradients[0], through_base + grad @ update)


@DTYPES
@KINDS
def test_merged_layers_are_dense_and_unmerging_restores_every_bit(kind, dtype, model_dir, ids):
    model = _adapted(model_dir, kind, dtype)
    expected, before = logits(model, ids), state_bits(model)
    for _ in range(2):
        model.merge_adapter()
        for layer in _layers(model):
            assert type(layer.base_layer) is nn.Linear and layer.base_layer.weight.dtype == dtype
        _assert_as_dequantised(logits(model, ids), expected, kind, dtype)
        model.unmerge_adapter()
        assert_same_state(model, before)
        assert torch.equal(logits(model, ids), expected)


def _assert_as_dequantised(found, expected, kind, dtype):
    """4-bit weights are multiplied as they are dequantised; 8-bit ones with activations rounded to 8 bits as well, by
    half a step of 1/127 of the largest at most, layer by layer."""
    spread = (expected - expected.mean()).float().norm()
    tolerance = {("4bit", torch.float32): 1e-5}.get((kind, dtype), 0.04)
    assert (found - expected).float().norm() <= tolerance * spread


@DTYPES
@KINDS
def test_a_merged_model_is_saved_and_loaded_as_a_dense_one(kind, dtype, model_dir, ids, tmp_path):
    model = _adapted(model_dir, kind, dtype)
    expected = logits(model, ids)
    merged = model.merge_and_unload()
    _assert_as_dequantised(logits(merged, ids), expected, kind, dtype)
    assert not any(isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)) for m in merged.modules())
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not hasattr(again.config, "quantization_config")
    assert torch.equal(logits(again, ids), logits(merged, ids))


@KINDS
def test_a_partly_merged_model_is_saved_and_loaded_as_it_is(kind, model_dir, ids, tmp_path):
    model = _adapted(model_dir, kind, target_modules=["q_proj", "down_proj"])
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
    kinds = [{name: type(m) for name, m in which.named_modules()} for which in (merged, again)]
    assert kinds[0] == kinds[1]
    torch.testing.assert_close(logits(again, ids), logits(merged, ids))


@KINDS
def test_requantising_is_asked_for_and_tells_its_error(kind, model_dir, ids):
    model = _adapted(model_dir, kind)
    before, expected = state_bits(model), logits(model, ids)
    quantised = type(_layers(model)[0].base_layer)
    wanted = [layer.base_matrix().float() + layer.get_delta_weight("default").float() for layer in _layers(model)]
    with pytest.warns(UserWarning, match=r"changed them by \d+\.\d\d% of their norm") as caught:
        model.merge_adapter(requantize=True)
    assert len([w for w in caught if "of their norm" in str(w.message)]) == 1
    for layer, weight in zip(_layers(model), wanted, strict=True):
        error = (layer.base_matrix().float() - weight).norm() / weight.norm()
        assert type(layer.base_layer) is quantised and error > 0
        assert layer.requantization_error == pytest.approx(float(error), rel=1e-3)
    assert not torch.equal(logits(model, ids), expected)
    model.unmerge_adapter()
    assert_same_state(model, before)
    with pytest.warns(UserWarning, match="of their norm"):
        merged = model.merge_and_unload(requantize=True)
    assert any(type(module) is quantised for module in merged.modules())
    assert merged.config.quantization_config is not None


@KINDS
def test_another_adapter_is_merged_into_the_original_not_the_rounded_weight(kind, model_dir):
    model = _adapted(model_dir, kind, target_modules=["q_proj"])
    layer = _layers(model)[0]
    model.add_adapter("other", NeuroAdaConfig(target_modules=["q_proj"], init_weights=False, selection="reverse"))
    whole = layer.base_matrix() + layer.get_delta_weight("default") + layer.get_delta_weight("other")
    for requantize in (False, True):
        layer.requantize = requantize
        layer.merge(adapter_names=["default"])
        with pytest.warns(UserWarning, match="additionally merging"):
            layer.merge(adapter_names=["other"])
        assert layer.merged_adapters == ["default", "other"]
        error = (layer.base_matrix() - whole).norm() / whole.norm()
        expected = layer.requantization_error if requantize else 0.0
        assert error == pytest.approx(expected, rel=1e-3, abs=1e-6)
        layer.unmerge()


@KINDS
def test_training_moves_no_bit_of_the_base_so_that_one_loaded_anew_gives_the_samelogits(
    kind, model_dir, ids, tmp_path
):
    model = _adapted(model_dir, kind, init_weights=True).train()
    floats = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    optimizer = torch.optim.AdamW(floats, lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(_load(model_dir, kind), tmp_path).eval()
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("fan_in", [64, 192])  # one block of 64 per row, and three
@pytest.mark.parametrize("nested", [False, True])
@DTYPES
def test_4bit_weights_are_read_right_after_bitsandbytes_repacked_them(dtype, nested, fan_in):
    """As it does at the first forward on CPUs with bf16 instructions."""
    options = {"quant_type": "nf4", "compute_dtype": dtype, "compress_statistics": nested}
    layer = bnb.nn.Linear4bit(fan_in, 64, bias=False, **options)
    layer.load_state_dict(nn.Linear(fan_in, 64, bias=False, dtype=dtype).state_dict())
    layer = layer.to("cpu")
    backend = targets.backend_of(nn.Module(), layer)
    before = float_weight(layer, backend)
    pack = bnb.functional._convert_weight_packed_for_cpu
    layer.weight.data, layer.weight.quant_state = pack(layer.weight.data, layer.weight.quant_state)
    assert layer.weight.quant_state.packing_format_for_cpu
    packed, scales = layer.weight.data.clone(), layer.weight.quant_state.absmax.clone()
    after = float_weight(layer, backend)  # repacking rounds the scales to bf16
    assert after.dtype == before.dtype
    torch.testing.assert_close(after, before, rtol=2**-7, atol=0)
    assert layer.weight.quant_state.packing_format_for_cpu, "reading must leave the layer as it was"
    assert torch.equal(layer.weight.data, packed) and torch.equal(layer.weight.quant_state.absmax, scales)


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="needs a CPU with AVX512-BF16")
def test_merging_after_inference_with_repacked_weights_equals_the_unmerged_model(monkeypatch):
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    layer = bnb.nn.Linear4bit(192, 64, quant_type="nf4", compute_dtype=torch.float32, compress_statistics=False)
    layer.load_state_dict(nn.Linear(192, 64).state_dict())
    model = get_peft_model(nn.Sequential(layer.to("cpu")), NeuroAdaConfig(k=2, target_modules=["0"])).eval()
    nn.init.normal_(_layers(model)[0].deltas["default"].weight)
    x = torch.randn(5, 192)
    with torch.no_grad():
        unmerged = model(x)
    assert layer.weight.quant_state.packing_format_for_cpu
    with torch.no_grad():
        merged = model.merge_and_unload()(x)
    bound = 2**-7 * float(unmerged.abs().max())  # its kernel is bf16
    torch.testing.assert_close(merged, unmerged, rtol=0, atol=bound)


# ------------------------------------------------------------------ backends that only compute


class Sealed(nn.Module):
    """A quantised layer whose weight can't be read, as GPTQ's."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None
        self.register_buffer("qweight", linear.weight.detach().clone())

    def forward(self, x):
        return x @ self.qweight.t()


@pytest.fixture
def sealed(monkeypatch):
    """A plain network and the same one quantised by something that PEFT can only compute with."""

    def backend_of(model, base_layer):
        return ForwardOnlyQuantizationBackend("gptq") if isinstance(base_layer, Sealed) else None

    for module in ("choose.targets", "model.sparse_model", "bases.quantised"):
        monkeypatch.setattr(f"peft_ext.sparse.{module}.backend_of", backend_of)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False))
    quantised = nn.Sequential(Sealed(plain[0]), nn.Tanh(), Sealed(plain[2]))
    return SimpleNamespace(plain=plain, quantised=quantised)


def test_a_sealed_base_says_why_no_entries_can_be_chosen(sealed):
    with pytest.raises(TypeError, match=r"'0' is quantised by gptq.*unquantised model.*load it here"):
        get_peft_model(sealed.quantised, NeuroAdaConfig(target_modules=["0", "2"]))


@pytest.mark.parametrize("selection", ["magnitude", "magnitude_network"])
def test_entries_chosen_elsewhere_work_on_a_sealed_base(sealed, selection, tmp_path):
    config = NeuroAdaConfig(k=2, target_modules=["0", "2"], selection=selection, init_weights=False)
    trained = get_peft_model(sealed.plain, config).eval()
    trained.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(sealed.quantised, tmp_path, is_trainable=True)
    x = torch.randn(4, 8)
    torch.testing.assert_close(model(x), trained(x))
    model(x).sum().backward()
    assert all(layer.deltas["default"].weight.grad.abs().max() > 0 for layer in _layers(model))
    with pytest.raises(TypeError, match="gptq can't give its weights back"):
        model.merge_adapter()
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(sealed.quantised, tmp_path / "again", adapter_name="again")
    torch.testing.assert_close(again(x), trained(x))


def test_a_combination_on_a_sealed_base_is_saved_as_made_for_an_unknown_one(sealed, tmp_path):
    """Its entries are new, and the weights at them can't be read."""
    config = NeuroAdaConfig(k=2, target_modules=["0", "2"], init_weights=False)
    get_peft_model(copy.deepcopy(sealed.plain), config).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(sealed.quantised, tmp_path)
    model.load_adapter(tmp_path, "other")
    model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "both")
    model.set_adapter("both")
    model.save_pretrained(tmp_path / "again", selected_adapters=["both"])
    fingerprints = [v for k, v in load_file(tmp_path / "again/both/adapter_model.safetensors").items() if "fing" in k]
    assert sorted(map(torch.Tensor.tolist, fingerprints)) == [[3, 6, 0, 0, 0, 0], [6, 8, 0, 0, 0, 0]]
    with pytest.warns(
        UserWarning, match=r"does not say which weights '.*0.neuroada_delta.default' \(2 modules in all\)"
    ):
        loaded = PeftModel.from_pretrained(sealed.plain, tmp_path / "again/both")
    x = torch.randn(4, 8)
    torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao(model_dir, ids, tmp_path, kind):
    quantization = pytest.importorskip("torchao.quantization")

    def load():
        config = TorchAoConfig(getattr(quantization, kind)())
        return AutoModelForCausalLM.from_pretrained(model_dir("llama"), quantization_config=config).eval()

    with pytest.raises(TypeError, match="is quantised .*, so it can't be scored"):
        gradient_scores(load(), [{"input_ids": ids, "labels": ids}])
    model = get_peft_model(load(), NeuroAdaConfig(k=2, init_weights=False)).eval()
    assert get_model_status(model).quantization_backend == "torchao"
    model(ids, labels=ids).loss.backward()
    assert all(layer.deltas["default"].weight.grad.abs().max() > 0 for layer in _layers(model))
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path), ids), expected)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), expected)
    with pytest.warns(UserWarning, match="of their norm"):
        model.merge_adapter(requantize=True)
    assert get_model_status(model).quantization_backend == "torchao"
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), expected)
    merged = model.merge_and_unload()
    assert not hasattr(merged.config, "quantization_config")
    torch.testing.assert_close(logits(merged, ids), expected, rtol=1e-4, atol=1e-4)


@KINDS
def test_an_adapter_of_a_quantised_base_loads_onto_the_original_without_a_word(
    kind, model_dir, ids, tmp_path, recwarn
):
    """The QLoRA route: train on the quantised base, serve on the original one. And on no other."""
    _adapted(model_dir, kind).save_pretrained(tmp_path)
    original = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
    recwarn.clear()
    model = PeftModel.from_pretrained(original, tmp_path)
    assert not [w for w in recwarn if "base" in str(w.message)]
    weight = model.base_model.model.model.layers[0].self_attn.q_proj
    merged = weight.get_base_layer().weight + weight.get_delta_weight("default")
    assert torch.equal(model.merge_and_unload().model.layers[0].self_attn.q_proj.weight, merged)
    other = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
    for parameter in other.parameters():
        parameter.data = torch.randn_like(parameter) * parameter.std()
    with pytest.raises(ValueError, match="by more than quantisation explains"):
        PeftModel.from_pretrained(other, tmp_path)
