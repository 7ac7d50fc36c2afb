"""Properties of every method beside the verbs: what is refused, half precision, and biases of special layers."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from tests.contract._common import (
    METHODS,
    adapted,
    assert_equal_bits,
    base_bits,
    layers_of,
    logits,
)


EVERY = pytest.mark.parametrize("method", METHODS)


@EVERY
def test_safe_merge_refuses_what_is_not_finite(tiny, method):
    model = adapted(tiny("bert"), method)
    last = list(layers_of(model).values())[-1].deltas["default"]
    bits = base_bits(model)
    for parameter in last.parameters():
        before = parameter.detach().clone()
        parameter.data[0] = torch.nan
        with pytest.raises(ValueError, match="NaN"):
            model.merge_adapter(safe_merge=True)
        assert not any(layer.merged for layer in layers_of(model).values())
        assert_equal_bits(base_bits(model), bits)
        parameter.data.copy_(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@EVERY
def test_half_precision_base(tiny, inputs_of, tmp_path, method, dtype):
    model = adapted(tiny("vit", dtype), method)
    inputs = inputs_of("vit", dtype)
    expected = logits(model, inputs)
    assert expected.dtype == dtype
    assert {p.dtype for layer in layers_of(model).values() for p in layer.deltas.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("vit", dtype), tmp_path), inputs), expected)
    bits = base_bits(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert_equal_bits(base_bits(model), bits)


def test_shared_weights_with_biases_of_their_own_are_refused():
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    base[1].weight = base[0].weight
    with pytest.raises(ValueError, match="share a weight(.|\n)*train_bias=False"):
        get_peft_model(base, METHODS["gps"](target_modules=["0", "1"]))
    assert not layers_of(base)
    get_peft_model(base, METHODS["gps"](target_modules=["0", "1"], train_bias=False))


@pytest.mark.parametrize("requantize", [False, True])
def test_quantised_layer_with_trained_biases(requantize):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 32))
    quantised = bnb.nn.Linear4bit(64, 32, quant_type="nf4")
    quantised.load_state_dict(base[0].state_dict())
    base[0] = quantised.to("cpu")
    base.is_loaded_in_4bit = True
    model = adapted(base, "neuroada with biases", target_modules=["0"])
    layer = next(iter(layers_of(model).values()))
    bias = layer.get_base_layer().bias.detach().clone()
    layer.requantize = requantize
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = model(x)
        model.merge_adapter()
        assert torch.equal(layer.get_base_layer().bias, bias + layer.deltas["default"].bias)
        if not requantize:
            torch.testing.assert_close(model(x), expected, atol=1e-2, rtol=1e-2)
        model.unmerge_adapter()
        assert torch.equal(layer.get_base_layer().bias, bias)
        assert torch.equal(model(x), expected)


@EVERY
def test_an_adapter_made_with_the_config_of_another_has_its_entries(tiny, ids, tmp_path, method):
    """As TRL makes the reference of a policy: from its config, and then its values copied by name."""
    inputs = {"input_ids": ids}
    adapted(tiny("llama"), method).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)
    for layer in layers_of(model).values():  # now magnitudes rank otherwise
        layer.get_base_layer().weight.data = layer.get_base_layer().weight.data.flip(-1)
        layer.deltas["default"].checked = True
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    for layer in layers_of(model).values():
        ours, theirs = (layer.deltas[adapter].support for adapter in ("default", "ref"))
        assert torch.equal(ours.indices, theirs.indices) and ours.indices.data_ptr() != theirs.indices.data_ptr()
    expected = logits(model, inputs)
    model.set_adapter("ref")
    assert torch.equal(logits(model, inputs), expected)


@EVERY
def test_missing_tensors_are_an_error_and_leave_the_model_as_it_was(tiny, inputs_of, tmp_path, method):
    adapted(tiny("bert"), method).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = load_file(path)
    for part in {key.rpartition(".")[2] for key in whole if "_delta." in key}:
        missing = next(key for key in whole if key.endswith(f"_delta.{part}"))
        save_file({key: value for key, value in whole.items() if key != missing}, path)
        base = tiny("bert")
        expected = logits(base, inputs_of("bert"))
        with pytest.raises(ValueError, match="lacks"):
            PeftModel.from_pretrained(base, tmp_path)
        assert not layers_of(base) and torch.equal(logits(base, inputs_of("bert")), expected), part
