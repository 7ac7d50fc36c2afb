"""Several adapters on one model: switching, disabling, deleting, saving, copying, and LoRA beside them."""

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model

from peft_ext import MoReSConfig, hotswap_adapter
from tests._models.vision_language import build, inputs
from tests.contract._common import adapter_bits, assert_equal_bits, fill, logits
from tests.tuners.mores._common import adapted, ends, layers_of, steered_base, values_of


@pytest.fixture
def batch():
    return inputs()


@pytest.fixture
def model():
    """Adapters `default` and `second`, `default` active."""
    model = adapted()
    model.add_adapter("second", MoReSConfig(rank=3, token_selection="all", layers_to_transform=[1, 2]))
    return fill(model, "second", seed=2).eval()


def test_two_active_adapters_steer_one_after_the_other(model, batch):
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, batch)
    for name in ("default", "second"):
        model.set_adapter(name)
        assert not torch.allclose(both, logits(model, batch), atol=1e-3)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_projections": False, "steering_bias": False},
        {"token_selection": "random", "seed": 5, "dropout": 0.1},
        {"site": "connector", "token_ratio": 1.0},
        {"token_positions": "f1+l2"},
        {"layers_to_transform": -1, "token_positions": "l1"},
    ],
    ids=str,
)
def test_saved_and_loaded_bit_for_bit(options, low_cpu_mem_usage, batch, tmp_path):
    model = adapted(**options)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(again, batch), expected)
    assert_equal_bits(adapter_bits(again), adapter_bits(model))
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_config.json").read_text() == (tmp_path / "adapter_config.json").read_text()


def test_a_bf16_base_keeps_fp32_values(batch, tmp_path):
    model = adapted(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        again = PeftModel.from_pretrained(build(dtype=torch.bfloat16), tmp_path, low_cpu_mem_usage=low)
        assert_equal_bits(adapter_bits(again), adapter_bits(model))


def test_lora_on_the_same_base(batch):
    model = build()
    model.add_adapter(MoReSConfig(rank=2, token_ratio=0.25), "steering")
    fill(model, "steering")
    alone = logits(model, batch)
    model.add_adapter(LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False), "lora")
    model.set_adapter("steering")
    assert torch.equal(logits(model, batch), alone)
    model.set_adapter(["steering", "lora"])
    both = logits(model, batch)
    parameters = values_of(model, "steering")
    model.set_adapter("lora")
    lora = logits(model, batch)
    assert not torch.allclose(both, alone, atol=1e-3) and not torch.allclose(both, lora, atol=1e-3)
    with steered_base(model, parameters, ends(batch["input_ids"], 0.25)):
        torch.testing.assert_close(logits(model, batch), both, atol=2e-4, rtol=1e-3)


# What steering refuses, with its words.
REFUSED = {
    "adapter_names": lambda model, batch, folder: model(**batch, adapter_names=["default", "second"]),
    r"some tokens only.*unload": lambda model, batch, folder: model.merge_and_unload(),
    r"on some tokens only": lambda model, batch, folder: model.merge_adapter(),
    "not orthonormal": lambda model, batch, folder: model.add_weighted_adapter(["default", "second"], [1, 1], "both"),
    "MORES.*load_adapter": lambda model, batch, folder: hotswap_adapter(model, folder),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_steering_has_no_meaning_for_is_explained_and_changes_nothing(words, model, batch, tmp_path):
    adapted(seed=7).save_pretrained(tmp_path)
    expected = logits(model, batch)
    with pytest.raises((ValueError, NotImplementedError), match=words):
        REFUSED[words](model, batch, tmp_path)
    assert torch.equal(logits(model, batch), expected)


class TestMergingAtTheConnector:
    @pytest.fixture
    def model(self):
        model = adapted(site="connector", token_ratio=1.0)
        model.add_adapter("second", MoReSConfig(rank=3, site="connector", token_ratio=1.0))
        return fill(model, "second", seed=2).eval()

    def linear(self, model):
        return model.get_base_model().model.multi_modal_projector.linear_2

    def test_two_adapters_merge_in_order_and_unmerge_in_any(self, model, batch):
        original = self.linear(model).weight.clone(), self.linear(model).bias.clone()
        model.base_model.set_adapter(["default", "second"])
        both = logits(model, batch)
        model.merge_adapter(["default", "second"])
        torch.testing.assert_close(logits(model, batch), both, atol=1e-4, rtol=1e-3)
        layer = next(iter(layers_of(model).values()))
        layer.unmerge(["default"])
        model.set_adapter("second")
        merged = logits(model, batch)
        model.unmerge_adapter()
        torch.testing.assert_close(merged, logits(model, batch), atol=1e-4, rtol=1e-3)
        assert torch.equal(self.linear(model).weight, original[0]) and torch.equal(
            self.linear(model).bias, original[1]
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_every_bit_comes_back_after_many_rounds(self, dtype):
        model = adapted(site="connector", token_ratio=1.0, dtype=dtype)
        weight = self.linear(model).weight.clone()
        for _ in range(5):
            model.merge_adapter()
            assert not torch.equal(self.linear(model).weight, weight)
            model.unmerge_adapter()
        assert torch.equal(self.linear(model).weight, weight)

    def test_an_adapter_after_layers_beside_it_is_in_the_way_of_no_other(self, model, batch):
        expected = logits(model, batch)
        model.add_adapter("layers", MoReSConfig(rank=2))
        model.merge_adapter(["default"])
        torch.testing.assert_close(logits(model, batch), expected, atol=1e-4, rtol=1e-3)
        with pytest.raises(NotImplementedError, match="some tokens only"):
            model.merge_adapter(["second", "layers"])
        assert next(layer for layer in layers_of(model).values() if layer.merged).merged_adapters == ["default"]
        merged = model.merge_and_unload(adapter_names=["default"])
        torch.testing.assert_close(logits(merged, batch), expected, atol=1e-4, rtol=1e-3)

    def test_disabling_while_merged_gives_the_base_model(self, model, batch):
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(logits(model, batch), logits(build(), batch))

    def test_a_merge_that_is_not_finite_is_refused_with_nothing_written(self, model):
        layer = next(iter(layers_of(model).values()))
        layer.mores_steering["default"].weight.data[0, 0] = float("nan")
        weight = self.linear(model).weight.clone()
        with pytest.raises(ValueError, match="NaN"):
            model.merge_adapter(safe_merge=True)
        assert torch.equal(self.linear(model).weight, weight) and not layer.merged

    def test_a_bias_without_a_place_is_refused(self):
        model = adapted("idefics3", site="connector", token_ratio=1.0)
        with pytest.raises(ValueError, match="steering_bias=False"):
            model.merge_adapter()

    def test_another_adapter_around_the_layer_is_refused(self):
        base = build()
        inject_adapter_in_model(LoraConfig(target_modules=["linear_2"]), base, "lora")
        inject_adapter_in_model(MoReSConfig(site="connector", token_ratio=1.0), base, "steering")
        layer = next(iter(layers_of(base).values()))
        with pytest.raises(TypeError, match="cannot be merged"):
            layer.merge(adapter_names=["steering"])
